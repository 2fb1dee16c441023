"""Twenty seconds of what no client should do: `benchmarks/serving_abuse.py`, shortly."""

from __future__ import annotations

from pathlib import Path

from benchmarks.serving_abuse import run_abuse
from benchmarks.serving_abusers import ABUSERS


def test_abuse_leaves_nothing_behind(checkpoint: Path) -> None:
    # In so short a time memory has hardly settled: threads take some at first. The long form bounds it closely.
    results, goals = run_abuse(str(checkpoint), seconds=20.0, seed=1, growth_mib=128.0)
    assert results["bad_requests"].keys() == {abuser.__name__ for abuser in ABUSERS}  # there was time for all kinds
    assert {name: goal for name, goal in goals.items() if not goal["met"]} == {}
