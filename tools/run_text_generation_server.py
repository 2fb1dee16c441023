#!/usr/bin/env python3
"""Serve an early-exit model over HTTP: tools/run_text_generation_server.py --help."""

import sys

from megatron.early_exit.server.command_line import run

if __name__ == "__main__":
    sys.exit(run())
