#!/usr/bin/env bash
# Llama-2-70B on two nodes with 8 GPUs: tensor parallel 8, and of 4 stages the two with exits.
#
#   MODEL=DIR DATA=PREFIX bash examples/ee_tuning/llama2_70B_2nodes.sh [more flags]        (DRY_RUN=1 to look first; see tune.sh)
CHECKPOINTS=${CHECKPOINTS:-checkpoints/llama2_70B_2nodes}
EXITS=${EXITS:-20 40}
GPUS_PER_NODE=${GPUS_PER_NODE:-8} NNODES=${NNODES:-2} TP=${TP:-8} PP=${PP:-4} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
source "$(dirname "${BASH_SOURCE[0]}")/tune.sh"
