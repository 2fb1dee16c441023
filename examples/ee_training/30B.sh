#!/usr/bin/env bash
# Pre-train a 30B Llama with exits at a quarter and half of its depth; by default on sixteen nodes with 8 GPUs each.
#
#   TOKENIZER=DIR DATA="PREFIX" bash examples/ee_training/30B.sh [more flags]        (see pretrain.sh)
CHECKPOINTS=${CHECKPOINTS:-checkpoints/30B}
TP=${TP:-4} PP=${PP:-4} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1} NNODES=${NNODES:-16}
SIZES="--sequence-parallel --num-layers 60 --hidden-size 6656 --ffn-hidden-size 17920 --num-attention-heads 52 --exit-layer-nums 16 31"
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"
