#!/usr/bin/env bash
# Pre-train a 13B Llama with exits at a quarter and half of its depth; by default on eight nodes with 8 GPUs each.
#
#   TOKENIZER=DIR DATA="PREFIX" bash examples/ee_training/13B.sh [more flags]        (see pretrain.sh)
CHECKPOINTS=${CHECKPOINTS:-checkpoints/13B}
TP=${TP:-2} PP=${PP:-4} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-2} NNODES=${NNODES:-8}
SIZES="--sequence-parallel --num-layers 40 --hidden-size 5120 --ffn-hidden-size 13824 --num-attention-heads 40 --exit-layer-nums 11 21"
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"
