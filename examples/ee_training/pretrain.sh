#!/usr/bin/env bash
# Pre-train a Llama with exits. The scripts beside this one set the sizes of known models: SIZES (flags of the model and
# its exits), TP, PP, MICRO_BATCH_SIZE, NNODES and CHECKPOINTS.
#
#   TOKENIZER=DIR DATA="PREFIX" CHECKPOINTS=DIR bash examples/ee_training/7B.sh [more flags]
#   --exits-in-bubbles and --fill-explicit-bubbles use the pipeline's idle time (docs/pipeline_plans.md)
#   several nodes: NNODES=4 NODE_RANK=0..3 MASTER_ADDR=host, the same command on each
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${TOKENIZER:?set TOKENIZER to a tokenizer folder (docs/data.md)}" "${DATA:?set DATA to the prefix of .bin/.idx files}"
: "${SIZES:?start one of the scripts beside this one}" "${CHECKPOINTS:?set CHECKPOINTS to the folder for checkpoints}"
DISTRIBUTED_ARGS=(--nproc_per_node "${GPUS_PER_NODE:-8}" --nnodes "$NNODES" --node_rank "${NODE_RANK:-0}"
    --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-6000}")
export CUDA_DEVICE_MAX_CONNECTIONS=1

# shellcheck disable=SC2086  # SIZES are flags; DATA may be a blend: weight prefix weight prefix
exec torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_early_exit_gpt.py \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --use-distributed-optimizer --overlap-grad-reduce --bf16 $SIZES --seq-length 2048 --max-position-embeddings 2048 \
    --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear \
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 \
    --pre-exit --exit-layer-weight 0.25 0.5 --use-exit-norm --untie-exit-output-weights \
    --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "${GLOBAL_BATCH_SIZE:-2048}" --train-iters 190735 \
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000 \
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5 --clip-grad 1.0 --init-method-std 0.01 \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER" --data-path $DATA --split 990,9,1 \
    --save "$CHECKPOINTS" --load "$CHECKPOINTS" --save-interval 5000 --exit-signal-handler \
    --eval-interval 5000 --eval-iters 10 --log-interval 10 --tensorboard-dir "$CHECKPOINTS/tensorboard" "$@"
