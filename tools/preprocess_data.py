#!/usr/bin/env python3
"""Tokenize JSONL or plain text into .bin/.idx files: tools/preprocess_data.py --help."""

import sys

from megatron.early_exit.data.preprocess import run

# Worker processes may import this file again, so nothing runs without the guard.
if __name__ == "__main__":
    sys.exit(run())
