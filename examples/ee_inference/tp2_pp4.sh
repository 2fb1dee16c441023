#!/usr/bin/env bash
# Four stages of two GPUs each, on one machine of eight.
#
#   CHECKPOINTS=DIR bash examples/ee_inference/tp2_pp4.sh [more flags; see serve.sh]
TP=${TP:-2} PP=${PP:-4}
source "$(dirname "${BASH_SOURCE[0]}")/serve.sh" --dtype bf16 "$@"
