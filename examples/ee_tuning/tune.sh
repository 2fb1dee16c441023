#!/usr/bin/env bash
# EE-Tuning of a Llama-like model from Hugging Face: convert it, add exits, tune them. What each step has made is kept,
# so running it again goes on where it stopped. The scripts beside this one set the variables for known models.
#
#   MODEL=DIR DATA=PREFIX CHECKPOINTS=DIR EXITS="8 16" bash examples/ee_tuning/tune.sh [more flags of the training]
#   DRY_RUN=1 ... prints layout, parameters and memory instead of training
#   several nodes: NNODES=2 NODE_RANK=0..1 MASTER_ADDR=host, the same command on each, CHECKPOINTS on a shared file system
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${MODEL:?set MODEL to the folder of the Hugging Face model}" "${DATA:?set DATA to the prefix of .bin/.idx files}"
: "${EXITS:?set EXITS to the layers that get exits}" "${CHECKPOINTS:?set CHECKPOINTS to the folder for checkpoints}"
# The head of each exit (tools/convert_checkpoint.py add-exits --help), and how it begins.
HEAD=${HEAD:---use-exit-norm --use-exit-mlp} INIT=${INIT:-copy}
# PP counts the stages of the whole model; only those up to the last exit run.
TP=${TP:-1} PP=${PP:-1} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-16}
SEQ_LENGTH=${SEQ_LENGTH:-2048} ITERATIONS=${ITERATIONS:-40000} LR=${LR:-1e-4}
GPUS_PER_NODE=${GPUS_PER_NODE:-1} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
export CUDA_DEVICE_MAX_CONNECTIONS=1

if [ "$NODE_RANK" = 0 ]; then
    if [ ! -f "$CHECKPOINTS/base/latest_checkpointed_iteration.txt" ]; then
        python tools/convert_checkpoint.py from-hf --input "$MODEL" --save "$CHECKPOINTS/base" --dtype bf16 \
            --tensor-model-parallel-size "$TP"
    fi
    if [ ! -f "$CHECKPOINTS/exits/latest_checkpointed_iteration.txt" ]; then
        # shellcheck disable=SC2086  # several layers, several flags
        python tools/convert_checkpoint.py add-exits --load "$CHECKPOINTS/base" --save "$CHECKPOINTS/exits" \
            --exit-layer-nums $EXITS $HEAD --init "$INIT"
    fi
else
    until [ -f "$CHECKPOINTS/exits/latest_checkpointed_iteration.txt" ]; do sleep 5; done
fi

FLAGS=(--tune-exit --pretrained-checkpoint "$CHECKPOINTS/exits" --use-checkpoint-args
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --sequence-parallel
    --use-distributed-optimizer --bf16 --seq-length "$SEQ_LENGTH"
    --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --train-iters "$ITERATIONS"
    --lr "$LR" --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-fraction 0.01 --weight-decay 0.1
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5 --clip-grad 1.0 --split 990,9,1
    --save "$CHECKPOINTS/tuned" --load "$CHECKPOINTS/tuned" --save-interval 2000 --keep-last 3 --exit-signal-handler
    --eval-interval 2000 --eval-iters 10 --log-interval 20 --tensorboard-dir "$CHECKPOINTS/tensorboard")

if [ -n "${DRY_RUN:-}" ]; then
    # shellcheck disable=SC2086  # DATA may be a blend: weight prefix weight prefix
    WORLD_SIZE=$((GPUS_PER_NODE * NNODES)) exec python pretrain_early_exit_gpt.py "${FLAGS[@]}" --data-path $DATA \
        --dry-run "$@"
fi
# shellcheck disable=SC2086
exec torchrun --nproc_per_node "$GPUS_PER_NODE" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-6000}" \
    pretrain_early_exit_gpt.py "${FLAGS[@]}" --data-path $DATA "$@"
