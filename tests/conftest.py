"""Shared by all tests."""

from __future__ import annotations

import multiprocessing
import os
import signal

# Two cores, many processes: one thread each, and no warning for every rank that Apex is missing.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

# Programs that the tests start inherit what is ignored here: Ctrl-C in a background job, SIGHUP under nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_sessionfinish() -> None:
    """End processes that tests left: those that load data ignore SIGTERM, and Python would wait for them at exit."""
    for child in multiprocessing.active_children():
        child.kill()
