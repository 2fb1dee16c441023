#!/usr/bin/env python3
"""Measure how sure and how right a model's exits are, for cheaper asking: tools/calibrate_exits.py --help."""

import sys

from megatron.early_exit.inference.calibrate_command import main
from megatron.early_exit.platform.command_line import run_program

if __name__ == "__main__":
    sys.exit(run_program(main))
