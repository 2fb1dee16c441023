#!/usr/bin/env bash
# Pre-train a 1.3B Llama with exits at a quarter and half of its depth; by default on one node with 8 GPUs.
#
#   TOKENIZER=DIR DATA="PREFIX" bash examples/ee_training/1.3B.sh [more flags]        (see pretrain.sh)
CHECKPOINTS=${CHECKPOINTS:-checkpoints/1.3B}
TP=${TP:-1} PP=${PP:-4} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4} NNODES=${NNODES:-1}
SIZES="--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --exit-layer-nums 7 13"
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"
