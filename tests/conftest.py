"""Shared by all tests."""

from __future__ import annotations

import os
import signal

# Two cores, many processes: one thread each, and no warning for every rank that Apex is missing.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

# Programs that the tests start inherit what is ignored here: Ctrl-C in a background job, SIGHUP under nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
