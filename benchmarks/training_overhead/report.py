"""Tables of what was compared."""

from __future__ import annotations

from typing import Any

from benchmarks import common


def mib(num_bytes: int) -> str:
    return f"{num_bytes / common.MIB:.1f}"


def time_table(comparisons: list[dict[str, Any]]) -> str:
    return common.table_of(comparisons, {
        "PP": "num_stages",
        "vocabulary": "vocab_size",
        "exits": "num_exits",
        "FLOPs added": "added_flops_share",
        "time added": "added_time_share",
        "time/FLOPs": "added_time_over_added_flops",
        "naive": "naive_added_time_share",
        "CPU added": "added_cpu_time_share",
        "naive CPU": "naive_added_cpu_time_share",
        "core head": "core_head_added_time_share",
    })  # fmt: skip


def memory_table(rows: list[dict[str, Any]]) -> str:
    header = ["PP", "stage", "vocabulary", "exits here", "sequence", "microbatches", "extra", "bound", "extra/bound",
              "naive extra"]  # fmt: skip
    cells = [
        [
            row["num_stages"], index, row["vocab_size"], stage["num_exits"], row["seq_length"], row["num_microbatches"],
            mib(stage["extra_bytes"]), mib(stage["bound_bytes"]), stage["extra_bytes"] / stage["bound_bytes"],
            mib(stage["naive_extra_bytes"]),
        ]
        for row in rows
        for index, stage in enumerate(row["stages"])
        if stage["num_exits"]
    ]  # fmt: skip
    return common.format_table(header, cells)


def print_report(comparisons: list[dict[str, Any]], memory: list[dict[str, Any]], verdicts: dict[str, Any]) -> None:
    print("\nTime of an iteration over that of plain GPT (0.100: 10% longer), and the FLOPs that the exits add\n")
    print(time_table(comparisons))
    print("\nPeak of tensors over that of plain GPT, per stage with exits (MiB, without parameters and their state)\n")
    print(memory_table(comparisons))
    print("\nThe same over sequence length and microbatches\n")
    print(memory_table(memory))
    print("\nGoals\n")
    print(common.goals_table(verdicts))
    print(flush=True)
