#!/usr/bin/env python3
"""Continue prompts with a trained early-exit model: tools/generate.py --help."""

import sys

from megatron.early_exit.inference.command_line import main
from megatron.early_exit.platform.command_line import run_program

if __name__ == "__main__":
    sys.exit(run_program(main))
