"""The tests that only a GPU can run, as one row: how many passed, failed and were skipped, and which failed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks import common
from benchmarks.gpu.record import Record

_TIMEOUT_SECONDS = 400


def measure(record: Record, is_toy: bool) -> None:
    """Each file of tests/gpu is a case."""
    for path in sorted((common.ROOT / "tests" / "gpu").glob("test_*.py")):
        if record.wants(path.stem):
            record.add(path.stem, _run(path))
            record.finish(path.stem)


def _run(path: Path) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(path), "-q", f"--junitxml={report}", "-p", "no:cacheprovider"]
        try:
            subprocess.run(command, cwd=common.ROOT, timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return {"error": f"did not end in {_TIMEOUT_SECONDS} s"}
        return _counts(report)


def _counts(report: Path) -> dict:
    if not report.exists():
        return {"error": "pytest wrote no report"}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    number = lambda key: int(suite.get(key, 0))
    failed, skipped = number("failures") + number("errors"), number("skipped")
    names = [
        case.get("name")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "passed": number("tests") - failed - skipped, "failed": failed, "skipped": skipped,
        "seconds": float(suite.get("time", 0)), "failed_tests": names,
    }  # fmt: skip
