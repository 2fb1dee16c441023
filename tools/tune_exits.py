#!/usr/bin/env python3
"""From a model to tuned exits, in one command that goes on where it stopped: tools/tune_exits.py --help."""

import sys

from megatron.early_exit.tuning.command_line import run

if __name__ == "__main__":
    sys.exit(run())
