#!/usr/bin/env bash
# A small model on a CPU, in fp32.
#
#   CHECKPOINTS=DIR bash examples/ee_inference/cpu.sh [more flags; see serve.sh]
export CUDA_VISIBLE_DEVICES=""
source "$(dirname "${BASH_SOURCE[0]}")/serve.sh" --dtype fp32 --max-requests "${MAX_REQUESTS:-8}" "$@"
