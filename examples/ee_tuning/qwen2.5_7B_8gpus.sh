#!/usr/bin/env bash
# Qwen2.5-7B (28 layers) on 8 GPUs.
#
#   MODEL=DIR DATA=PREFIX bash examples/ee_tuning/qwen2.5_7B_8gpus.sh [more flags]        (DRY_RUN=1 to look first; see tune.sh)
CHECKPOINTS=${CHECKPOINTS:-checkpoints/qwen2.5_7B_8gpus}
EXITS=${EXITS:-7 14}
GPUS_PER_NODE=${GPUS_PER_NODE:-8} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-2}
source "$(dirname "${BASH_SOURCE[0]}")/tune.sh"
