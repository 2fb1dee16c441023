#!/usr/bin/env bash
# A model that fits one GPU; bf16, with CUDA graphs.
#
#   CHECKPOINTS=DIR bash examples/ee_inference/1gpu.sh [more flags; see serve.sh]
source "$(dirname "${BASH_SOURCE[0]}")/serve.sh" --dtype bf16 "$@"
