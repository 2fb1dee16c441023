"""Measures the parts that are asked for, compares, reports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import common, token_fraction
from benchmarks.ranks import run_on_ranks
from benchmarks.token_fraction.compare import compare_time, compare_variance, goals
from benchmarks.token_fraction.measure import measure_losses, measure_time, measure_variance
from benchmarks.token_fraction.report import print_report
from benchmarks.token_fraction.settings import PARTS, QUICK, Settings
from megatron.early_exit.platform.device import use_cuda


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=token_fraction.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="small and few: shows that everything runs")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="what `make demo` has made")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/token_fraction"), help="folder of the runs from scratch"
    )
    for name in ("rounds", "batches", "draws", "train-iters"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--fractions", type=float, nargs="+", help="below 1; default: 0.5 0.25")
    parser.add_argument("--output", type=Path, help="JSON file. Default: benchmarks/results/NAME_MACHINE_DATE.json, "
                        "and none with --quick")  # fmt: skip
    given = parser.parse_args(arguments)
    names = ("parts", "rounds", "batches", "draws", "train_iters", "seeds")
    changes = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    settings = replace(QUICK if given.quick else Settings(), device="cuda" if use_cuda() else "cpu", **changes)
    if given.fractions:
        if not all(0 < fraction < 1 for fraction in given.fractions):
            parser.error(f"--fractions {given.fractions}: each lies between 0 and 1")
        settings = replace(settings, fractions=(1.0, *given.fractions))
    for name, least in (("rounds", 2), ("batches", 2), ("draws", 1), ("train_iters", 2)):
        if getattr(settings, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(settings, name)}: at least {least}")
    tokenizer = given.demo / "tokenizer"
    if set(settings.parts) != {"time"} and not tokenizer.is_dir():
        parser.error(f"--demo {given.demo}: no {tokenizer}; run `make demo` first, or use --parts time")
    return settings, given


def main() -> int:
    settings, given = parse_arguments()
    machine = common.machine_info()  # with the load before the run
    results: dict[str, Any] = {}
    given.work.mkdir(parents=True, exist_ok=True)
    if "time" in settings.parts:
        results["seconds"] = run_on_ranks(1, measure_time, settings)
        results["time"] = compare_time(settings, results["seconds"])
    if "variance" in settings.parts:
        results["gradients"] = run_on_ranks(1, measure_variance, settings, given.demo, given.work)
        results["variance"] = compare_variance(results["gradients"])
    if "losses" in settings.parts:
        results["losses"] = measure_losses(settings, given.demo, given.work)
    verdicts = goals(settings, results)
    print_report(results, verdicts)
    name = "token_fraction" if settings.parts == PARTS else f"token_fraction_{'-'.join(settings.parts)}"
    document = common.result_document(name, machine, asdict(settings), settings.seeds[0], results, verdicts)
    common.finish(document, given.output, is_written=given.output is not None or not given.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
