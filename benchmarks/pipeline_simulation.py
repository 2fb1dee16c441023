"""What exits cost a pipeline, by simulation: EE-LLM's models and a 70B and a 405B model, against plain GPT.

    python -m benchmarks.pipeline_simulation

No GPU takes part. Times come from FLOPs and bytes over data-sheet figures (schedules/cost_model.py); the cases stand in
pipeline/cases.py. Prints ratios, ends with one line of JSON and writes it to results/pipeline_simulation_DATE.json.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import common
from megatron.early_exit.model import sizes
from megatron.early_exit.schedules.cases import CASES, setup_of_case
from megatron.early_exit.schedules.comparison import FREE, Setup, compare
from megatron.early_exit.schedules.planner import choose

TIME_LIMIT, MEMORY_LIMIT = 0.01, 0.0
"""Of what exits may add to plain GPT's iteration, and to its fullest rank."""
EE_LLM_MODELS = ("1.3B", "7B", "13B", "30B")
TENSOR_PARALLEL_SIZES = (1, 2, 4)


def all_cases() -> dict[str, Setup]:
    """EE-LLM's models under TP 1, 2 and 4 (the data-parallel size and the microbatches follow), the others as named."""
    setups = {}
    for name in CASES:
        if name not in EE_LLM_MODELS:
            setups[name] = setup_of_case(name)
            continue
        for size in TENSOR_PARALLEL_SIZES:
            sequence_parallel = "--sequence-parallel" if size > 1 else "--no-sequence-parallel"
            flags = ["--tensor-model-parallel-size", str(size), sequence_parallel]
            setups[f"{name} TP {size}"] = setup_of_case(name, flags)
    return setups


def measure(setup: Setup) -> dict[str, Any]:
    """One row: the variants' times and memory against plain GPT's, and what the planner chooses."""
    plain, in_backward, in_idle_time, filled = compare(setup)
    choice = choose(setup)
    added = lambda variant: variant.iteration_sec / plain.iteration_sec - 1
    config, parallel = setup.config, setup.config.parallel
    vocab_size = config.description.padded_vocab_size
    of_layers = config.model.num_layers * sizes.layer_flops_per_token(config)
    flops = of_layers + sizes.output_flops_per_token(config, vocab_size)
    of_exits = sum(sizes.exit_flops_per_token(config, index, vocab_size) for index in range(config.exits.num_exits))
    tokens = config.training.global_batch_size * config.training.seq_length
    idle = lambda variant: [variant.timeline.idle_share(rank) for rank in range(setup.num_ranks)]
    return {
        "gpus": setup.world_size, "gpu": setup.gpu.name, "tp": parallel.tensor_model_parallel_size,
        "pp": setup.num_ranks, "dp": parallel.data_parallel_size(setup.world_size),
        "num_microbatches": setup.num_microbatches, "micro_batch_size": config.training.micro_batch_size,
        "layers_per_stage": list(setup.layers_per_stage), "exit_layer_nums": list(config.exits.exit_layer_nums),
        "pre_exit": config.exits.pre_exit,
        "costs": [asdict(cost) for cost in setup.costs],
        "plain_sec": plain.iteration_sec,
        "plain_mfu": flops * tokens / plain.iteration_sec / setup.world_size / setup.gpu.peak_flops_per_sec,
        "added_flops_share": of_exits / flops,
        "time_added_in_backward": added(in_backward),
        "time_added_in_idle_time": added(in_idle_time),
        "time_added_filled": added(filled),
        "fill": [filled.plan.num_fill_warmup, filled.plan.num_fill_cooldown],
        "idle_share_plain": idle(plain), "idle_share_in_idle_time": idle(in_idle_time),
        "idle_share_filled": idle(filled),
        "peak_bytes_plain": plain.peak_bytes, "peak_bytes_in_idle_time": in_idle_time.peak_bytes,
        "peak_bytes_filled": filled.peak_bytes,
        "memory_added": max(in_idle_time.peak_bytes) / max(plain.peak_bytes) - 1,
        "fits": max(in_idle_time.peak_bytes) <= setup.gpu.memory_bytes,
        "chosen_layers_per_stage": list(choice.setup.layers_per_stage),
        "chosen_exit_layer_nums": list(choice.setup.config.exits.exit_layer_nums),
        "chosen_pre_exit": choice.setup.config.exits.pre_exit,
        "time_added_chosen": choice.time_overhead,
        "memory_added_chosen": choice.memory_overhead,
        "reasons": list(choice.reasons),
    }  # fmt: skip


def goals(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    def verdict(name: str, limit: float) -> dict[str, Any]:
        checks = [
            {"case": case, name: row[name], "limit": limit, "met": row[name] <= limit + 1e-9}
            for case, row in rows.items()
        ]
        return {"met": all(check["met"] for check in checks), "checks": checks}

    return {
        "exits in idle time add at most 1% to the iteration": verdict("time_added_in_idle_time", TIME_LIMIT),
        "exits add nothing to the fullest rank's memory": verdict("memory_added", MEMORY_LIMIT),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--no-write", action="store_true", help="print the document only")
    args = parser.parse_args()
    setups = all_cases()
    rows = {}
    for name, setup in setups.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows[name] = measure(setup)
    percent = lambda value: f"{value:+.2%}"
    header = [
        "case", "GPUs", "DP", "microbatches", "plain s", "MFU", "FLOPs", "in backward", "in idle time", "filled",
        "fill", "GiB", "memory", "fits", "chosen",
    ]  # fmt: skip
    table = [
        [
            name, row["gpus"], row["dp"], row["num_microbatches"], f"{row['plain_sec']:.2f}", f"{row['plain_mfu']:.0%}",
            percent(row["added_flops_share"]), percent(row["time_added_in_backward"]),
            percent(row["time_added_in_idle_time"]),
            percent(row["time_added_filled"]), f"{row['fill'][0]} + {row['fill'][1]}",
            f"{max(row['peak_bytes_plain']) / 2**30:.1f}", percent(row["memory_added"]), row["fits"],
            percent(row["time_added_chosen"]),
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    print(common.format_table(header, table))
    verdicts = goals(rows)
    print("\n" + common.goals_table(verdicts))
    for name, one in verdicts.items():
        missed = [f"{check['case']}" for check in one["checks"] if not check["met"]]
        if missed:
            print(f"not met ({name}): {', '.join(missed)}")
    assumptions = asdict(next(iter(setups.values())).assumptions)
    cases = {name: asdict(case) for name, case in CASES.items()}
    settings = {"assumptions": assumptions, "free_share": FREE, "cases": cases}
    document = common.result_document(
        "pipeline_simulation", {"cpu": "simulation"}, settings, 0, {"rows": rows}, verdicts
    )
    output = args.output or common.RESULTS / f"pipeline_simulation_{document['date'][:10]}.json"
    common.finish(document, output, is_written=not args.no_write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
