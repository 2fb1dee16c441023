#!/usr/bin/env bash
# Llama-2-7B on one GPU: exits at a quarter and half of its 32 layers; layers 17 to 32 are never loaded.
#
#   MODEL=DIR DATA=PREFIX bash examples/ee_tuning/llama2_7B_1gpu.sh [more flags]        (DRY_RUN=1 to look first; see tune.sh)
CHECKPOINTS=${CHECKPOINTS:-checkpoints/llama2_7B_1gpu}
EXITS=${EXITS:-8 16}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-2}
source "$(dirname "${BASH_SOURCE[0]}")/tune.sh"
