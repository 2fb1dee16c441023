#!/usr/bin/env python3
"""Write Python's standard library as a JSONL corpus: tools/stdlib_corpus.py --help."""

import sys

from megatron.early_exit.data.corpus import main
from megatron.early_exit.platform.command_line import run_program

if __name__ == "__main__":
    sys.exit(run_program(main))
