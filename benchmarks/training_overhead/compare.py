"""What the measurements mean: ratios to plain GPT and to naive exits, bounds, goals."""

from __future__ import annotations

from typing import Any

from benchmarks import common, flops
from benchmarks.training_overhead.settings import Settings, run_config

LOSS_TOLERANCE = 1e-4
"""Largest relative difference of losses and gradient norm between variants that must compute the same."""

SCALARS_BYTES = 4096
"""Loss scales and the like that any iteration may hold; below this a difference in memory is none."""

TOKEN_BYTES = 64
"""Labels, mask, loss, sums and scales of one token while an exit's loss is computed: vectors beside its logits, which
take 4 bytes times the vocabulary. Part of the bound."""


def extra_bound_bytes(settings: Settings, case: dict[str, Any], num_exits: int) -> int:
    """What exits may add to the peak of a stage that owns `num_exits` of them: one chunk of logits and one weight
    gradient, however many exits (bytes)."""
    if num_exits == 0:
        return SCALARS_BYTES
    elements = (case["chunk_tokens"] + settings.hidden_size) * case["vocab_size"]
    tokens = settings.micro_batch_size * case["seq_length"]
    return elements * (4 + 2 if settings.bf16 else 4) + TOKEN_BYTES * tokens + SCALARS_BYTES


def compare(settings: Settings, case: dict[str, Any], num_exits: int) -> dict[str, Any]:
    """The ratios of one case with `num_exits` exits."""
    config = run_config(settings, case["num_stages"], num_exits)
    measured = case["variants"]
    plain, ee, naive = measured["plain"], measured[f"ee_{num_exits}"], measured[f"naive_{num_exits}"]
    added_flops = flops.added_flops_share(config.model, config.exits, case["vocab_size"], case["seq_length"])
    added_time = common.median_ratio(ee["wall_sec"], plain["wall_sec"]) - 1
    stages = [
        {
            "extra_bytes": e["peak_bytes"] - p["peak_bytes"],
            "naive_extra_bytes": n["peak_bytes"] - p["peak_bytes"],
            "bound_bytes": extra_bound_bytes(settings, case, e["num_exits"]),
            "exit_parameter_bytes": e["parameter_bytes"] - p["parameter_bytes"],
            "exit_gradient_bytes": e["gradient_bytes"] - p["gradient_bytes"],
            "num_exits": e["num_exits"],
        }
        for p, e, n in zip(plain["stages"], ee["stages"], naive["stages"], strict=True)
    ]
    return {
        **{key: case[key] for key in ("vocab_size", "num_stages", "seq_length", "num_microbatches")},
        "num_exits": num_exits,
        "exits_on_first_stage": ee["stages"][0]["num_exits"],
        "added_flops_share": added_flops,
        "added_time_share": added_time,
        "added_time_over_added_flops": common.ratio(added_time, added_flops),
        "naive_added_time_share": common.median_ratio(naive["wall_sec"], plain["wall_sec"]) - 1,
        "added_cpu_time_share": common.median_ratio(ee["cpu_sec"], plain["cpu_sec"]) - 1,
        "naive_added_cpu_time_share": common.median_ratio(naive["cpu_sec"], plain["cpu_sec"]) - 1,
        "core_head_added_time_share": common.median_ratio(measured["core"]["wall_sec"], plain["wall_sec"]) - 1,
        "largest_difference_to_naive": largest_difference(ee, naive),
        "stages": stages,
    }


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest relative difference of losses and gradient norm between two variants with equal weights."""
    pairs = zip([*one["losses"], one["grad_norm"]], [*other["losses"], other["grad_norm"]], strict=True)
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def compare_memory(settings: Settings, row: dict[str, Any]) -> dict[str, Any]:
    """Extra memory of one row of `measure_memory`."""
    stages = [
        {
            "plain_bytes": stage["plain"],
            "extra_bytes": stage["ee"] - stage["plain"],
            "naive_extra_bytes": stage["naive"] - stage["plain"],
            "bound_bytes": extra_bound_bytes(settings, row, stage["num_exits"]),
            "microbatches_in_flight": min(row["num_stages"] - index, row["num_microbatches"]),
            "num_exits": stage["num_exits"],
        }
        for index, stage in enumerate(row["stages"])
    ]
    return {**row, "stages": stages}


def goals(
    settings: Settings, comparisons: list[dict[str, Any]], memory: list[dict[str, Any]], cpu_cores: int
) -> dict[str, Any]:
    """Verdicts: true, false, or null where this run did not measure it."""
    single = [one for one in comparisons if one["num_stages"] == 1]
    double = [
        one
        for one in comparisons
        if one["num_stages"] == 2
        and one["num_exits"] == one["exits_on_first_stage"] == 1
        and one["num_microbatches"] >= 8
        and (settings.device == "cuda" or (settings.threads_per_rank == 1 and cpu_cores >= 2))
    ]
    memory_checks = [
        {
            **{key: row[key] for key in ("vocab_size", "num_stages", "num_exits", "seq_length", "num_microbatches")},
            "stage": index,
            "extra_bytes": stage["extra_bytes"],
            "limit_bytes": stage["bound_bytes"],
            "met": stage["extra_bytes"] <= stage["bound_bytes"],
        }
        for row in [*comparisons, *memory]
        for index, stage in enumerate(row["stages"])
    ]
    same = [one["largest_difference_to_naive"] for one in comparisons]
    return {
        "same_losses_and_gradients_as_naive": {
            "met": max(same) <= LOSS_TOLERANCE, "largest_difference": max(same), "limit": LOSS_TOLERANCE,
        },
        "time_added_at_pp1_within_added_flops": _time_goal(single, 1.0),
        "time_added_at_pp2_below_half_of_added_flops": _time_goal(double, 0.5),
        "extra_memory_within_one_chunk_and_one_weight_gradient": common.verdict(memory_checks),
    }  # fmt: skip


def _time_goal(comparisons: list[dict[str, Any]], factor: float) -> dict[str, Any]:
    checks = [
        {
            **{key: one[key] for key in ("vocab_size", "num_exits", "num_microbatches")},
            "added_time_share": one["added_time_share"],
            "limit": factor * one["added_flops_share"],
            "met": one["added_time_share"] <= factor * one["added_flops_share"],
        }
        for one in comparisons
    ]
    return common.verdict(checks)
