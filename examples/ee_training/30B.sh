#!/usr/bin/env bash
# Pre-train a 30B Llama with exits at a quarter and half of its depth; by default on sixteen nodes with 8 GPUs each.
#
#   TOKENIZER=DIR DATA="PREFIX" CHECKPOINTS=DIR bash examples/ee_training/30B.sh [more flags]
#   several nodes: NNODES=16 NODE_RANK=0..15 MASTER_ADDR=host, the same command on each
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${TOKENIZER:?set TOKENIZER to a tokenizer folder (docs/data.md)}" "${DATA:?set DATA to the prefix of .bin/.idx files}"
CHECKPOINTS=${CHECKPOINTS:-checkpoints/30B}
TP=${TP:-4} PP=${PP:-4} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-2048}
DISTRIBUTED_ARGS=(--nproc_per_node "${GPUS_PER_NODE:-8}" --nnodes "${NNODES:-16}" --node_rank "${NODE_RANK:-0}"
    --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-6000}")
export CUDA_DEVICE_MAX_CONNECTIONS=1

# shellcheck disable=SC2086  # DATA may be a blend: weight prefix weight prefix
exec torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_early_exit_gpt.py \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --bf16 \
    --num-layers 60 --hidden-size 6656 --ffn-hidden-size 17920 --num-attention-heads 52 --seq-length 2048 --max-position-embeddings 2048 \
    --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear \
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 \
    --pre-exit --exit-layer-nums 16 31 --exit-layer-weight 0.25 0.5 --use-exit-norm --untie-exit-output-weights \
    --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --train-iters 190735 \
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000 \
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5 --clip-grad 1.0 --init-method-std 0.01 \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" --data-path $DATA --split 990,9,1 \
    --save "$CHECKPOINTS" --load "$CHECKPOINTS" --save-interval 5000 --exit-signal-handler \
    --eval-interval 5000 --eval-iters 10 --log-interval 10 --tensorboard-dir "$CHECKPOINTS/tensorboard" "$@"
