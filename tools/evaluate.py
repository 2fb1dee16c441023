#!/usr/bin/env python3
"""What a model's exits are worth, and thresholds with a guarantee: tools/evaluate.py --help."""

import sys

from megatron.early_exit.evaluation.command_line import run

if __name__ == "__main__":
    sys.exit(run())
