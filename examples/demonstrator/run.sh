#!/usr/bin/env bash
# A model that is trained to exit early, and its plain twin: the same layers, text, order and number of tokens without
# exits. Trained on the Python packages that are installed here, for each of some seeds; then probes, a certificate,
# speeds and a report. What is done is kept: run it again to go on where it stopped.
#
#   bash examples/demonstrator/run.sh FOLDER             two CPU cores, about an hour
#   SIZE=gpu bash examples/demonstrator/run.sh FOLDER    one GPU
#   SEEDS="1 2 3", ITERATIONS (of each training), PROMPTS (of each certificate), PACKAGES (folder of sources)
set -euo pipefail
cd "$(dirname "$0")/../.."
FOLDER=${1:?give the folder to work in}
SIZE=${SIZE:-cpu} SEEDS=${SEEDS:-1 2 3} PROMPTS=${PROMPTS:-1400}
# Documents whose beginnings probes are trained on (many begin alike), and those of everything that is reported.
PROBE_DOCUMENTS=500 PROBE_PROMPTS=400 HELD_OUT_DOCUMENTS=1800
PACKAGES=${PACKAGES:-$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')}
case $SIZE in
    cpu) VOCABULARY=4096 MAX_MB=120 DRAFTING=1 LEAVING="2 4 8" AT_ONCE=2 ;;
    gpu) VOCABULARY=8192 MAX_MB=1200 DRAFTING=2 LEAVING="3 6 12" AT_ONCE=1 ;;
    *) echo "error: SIZE is $SIZE; it is cpu or gpu" >&2 && exit 1 ;;
esac
mkdir -p "$FOLDER"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false

step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

if [ ! -f "$FOLDER/data/held_out_text_document.idx" ]; then
    step "Text: installed Python packages, the last documents held out"
    python tools/stdlib_corpus.py --folder "$PACKAGES" --content source --max-mb "$MAX_MB" --output "$FOLDER/corpus.jsonl"
    tail -n $HELD_OUT_DOCUMENTS "$FOLDER/corpus.jsonl" > "$FOLDER/held_out.jsonl"
    head -n -$HELD_OUT_DOCUMENTS "$FOLDER/corpus.jsonl" > "$FOLDER/others.jsonl"
    tail -n $PROBE_DOCUMENTS "$FOLDER/others.jsonl" > "$FOLDER/probes.jsonl"
    head -n -$PROBE_DOCUMENTS "$FOLDER/others.jsonl" > "$FOLDER/train.jsonl"
    python tools/train_tokenizer.py --input "$FOLDER/train.jsonl" --output "$FOLDER/tokenizer" \
        --vocab-size $VOCABULARY --overwrite
    for part in train probes held_out; do
        python tools/preprocess_data.py --input "$FOLDER/$part.jsonl" --output-prefix "$FOLDER/data/$part" \
            --tokenizer-model "$FOLDER/tokenizer" --append-eod --workers 2 --overwrite
    done
fi

# train NAME SEED FLAGS: a model below FOLDER/seed_SEED, its log beside it
train() {
    local name=$1 seed=$2 && shift 2
    python pretrain_early_exit_gpt.py --config "examples/demonstrator/$SIZE.yaml" --seed "$seed" "$@" \
        ${ITERATIONS:+--train-iters "$ITERATIONS"} \
        --tokenizer-model "$FOLDER/tokenizer" --data-path "$FOLDER/data/train_text_document" \
        --data-cache-path "$FOLDER/data/cache" --save "$FOLDER/seed_$seed/$name" --load "$FOLDER/seed_$seed/$name" \
        --save-interval 100 --keep-last 1 --exit-signal-handler >> "$FOLDER/seed_$seed/$name.log" 2>&1 ||
        { tail -n 20 "$FOLDER/seed_$seed/$name.log" >&2 && return 1; }
}

EXITS=(--exit-layer-nums $DRAFTING $LEAVING --exit-uses draft leave leave leave --exit-layer-weight 0.25 0.25 0.25 0.5
    --use-exit-norm --use-exit-block true false false false --use-exit-mlp false true true true
    --exit-loss-token-fraction 0.25)
for seed in $SEEDS; do
    mkdir -p "$FOLDER/seed_$seed"
    step "Seed $seed: a model with exits after layers $LEAVING and one that drafts after layer $DRAFTING, and a plain twin"
    echo "(progress: tail -f $FOLDER/seed_$seed/*.log)"
    train exits "$seed" "${EXITS[@]}" &
    [ $AT_ONCE = 2 ] || wait $!
    train twin "$seed"
    wait $!
    grep -h "validation at iteration" "$FOLDER/seed_$seed"/{exits,twin}.log || true

    step "Seed $seed: probes, the certificate, losses, speeds"
    # evaluated TEXT COMMAND FLAGS: the result document FOLDER/seed_SEED/COMMAND.json
    evaluated() {
        local text=$1 output="$FOLDER/seed_$seed/$2.json" && shift
        [ -f "$output" ] || python tools/evaluate.py "$@" --load "$FOLDER/seed_$seed/exits" --output "$output" \
            --data-path "$FOLDER/data/${text}_text_document"
    }
    answers=(--prompt-length 48 --answer-tokens 64)
    evaluated probes probes "${answers[@]}" --prompts $PROBE_PROMPTS
    evaluated held_out calibrate "${answers[@]}" --exit-score probe --prompts "$PROMPTS" --levels 0.9 0.95 0.98 0.99
    evaluated held_out exits --prompts 64 --prompt-length 256 --compare "$FOLDER/seed_$seed/twin"
    evaluated held_out benchmark "${answers[@]}" --prompts 16 --batch 1 8 --rounds 5 --thresholds \
        --draft-sources exit ngram both
done

step "The report, and all seeds together"
reported=() && for seed in $SEEDS; do reported+=("seed_$seed=$FOLDER/seed_$seed"); done
python tools/evaluate.py report --results "${reported[@]}" --output "$FOLDER/report"
python -m benchmarks.demonstrator --folder "$FOLDER" --size "$SIZE"
