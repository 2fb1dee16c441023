#!/usr/bin/env bash
# Llama-3-8B on 8 GPUs. Its vocabulary of 128k makes the heads a fifth of the work.
#
#   MODEL=DIR DATA=PREFIX bash examples/ee_tuning/llama3_8B_8gpus.sh [more flags]        (DRY_RUN=1 to look first; see tune.sh)
CHECKPOINTS=${CHECKPOINTS:-checkpoints/llama3_8B_8gpus}
EXITS=${EXITS:-8 16}
GPUS_PER_NODE=${GPUS_PER_NODE:-8} SEQ_LENGTH=${SEQ_LENGTH:-4096} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
source "$(dirname "${BASH_SOURCE[0]}")/tune.sh"
