#!/usr/bin/env bash
# A stage on each of two machines of eight GPUs, which share its layers: run it on both, NODE_RANK 0 serves.
#
#   CHECKPOINTS=DIR NODE_RANK=0..1 MASTER_ADDR=host bash examples/ee_inference/2nodes.sh [more flags; see serve.sh]
#   on Slurm: CHECKPOINTS=DIR HOST=0.0.0.0 sbatch --nodes 2 examples/slurm/run.sbatch examples/ee_inference/2nodes.sh
TP=${TP:-8} PP=${PP:-2} NNODES=${NNODES:-2}
source "$(dirname "${BASH_SOURCE[0]}")/serve.sh" --dtype bf16 "$@"
