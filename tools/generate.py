#!/usr/bin/env python3
"""Continue prompts with a trained early-exit model: tools/generate.py --help."""

import sys

from megatron.early_exit.inference.command_line import run

if __name__ == "__main__":
    sys.exit(run())
