"""Goals, and tables of all parts."""

from __future__ import annotations

from typing import Any

from benchmarks import common


def goals(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    verdicts = {}

    def verdict(name: str, checks: list[dict[str, Any]]) -> None:
        verdicts[name] = common.verdict(checks)

    limits = {("fp32", 1): 1.4, ("fp32", 16): 1.3, ("int8", 1): 2.5}
    verdict("speedup over transformers", [
        {"kind": r["kind"], "batch": r["batch"], "speedup": r["speedup"], "limit": limits[r["kind"], r["batch"]],
         "met": r["speedup"] >= limits[r["kind"], r["batch"]]}
        for r in results.get("full", []) if (r["kind"], r["batch"]) in limits
    ])  # fmt: skip
    verdict("fp32 tokens are those of transformers", [
        {"batch": r["batch"], "same_tokens": r["same_tokens"], "met": r["same_tokens"] == 1.0}
        for r in results.get("full", []) if r["kind"] == "fp32"
    ])  # fmt: skip
    verdict("85% of the best kernel alone at batch 1", [
        {"kind": r["kind"], "share": r["share_of_best_kernel"], "met": r["share_of_best_kernel"] >= 0.85}
        for r in results.get("overhead", []) if r["batch"] == 1
    ])  # fmt: skip
    verdict("eight rows cost at most 1.3 times one row", [
        {"head_ms": [one["full_ms"], eight["full_ms"]], "layer_ms": [one["layer_ms"], eight["layer_ms"]],
         "met": max(eight["full_ms"] / one["full_ms"], eight["layer_ms"] / one["layer_ms"]) <= 1.3}
        for one in results.get("heads", []) for eight in results["heads"] if (one["rows"], eight["rows"]) == (1, 8)
    ])  # fmt: skip
    verdict("planned exits are at most 3% slower than the full model", [
        {"variant": r["variant"], "speedup": r["speedup"], "met": r["speedup"] >= 0.97}
        for r in results.get("early_exit", []) if r["variant"].startswith("planned")
    ])  # fmt: skip
    verdict("self-speculation gives the full model's tokens", [
        {"variant": r["variant"], "met": r["same_tokens"]}
        for r in results.get("speculative", []) if r["mode"] == "self_speculative"
    ])  # fmt: skip
    return verdicts


def print_report(results: dict[str, list[dict[str, Any]]], verdicts: dict[str, Any]) -> None:
    for part, rows in results.items():
        columns = [
            name for name, value in rows[0].items() if not name.startswith("raw") and not isinstance(value, list)
        ]
        cells = [[str(row[columns[0]]), *(row[name] for name in columns[1:])] for row in rows]
        print(f"\n{part}\n\n{common.format_table(columns, cells)}")
    print("\nGoals\n\n" + common.goals_table(verdicts))
