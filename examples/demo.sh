#!/usr/bin/env bash
# The whole way on two CPU cores: real text (the sources and documentation of Python's standard library), a tokenizer,
# .bin/.idx files, pre-training over a 2-stage pipeline with two exits, generation with early exit.
#
#   make demo            or, in an environment where the package is installed:  bash examples/demo.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-runs/demo}
mkdir -p "$FOLDER"
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false

step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

if [ ! -f "$FOLDER/data/stdlib_text_document.idx" ]; then
    step "1/5 Text: sources and documentation of Python's standard library"
    python tools/stdlib_corpus.py --output "$FOLDER/corpus.jsonl"
    step "2/5 Tokenizer: byte-level BPE, 4096 ids"
    python tools/train_tokenizer.py --input "$FOLDER/corpus.jsonl" --output "$FOLDER/tokenizer" --vocab-size 4096 --overwrite
    step "3/5 Preprocessing to .bin/.idx"
    python tools/preprocess_data.py --input "$FOLDER/corpus.jsonl" --output-prefix "$FOLDER/data/stdlib" \
        --tokenizer-model "$FOLDER/tokenizer" --append-eod --workers 2 --overwrite
fi

step "4/5 Pre-training: 8 layers, exits after layers 2 and 4, two pipeline stages"
torchrun --nproc_per_node 2 --master_port "${MASTER_PORT:-29533}" pretrain_early_exit_gpt.py \
    --config examples/demo.yaml --pipeline-model-parallel-size 2 \
    --exit-layer-nums 2 4 --exit-layer-weight 0.25 0.5 --use-exit-norm \
    --tokenizer-model "$FOLDER/tokenizer" --data-path "$FOLDER/data/stdlib_text_document" \
    --data-cache-path "$FOLDER/data/cache" \
    --save "$FOLDER/checkpoints" --load "$FOLDER/checkpoints" --save-interval 100 --keep-last 2 --exit-signal-handler
python tools/plot_losses.py "$FOLDER/checkpoints/metrics.jsonl" --output "$FOLDER/losses.png"

step "5/5 Generation: first with all layers, then with early exit"
PROMPT='import os
import sys

def main():
    '
generate=(python tools/generate.py --load "$FOLDER/checkpoints" --prompt "$PROMPT" --tokens-to-generate 96
    --temperature 0.7 --seed 1)
"${generate[@]}"
"${generate[@]}" --use-early-exit --early-exit-thres 0.4

cat <<END

Done. In $FOLDER: losses.png (the losses of all exits), checkpoints/ (run the demo again to resume after an interruption),
checkpoints/metrics.jsonl (all numbers). Try another prompt or threshold:
    python tools/generate.py --load $FOLDER/checkpoints --prompt 'import os' --use-early-exit --early-exit-thres 0.5
END
