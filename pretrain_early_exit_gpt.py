"""Pre-train a GPT or Llama with early exits.

    torchrun --nproc_per_node 8 pretrain_early_exit_gpt.py --num-layers 24 ... --exit-layer-nums 6 12
    python pretrain_early_exit_gpt.py --config run.yaml          (one process)

All flags: docs/flags.md. Recipes: examples/ee_training/.
"""

import sys

from megatron.early_exit.training.program import run

if __name__ == "__main__":
    sys.exit(run())
