"""Tables of what was compared."""

from __future__ import annotations

from typing import Any

from benchmarks import common


def print_report(results: dict[str, Any], verdicts: dict[str, Any]) -> None:
    if "time" in results:
        print("\nTime that two exits add to an iteration, over that of plain GPT and over that of fraction 1\n")
        print(common.table_of(results["time"], {
            "head": "head", "fraction": "fraction", "added / plain": "added_time_over_plain",
            "of fraction 1": "share_of_added_time", "of its FLOPs": "share_of_added_flops",
        }))  # fmt: skip
    if "variance" in results:
        print("\nVariance of the gradient by drawing tokens, over that between batches\n")
        rows = [[f"{row['fraction']:g}", row["draw_over_batch_variance"]] for row in results["variance"]]
        print(common.format_table(["fraction", "draw / batch"], rows))
    if "losses" in results:
        print("\nLosses over held-out text (nats per token), all tokens\n")
        names = [name for name in results["losses"][0] if "loss" in name]
        rows = [
            ["plain" if row["fraction"] is None else f"{row['fraction']:g}", row["seed"], *(row.get(n) for n in names)]
            for row in results["losses"]
        ]
        print(common.format_table(["fraction", "seed", *names], rows))
    print("\nGoals\n")
    print(common.goals_table(verdicts))
    print(flush=True)
