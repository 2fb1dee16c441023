"""The demonstrator over all its seeds: what a model gains that was trained to exit early, and what that cost, against
its plain twin.

    bash examples/demonstrator/run.sh runs/demonstrator
    python -m benchmarks.demonstrator --folder runs/demonstrator

It reads the result documents of every seed (`seed_N/calibrate.json`, `exits.json`, `benchmark.json`), which the script
has written, and measures nothing itself. A speed-up is the geometric mean over the seeds, each against the full model
of the same weights in the same run; its interval is Student's t over the seeds' logarithms.

The last line is one JSON document, also written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

LEVEL = 0.99
SPEEDUP_GOAL, LOSS_GOAL = {"cpu": 1.3, "gpu": 2.0}, {"cpu": 0.01, "gpu": 0.005}
KINDS = ("calibrate", "exits", "benchmark")


def read_seeds(folder: Path) -> dict[str, dict[str, Any]]:
    """Result documents by seed and kind. Raises ValueError if there are none, or one is missing."""
    seeds = {}
    for path in sorted(folder.glob("seed_*")):
        missing = [kind for kind in KINDS if not (path / f"{kind}.json").is_file()]
        if missing:
            raise ValueError(f"{path} has no {missing[0]}.json; run examples/demonstrator/run.sh to its end")
        seeds[path.name] = {kind: json.loads((path / f"{kind}.json").read_text()) for kind in KINDS}
    if not seeds:
        raise ValueError(f"{folder} has no seed_* folders; run examples/demonstrator/run.sh")
    return seeds


def over_seeds(ratios: Sequence[float]) -> dict[str, Any]:
    """Geometric mean, and its interval where there are several."""
    if len(ratios) < 2:
        return {"ratio": ratios[0], "low": None, "high": None, "of_seeds": list(ratios)}
    return {**common.mean_ratio(ratios, [1.0] * len(ratios)), "of_seeds": list(ratios)}


def of_seed(documents: dict[str, Any]) -> dict[str, Any]:
    """What one seed shows."""
    results = {kind: document["results"] for kind, document in documents.items()}
    final = next(row for row in results["exits"]["heads"] if row["is_final"])
    twin = next(row for row in results["exits"]["compare"][0]["heads"] if row["is_final"])
    used = {str(row["level"]): row for row in results["exits"]["used_heads"]}
    return {
        "loss": final["loss"],
        "twin_loss": twin["loss"],
        "heads": results["exits"]["heads"],
        "used_heads": used,
        "certificates": results["calibrate"]["certificates"],
        "coverage_risk": results["calibrate"]["coverage_risk"],
        "text": results["calibrate"]["text"],
        "rows": results["benchmark"]["rows"],
        "model": documents["exits"]["model"],
        "data": documents["calibrate"]["data"],
    }


def speedups(seeds: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows: each way to decode at each batch size that all seeds have, over the seeds."""
    of_each = [
        {(row["name"], row["batch"]): row for row in seed["rows"] if row["speedup"] is not None}
        for seed in seeds.values()
    ]
    common_keys = [key for key in of_each[0] if all(key in rows for rows in of_each)]
    table = []
    for name, batch in common_keys:
        rows = [of_seed[name, batch] for of_seed in of_each]
        mean = lambda column, rows=rows: _mean([row[column] for row in rows])
        table.append({
            "name": name, "batch": batch, "mode": rows[0]["mode"], "level": rows[0]["level"],
            "speedup": over_seeds([row["speedup"] for row in rows]),
            "layer_run_speedup": mean("layer_run_speedup"), "agreement": mean("agreement"),
            "identical_answers": mean("identical_answers"), "acceptance": mean("acceptance"),
            "loop_rate": mean("loop_rate"),
        })  # fmt: skip
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def goals_of(seeds: dict[str, dict[str, Any]], table: Sequence[dict[str, Any]], size: str) -> dict[str, Any]:
    least, most = SPEEDUP_GOAL[size], LOSS_GOAL[size]
    goals = {}
    for batch in sorted({row["batch"] for row in table}):
        certified = [row for row in table if row["batch"] == batch and row["level"] == LEVEL]
        lossless = [row for row in table if row["batch"] == batch and row["mode"] == "self_speculative"]
        for name, rows in ((f"certified_{LEVEL:g}", certified), ("lossless", lossless)):
            best = max(rows, key=lambda row: row["speedup"]["ratio"], default=None)
            goals[f"{name}_batch_{batch}_at_least_{least}"] = {
                "met": best is not None and best["speedup"]["ratio"] >= least,
                "way": best and best["name"],
                "speedup": best and best["speedup"],
            }
    above = over_seeds([seed["loss"] / seed["twin_loss"] for seed in seeds.values()])
    goals[f"final_loss_within_{most:g}_of_the_twin"] = {"met": above["ratio"] <= 1 + most, "loss_over_twin": above}
    used = [seed["used_heads"].get(f"{LEVEL:g}") for seed in seeds.values()]
    if all(used):
        ratios = over_seeds([row["perplexity_ratio"] for row in used])
        is_met = math.fabs(ratios["ratio"] - 1) <= most
        goals[f"perplexity_of_used_heads_within_{most:g}"] = {"met": is_met, "over_final_head": ratios}
    else:
        goals[f"perplexity_of_used_heads_within_{most:g}"] = {"met": False, "over_final_head": None}
    return goals


def print_table(table: Sequence[dict[str, Any]]) -> None:
    rows = [
        [row["name"], row["batch"], row["speedup"]["ratio"], row["speedup"]["low"], row["speedup"]["high"],
         row["layer_run_speedup"], row["agreement"], row["identical_answers"], row["acceptance"], row["loop_rate"]]
        for row in table
    ]  # fmt: skip
    header = ["way", "batch", "speed-up", "low", "high", "by layer runs", "agreement", "identical", "accepted", "loops"]
    print(common.format_table(header, rows))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="demonstrator", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of examples/demonstrator/run.sh")
    parser.add_argument("--size", choices=tuple(SPEEDUP_GOAL), default="cpu", help="whose goals hold; default cpu")
    parser.add_argument("--output", type=Path, help="of the JSON document; default in benchmarks/results/")
    args = parser.parse_args(argv)
    documents = read_seeds(args.folder)
    seeds = {name: of_seed(one) for name, one in documents.items()}
    table = speedups(seeds)
    print_table(table)
    for name, seed in seeds.items():
        print(f"{name}: held-out loss {seed['loss']:.4f}, of the plain twin {seed['twin_loss']:.4f}")
    goals = goals_of(seeds, table, args.size)
    for name, goal in goals.items():
        print(f"{name}: {'met' if goal['met'] else 'missed'}")
    first = next(iter(documents.values()))
    settings = {"size": args.size, "seeds": list(seeds), **first["benchmark"]["settings"], "device": _device(args.size)}
    document = common.result_document(
        f"demonstrator_{args.size}", first["benchmark"]["machine"], settings, first["benchmark"]["settings"]["seed"],
        {"speedups": table, "seeds": seeds}, goals,
    )  # fmt: skip
    common.finish(document, args.output)


def _device(size: str) -> str:
    return "cuda" if size == "gpu" else "cpu"


if __name__ == "__main__":
    main()
