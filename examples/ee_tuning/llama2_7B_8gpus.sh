#!/usr/bin/env bash
# Llama-2-7B on 8 GPUs, as eight replicas.
#
#   MODEL=DIR DATA=PREFIX bash examples/ee_tuning/llama2_7B_8gpus.sh [more flags]        (DRY_RUN=1 to look first; see tune.sh)
CHECKPOINTS=${CHECKPOINTS:-checkpoints/llama2_7B_8gpus}
EXITS=${EXITS:-8 16}
GPUS_PER_NODE=${GPUS_PER_NODE:-8} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-2}
source "$(dirname "${BASH_SOURCE[0]}")/tune.sh"
