#!/usr/bin/env python3
"""From and to Hugging Face, from EE-LLM, add and remove exits, inspect: tools/convert_checkpoint.py --help."""

import sys

from megatron.early_exit.checkpoint.convert_command import run

if __name__ == "__main__":
    sys.exit(run())
