#!/usr/bin/env python3
"""Simulate a pipeline with early exits, draw it and write its plan: tools/plan_pipeline.py --help."""

import sys

from megatron.early_exit.schedules.plan_command import run

if __name__ == "__main__":
    sys.exit(run())
