#!/usr/bin/env python3
"""From and to Hugging Face, from EE-LLM, add and remove exits, inspect: tools/convert_checkpoint.py --help."""

import sys

from megatron.early_exit.checkpoint.convert_command import main
from megatron.early_exit.platform.command_line import run_program

if __name__ == "__main__":
    sys.exit(run_program(main))
