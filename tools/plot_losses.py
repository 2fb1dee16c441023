#!/usr/bin/env python3
"""Draw the loss curves of one or more runs: tools/plot_losses.py --help."""

import sys

from megatron.early_exit.evaluation.plot_losses import run

if __name__ == "__main__":
    sys.exit(run())
