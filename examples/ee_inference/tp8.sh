#!/usr/bin/env bash
# The GPUs of one machine share every layer: the fastest answers where they have a fast link (NVLink).
#
#   CHECKPOINTS=DIR bash examples/ee_inference/tp8.sh [more flags; see serve.sh]
TP=${TP:-8}
source "$(dirname "${BASH_SOURCE[0]}")/serve.sh" --dtype bf16 "$@"
