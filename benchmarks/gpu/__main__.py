"""Runs one part of the GPU measurements, or shows the results so far. `benchmarks/gpu.sh` says how it is used."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from benchmarks import common
from benchmarks.gpu.record import Record, table

PART_SECONDS = 480
"""Longest that a part takes, its installation included (s)."""

RESERVE_SECONDS = 60
"""No case is begun with less time left than this: the longest takes about as long (s)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["tests", "training", "decoding", "table"])
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder")
    parser.add_argument("--started", type=float, default=time.time(), help="when the part began (s since 1970)")
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help="longest time from then")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--toy", action="store_true", help="tiny models: shows that everything runs")
    arguments = parser.parse_args()
    if arguments.part == "table":
        return show(arguments.results)
    return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Measure one part. Returns 1 if a case failed, or if there is no GPU."""
    import torch

    if not arguments.toy and not torch.cuda.is_available():
        print("no CUDA device is visible; --toy shows on any machine that everything runs", file=sys.stderr)
        return 1
    from benchmarks.gpu import decoding, gpu_tests, training

    settings = {"toy": arguments.toy, "device": "cuda" if torch.cuda.is_available() else "cpu", "seed": 1234}
    deadline = arguments.started + arguments.seconds - RESERVE_SECONDS
    record = Record(arguments.part, arguments.results, settings, deadline, arguments.again)
    measure = {"tests": gpu_tests.measure, "training": training.measure, "decoding": decoding.measure}[arguments.part]
    measure(record, is_toy=arguments.toy)
    print(f"\n{table(record.document)}\n\nwritten to {record.path}")
    if record.left_out:
        print(f"no time was left for: {', '.join(record.left_out)}; the same command goes on with them")
    return int(any("error" in row or row.get("failed") for row in record.rows.values()))


def show(results: Path) -> int:
    """Print the tables of all results in the folder."""
    for path in sorted(results.glob("gpu_*.json")):
        document = json.loads(path.read_text())
        print(f"{path.name} ({document['date']}, commit {document['commit']})\n\n{table(document)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
