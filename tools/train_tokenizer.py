#!/usr/bin/env python3
"""Train a byte-level BPE tokenizer: tools/train_tokenizer.py --help."""

import sys

from megatron.early_exit.data.train_tokenizer import run

if __name__ == "__main__":
    sys.exit(run())
