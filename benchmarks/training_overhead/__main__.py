"""Measures one layout after the other, compares, reports."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import common, training_overhead
from benchmarks.ranks import run_on_ranks
from benchmarks.training_overhead.compare import compare, compare_memory, goals
from benchmarks.training_overhead.measure import measure_layout
from benchmarks.training_overhead.report import print_report
from benchmarks.training_overhead.settings import QUICK, Settings, problems
from megatron.early_exit.platform.device import use_cuda


def parse_arguments(arguments: list[str] | None = None) -> tuple[Settings, Path | None, bool]:
    """(settings, where to write the result or None for the default place, whether not to write it at all)"""
    parser = argparse.ArgumentParser(
        description=training_overhead.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small model and few rounds: shows that everything runs")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    for name in ("vocab-size", "exits", "pipeline-model-parallel-size", "seq-length"):
        parser.add_argument(f"--{name}", type=int, nargs="+", help="one or more; see Settings")
    for name in ("num-layers", "hidden-size", "num-attention-heads", "micro-batch-size", "num-microbatches",
                 "iterations", "warmup-iterations", "threads-per-rank", "seed"):  # fmt: skip
        parser.add_argument(f"--{name}", type=int)
    for name in ("pre-exit", "use-exit-norm", "use-exit-mlp", "use-exit-block", "untie-exit-output-weights",
                 "untie-embeddings-and-output-weights", "bf16"):  # fmt: skip
        parser.add_argument(f"--{name}", action="store_true", default=None)
    parser.add_argument("--transformer-impl", choices=["local", "transformer_engine"])
    parser.add_argument("--output", type=Path, help="JSON file. Default: benchmarks/results/NAME_MACHINE_DATE.json, "
                        "and none with --quick")  # fmt: skip
    given = vars(parser.parse_args(arguments))
    is_quick, output = given.pop("quick"), given.pop("output")
    if given["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # inherited by the ranks
    if given["device"] == "cuda" and not use_cuda():
        parser.error("--device is cuda, but this process sees no GPU; use --device cpu.")
    given["device"] = "cuda" if use_cuda() else "cpu"
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    settings = replace(
        QUICK if is_quick else Settings(), **{key: value for key, value in given.items() if value is not None}
    )
    if issues := problems(settings):
        parser.error("\n".join(issues))
    return settings, output, output is None and is_quick


def main() -> int:
    settings, output, is_not_written = parse_arguments()
    machine = common.machine_info()  # with the load before the run
    comparisons, memory, cases = [], [], []
    for num_stages in settings.pipeline_model_parallel_size:
        if settings.device == "cuda" and num_stages > torch.cuda.device_count():
            print(f"PP {num_stages} skipped: it needs as many GPUs, this machine has {torch.cuda.device_count()}.")
            continue
        measured = run_on_ranks(
            num_stages, measure_layout, settings, num_stages, threads_per_rank=settings.threads_per_rank
        )
        cases += measured["cases"]
        comparisons += [
            compare(settings, case, num_exits)
            for case in measured["cases"]
            for num_exits in settings.exits_with(case["vocab_size"])
        ]
        memory += [compare_memory(settings, row) for row in measured["memory"]]
    if not comparisons:
        print("Nothing was measured: no layout fits this machine.", file=sys.stderr)
        return 1
    verdicts = goals(settings, comparisons, memory, machine["cpu_cores"])
    print_report(comparisons, memory, verdicts)
    results = {"comparisons": comparisons, "memory": memory, "raw": cases}
    document = common.result_document("training_overhead", machine, asdict(settings), settings.seed, results, verdicts)
    common.finish(document, output, is_written=not is_not_written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
