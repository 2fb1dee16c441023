#!/usr/bin/env bash
# Pipeline stages on four GPUs, for slow links: a token that leaves at the first stage waits for no other.
#
#   CHECKPOINTS=DIR bash examples/ee_inference/pp4.sh [more flags; see serve.sh]
PP=${PP:-4}
source "$(dirname "${BASH_SOURCE[0]}")/serve.sh" --dtype bf16 "$@"
