"""python -m megatron.early_exit.evaluation.lm_eval"""

import sys

from megatron.early_exit.evaluation.lm_eval.command_line import run

if __name__ == "__main__":
    sys.exit(run())
