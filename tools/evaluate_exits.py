#!/usr/bin/env python3
"""How good a model's exits are, and what early exit brings: tools/evaluate_exits.py --help."""

import sys

from megatron.early_exit.evaluation.evaluate_command import main
from megatron.early_exit.platform.command_line import run_program

if __name__ == "__main__":
    sys.exit(run_program(main))
