"""Measures the parts that are asked for, and reports."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, decode
from benchmarks.decode.measure_checkpoint import measure_early_exit, measure_speculative, measure_throughput
from benchmarks.decode.measure_smollm2 import (
    SMOLLM2_EXIT,
    measure_assisted,
    measure_full,
    measure_heads,
    measure_overhead,
)
from benchmarks.decode.models import Checkpoint, SmolLM2
from benchmarks.decode.report import goals, print_report
from megatron.early_exit.platform.device import use_cuda

PARTS = ("full", "overhead", "heads", "assisted", "early_exit", "speculative", "throughput")


def main() -> int:
    parser = argparse.ArgumentParser(description=decode.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smollm2", type=Path, default=Path("runs/smollm2"), metavar="DIR")
    parser.add_argument("--load", metavar="DIR", help="checkpoint with exits; without it those parts are left out")
    parser.add_argument("--data-path", metavar="PREFIX", help="text to continue, .bin/.idx")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's")
    parser.add_argument("--output", type=Path)
    settings = parser.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    parts = list(settings.parts)
    if not settings.load:
        parts = [part for part in parts if part not in ("early_exit", "speculative", "throughput")]
    elif not settings.data_path:
        parser.error("--load needs --data-path: the text that is continued")
    machine = common.machine_info()
    results: dict[str, list[dict[str, Any]]] = {}
    if set(parts) & {"full", "overhead", "heads", "assisted"}:
        smol = SmolLM2(settings.smollm2, (SMOLLM2_EXIT,))
        measures = {
            "full": measure_full, "overhead": measure_overhead, "heads": measure_heads, "assisted": measure_assisted,
        }  # fmt: skip
        results |= {part: measures[part](smol, settings) for part in parts if part in measures}
        del smol
    if set(parts) & {"early_exit", "speculative", "throughput"}:
        model = Checkpoint(settings.load)
        measures = {
            "early_exit": measure_early_exit, "speculative": measure_speculative, "throughput": measure_throughput,
        }  # fmt: skip
        results |= {part: measures[part](model, settings) for part in parts if part in measures}
    verdicts = goals(results)
    print_report(results, verdicts)
    described = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
        "parts": parts,
        "device": "cuda" if use_cuda() else "cpu",
        "threads": torch.get_num_threads(),
    }
    document = common.result_document("decode", machine, described, 0, results, verdicts)
    common.finish(document, settings.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
