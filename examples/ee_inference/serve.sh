#!/usr/bin/env bash
# A text-generation server over a checkpoint, on one machine or several. The scripts beside this one set the variables
# for common layouts. The checkpoint says what model and tokenizer it has; any layout serves any checkpoint.
#
#   CHECKPOINTS=DIR bash examples/ee_inference/serve.sh [more flags of tools/run_text_generation_server.py]
#   TP=2 PP=4 ... ranks that share each stage, and stages (docs/pipeline_inference.md says when which pays)
#   several nodes: NNODES=2 NODE_RANK=0..1 MASTER_ADDR=host, the same command on each, CHECKPOINTS on a shared file system;
#   node 0 serves
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${CHECKPOINTS:?set CHECKPOINTS to the folder of checkpoints (--save of the training, or a converted one)}"
TP=${TP:-1} PP=${PP:-1} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
export CUDA_DEVICE_MAX_CONNECTIONS=1

# HOST=0.0.0.0 lets other machines in: give --api-key-file then, or put a gateway in front (docs/serving_behind_gateways.md).
FLAGS=(--load "$CHECKPOINTS" --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
    --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --mode "${MODE:-early_exit}")
if [ "${MODE:-early_exit}" = early_exit ]; then
    FLAGS+=(--early-exit-thres "${THRESHOLD:-0.8}")
fi

if [ "$NNODES" = 1 ]; then  # it starts its ranks itself
    exec python tools/run_text_generation_server.py "${FLAGS[@]}" "$@"
fi
if [ $((TP * PP % NNODES)) != 0 ]; then
    echo "TP=$TP times PP=$PP ranks cannot be spread evenly over NNODES=$NNODES" >&2
    exit 2
fi
exec torchrun --nproc_per_node $((TP * PP / NNODES)) --nnodes "$NNODES" --node_rank "$NODE_RANK" \
    --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-6000}" \
    tools/run_text_generation_server.py "${FLAGS[@]}" "$@"
