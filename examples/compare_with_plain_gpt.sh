#!/usr/bin/env bash
# Does training with exits cost the final exit anything? The demo's model with exits and as a plain GPT: same size, same
# data, same seed. Needs the data of `make demo`.
#
#   bash examples/compare_with_plain_gpt.sh FOLDER_OF_DEMO [more flags for both runs]
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-runs/demo}
shift || true
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
run() {
    local name=$1
    shift
    torchrun --nproc_per_node 2 --master_port "${MASTER_PORT:-29534}" pretrain_early_exit_gpt.py \
        --config examples/demo.yaml --pipeline-model-parallel-size 2 \
        --tokenizer-model "$FOLDER/tokenizer" --data-path "$FOLDER/data/stdlib_text_document" \
        --data-cache-path "$FOLDER/data/cache" --metrics-file "$FOLDER/compare/$name.jsonl" "$@"
}
mkdir -p "$FOLDER/compare"
rm -f "$FOLDER"/compare/*.jsonl
run plain_gpt "$@"
run early_exit --exit-layer-nums 2 4 --exit-layer-weight 0.25 0.5 --use-exit-norm "$@"
python tools/plot_losses.py "early-exit GPT=$FOLDER/compare/early_exit.jsonl" "plain GPT=$FOLDER/compare/plain_gpt.jsonl" \
    --output "$FOLDER/compare/losses.png"
