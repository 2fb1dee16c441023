#!/usr/bin/env bash
# Pre-train a 7B Llama with exits at a quarter and half of its depth; by default on four nodes with 8 GPUs each.
#
#   TOKENIZER=DIR DATA="PREFIX" bash examples/ee_training/7B.sh [more flags]        (see pretrain.sh)
CHECKPOINTS=${CHECKPOINTS:-checkpoints/7B}
TP=${TP:-2} PP=${PP:-4} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-2} NNODES=${NNODES:-4}
SIZES="--sequence-parallel --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 --exit-layer-nums 9 17"
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"
