#!/usr/bin/env bash
# EE-Tuning on two CPU cores: a real model (SmolLM2-135M, from a package of the Python registry), converted, given exits,
# tuned on real text, compared before and after, and written back as a model of Hugging Face transformers.
#
#   make demo-tune       or, in an environment where the package is installed:  bash examples/demo_tune.sh FOLDER
#   ITERATIONS=400 make demo-tune       tunes for longer; run it again to go on after an interruption
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-runs/demo-tune}
ITERATIONS=${ITERATIONS:-100}
mkdir -p "$FOLDER"
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false

step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

if [ ! -f "$FOLDER/base/latest_checkpointed_iteration.txt" ]; then
    step "1/6 SmolLM2-135M-Instruct (93 MB), converted from its GGUF file"
    python -m benchmarks.smollm2 --output "$FOLDER/gguf"
    python tools/convert_checkpoint.py from-hf --input "$FOLDER/gguf" --save "$FOLDER/base"
fi
if [ ! -f "$FOLDER/exits/latest_checkpointed_iteration.txt" ]; then
    step "2/6 Exits after layers 10 and 20 of 30: MLP branches, copied from the layers they stand beside"
    python tools/convert_checkpoint.py add-exits --load "$FOLDER/base" --save "$FOLDER/exits" \
        --exit-layer-nums 10 20 --use-exit-norm --use-exit-mlp
fi
if [ ! -f "$FOLDER/data/held_out_text_document.idx" ]; then
    step "3/6 Text: documentation and sources of Python's standard library, the last documents held out"
    python tools/stdlib_corpus.py --output "$FOLDER/corpus.jsonl"
    head -n -40 "$FOLDER/corpus.jsonl" > "$FOLDER/train.jsonl"
    tail -n 40 "$FOLDER/corpus.jsonl" > "$FOLDER/held_out.jsonl"
    for part in train held_out; do
        python tools/preprocess_data.py --input "$FOLDER/$part.jsonl" --output-prefix "$FOLDER/data/$part" \
            --tokenizer-model "$FOLDER/base/iter_0000000/tokenizer" --append-eod --workers 2 --overwrite
    done
fi

step "4/6 Tuning the exits alone: layers 21 to 30 are not even built"
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 --master_port "${MASTER_PORT:-29534}" pretrain_early_exit_gpt.py \
    --tune-exit --pretrained-checkpoint "$FOLDER/exits" --use-checkpoint-args \
    --load "$FOLDER/tuned" --save "$FOLDER/tuned" --save-interval 40 --keep-last 2 --exit-signal-handler \
    --seq-length 128 --micro-batch-size 2 --global-batch-size 8 --train-iters "$ITERATIONS" \
    --lr 5e-3 --min-lr 5e-4 --lr-decay-style cosine --lr-warmup-iters 5 --adam-beta2 0.95 \
    --data-path "$FOLDER/data/train_text_document" --data-cache-path "$FOLDER/data/cache" --split 98,2,0 \
    --num-workers 0 --eval-interval 40 --eval-iters 2 --log-interval 5
python tools/plot_losses.py "$FOLDER/tuned/metrics.jsonl" --output "$FOLDER/losses.png"

step "5/6 Before and after, on text that was held out"
HELD_OUT="$FOLDER/data/held_out_text_document"
python tools/evaluate.py exits --load "$FOLDER/tuned" --compare "$FOLDER/exits" --data-path "$HELD_OUT" \
    --prompts 8 --prompt-length 128 --output "$FOLDER/exits.json"
python tools/evaluate.py sweep --load "$FOLDER/tuned" --data-path "$HELD_OUT" --prompts 4 --answer-tokens 32 --rounds 2 \
    --thresholds 0.9 0.6 --exits together --draft-lengths 4 --output "$FOLDER/sweep.json"

step "6/6 Back to Hugging Face transformers: the layers are the original's"
python tools/convert_checkpoint.py to-hf --load "$FOLDER/tuned" --output "$FOLDER/huggingface" --force
python - "$FOLDER/huggingface" <<'END'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0]))
END

cat <<END

Done. In $FOLDER: tuned/ (the model with its exits), losses.png, exits.json, sweep.json, huggingface/. Talk to it:
    python tools/generate.py --load $FOLDER/tuned --chat --use-early-exit --early-exit-thres 0.8
END
