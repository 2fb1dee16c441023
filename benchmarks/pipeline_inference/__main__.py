"""Measures, compares, reports."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import common, pipeline_inference
from benchmarks.pipeline_inference.compare import compare, goals
from benchmarks.pipeline_inference.measure import Setup, measure
from benchmarks.pipeline_inference.report import print_report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=pipeline_inference.__doc__.partition("\n")[0])
    options: list[tuple[str, Callable[[str], Any], str]] = [
        ("num_stages", int, "pipeline stages"), ("alpha", float, "seconds of a pass"), ("beta", float, "and of a row"),
        ("head", float, "seconds of a head"), ("acceptance", float, "of drafts"), ("rounds", int, "of all cases"),
        ("seconds", float, "of a case"), ("collectives", float, "share of a layer's time on one device"),
    ]  # fmt: skip
    for name, kind, text in options:
        default = getattr(Setup, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{text}; default {default}"
        )
    parser.add_argument(
        "--shares", type=float, nargs="+", default=Setup.shares, help="of tokens that leave at each stage"
    )
    parser.add_argument("--num-requests", type=int, nargs="+", default=Setup.num_requests)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: a file in benchmarks/results")
    args = vars(parser.parse_args(argv))
    output = args.pop("output")
    args["shares"], args["num_requests"] = tuple(args["shares"]), tuple(args["num_requests"])
    setup, machine = Setup(**args), common.machine_info()
    results = compare(setup, measure(setup))
    verdicts = goals(results["summary"], results["simulated_speculation"])
    print_report(results, verdicts)
    settings = asdict(setup) | {"niceness": os.nice(0)}
    document = common.result_document("pipeline_inference", machine, settings, setup.seed, results, verdicts)
    common.finish(document, output)


if __name__ == "__main__":
    main()
