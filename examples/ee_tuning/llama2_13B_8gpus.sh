#!/usr/bin/env bash
# Llama-2-13B on 8 GPUs: of 4 stages the two with exits run, on 4 replicas.
#
#   MODEL=DIR DATA=PREFIX bash examples/ee_tuning/llama2_13B_8gpus.sh [more flags]        (DRY_RUN=1 to look first; see tune.sh)
CHECKPOINTS=${CHECKPOINTS:-checkpoints/llama2_13B_8gpus}
EXITS=${EXITS:-10 20}
GPUS_PER_NODE=${GPUS_PER_NODE:-8} PP=${PP:-4}
source "$(dirname "${BASH_SOURCE[0]}")/tune.sh"
