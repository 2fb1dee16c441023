"""Tables of what was compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.pipeline_inference.compare import median_costs


def print_report(results: dict[str, Any], verdicts: dict[str, Any]) -> None:
    """results: as of `compare`"""
    costs = median_costs(results["raw"], "full")
    print("milliseconds beside passes: " + ", ".join(
        f"{name} {1000 * getattr(costs, name):.2f}" for name in ("head", "hop", "turn")
    ))  # fmt: skip
    print(_summary_table(results["summary"]) + "\n")
    print("simulated, over full passes")
    for name in ("simulated_pipelines", "simulated_row_costs", "simulated_speculation"):
        print(_whole_table(results[name]) + "\n")
    print("seconds of a token of one request, by formula")
    print(_whole_table(results["tensor_parallel_by_formula"]) + "\n")
    print(common.goals_table(verdicts) + "\n")


def _summary_table(summary: Sequence[dict[str, Any]]) -> str:
    header = ["case", "requests", "tokens/s", "over full", "range", "over formula", "range", "bound", "over simulated",
              "pausing"]  # fmt: skip
    return common.format_table(header, [
        [row["case"], row["requests"], f"{row['tokens_per_second']:.1f}", row["over_full"],
         "{:.2f}-{:.2f}".format(*row["over_full_range"]), row["over_formula"],
         "{:.2f}-{:.2f}".format(*row["over_formula_range"]), row["is_bound"], row["over_simulated"],
         row["over_simulated_pausing"]]
        for row in summary
    ])  # fmt: skip


def _whole_table(rows: Sequence[dict[str, Any]]) -> str:
    return common.table_of(rows, list(rows[0]))
