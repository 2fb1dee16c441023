"""Shared by all tests."""

from __future__ import annotations

import os

# Two cores, many processes: one thread each, and no warning for every rank that Apex is missing.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
