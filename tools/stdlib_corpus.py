#!/usr/bin/env python3
"""Write Python's standard library as a JSONL corpus: tools/stdlib_corpus.py --help."""

import sys

from megatron.early_exit.data.corpus import run

if __name__ == "__main__":
    sys.exit(run())
