"""What the measurements mean: shares of time and of variance, goals."""

from __future__ import annotations

from typing import Any

from benchmarks import common, flops
from benchmarks.token_fraction.settings import HEADS, Settings, exits_of, fractions_of, variant_name
from megatron.early_exit.config.model import ModelConfig

SHARE_TOLERANCE = 1.15
"""The time that exits add at fraction f is at most this times f of what they add at 1, where it is all the head's."""

LOSS_TOLERANCE = 0.01
"""The final head's held-out loss at a fraction is at most so much (relative) above that at fraction 1."""


def compare_time(settings: Settings, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row for each kind of head and fraction."""
    rows = []
    for head in HEADS:
        added = {
            fraction: [
                with_exits - plain
                for with_exits, plain in zip(seconds[variant_name(head, fraction)], seconds["plain"], strict=True)
            ]
            for fraction in settings.fractions
        }
        for fraction in settings.fractions:
            shares = sorted(part / whole for part, whole in zip(added[fraction], added[1.0], strict=True))
            rows.append({
                "head": head,
                "fraction": fraction,
                "iteration_sec": common.median(seconds[variant_name(head, fraction)]),
                "added_time_over_plain": common.median_ratio(added[fraction], seconds["plain"]),
                "share_of_added_time": common.median(shares),
                "share_quartiles": [shares[len(shares) // 4], shares[-1 - len(shares) // 4]],
                "share_of_added_flops": share_of_flops(settings, head, fraction),
            })  # fmt: skip
    return rows


def share_of_flops(settings: Settings, head: str, fraction: float) -> float:
    """FLOPs of an exit at this fraction over those at 1: the output projection's shrink."""
    kind = exits_of(settings, head, fraction).head_of(0)
    projection = 6 * settings.hidden_size * settings.vocab_size
    model = ModelConfig(settings.num_layers, settings.hidden_size, settings.num_attention_heads, swiglu=True)
    branch = flops.exit_flops_per_token(model, kind, settings.vocab_size, settings.seq_length) - projection
    return (fraction * projection + branch) / (projection + branch)


def compare_variance(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each fraction. Drawing a fraction f of many tokens has a variance in proportion to (1 - f) / f."""
    rows = []
    for fraction, found in measured["squared_distances"].items():
        mean = sum(found) / len(found)
        rows.append({
            "fraction": float(fraction),
            "draw_variance": mean,
            "draw_over_batch_variance": mean / measured["batch_variance"],
            "over_1_minus_f_by_f": mean / ((1 - float(fraction)) / float(fraction)),
        })  # fmt: skip
    return rows


def goals(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    """Verdicts: true, false, or null where this run did not measure it."""
    shares = [row for row in results.get("time", []) if row["head"] == "norm" and row["fraction"] < 1]
    time_checks = [
        {
            "fraction": row["fraction"],
            "share_of_added_time": row["share_of_added_time"],
            "limit": SHARE_TOLERANCE * row["fraction"],
            "met": row["share_of_added_time"] <= SHARE_TOLERANCE * row["fraction"],
        }
        for row in shares
    ]
    final = {(row["fraction"], row["seed"]): row["lm_loss"] for row in results.get("losses", [])}

    def loss_checks(baseline: float | None) -> list[dict[str, Any]]:
        """baseline: fraction of the runs that the others are compared with; None: plain GPT."""
        checks = []
        for fraction in fractions_of(settings) if final else ():
            ratios = [final[fraction, seed] / final[baseline, seed] - 1 for seed in settings.seeds]
            worse = sum(ratios) / len(ratios)
            checks.append({
                "fraction": fraction, "mean_relative_increase": worse, "of_seeds": ratios, "limit": LOSS_TOLERANCE,
                "met": worse <= LOSS_TOLERANCE,
            })  # fmt: skip
        return checks

    return {
        "time_added_by_the_head_is_the_fraction": common.verdict(time_checks),
        "final_head_is_not_worse_than_at_fraction_1": common.verdict(loss_checks(1.0)),
        "final_head_is_not_worse_than_of_plain_gpt": common.verdict(loss_checks(None)),
    }
