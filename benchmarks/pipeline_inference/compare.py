"""What comes of the measurements: ratios to full passes and to formulas, pipelines of other lengths, goals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import common
from benchmarks.pipeline_inference import formulas
from benchmarks.pipeline_inference.formulas import Costs
from benchmarks.pipeline_inference.measure import Setup
from benchmarks.pipeline_inference.simulation import Mode, Outcome, Setting, simulate

SIMULATED_TOKENS = 1000
"""Of one request; of more, a third of it each."""


def compare(setup: Setup, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All results, by name. rows: as of `measure`"""
    costs, tp_costs = median_costs(rows, "full"), median_costs(rows, "tp_full")
    return {
        "summary": summarise(rows),
        "raw": rows,
        "simulated_pipelines": simulate_pipelines(setup, costs),
        "simulated_row_costs": simulate_row_costs(setup, costs),
        "simulated_speculation": simulate_speculation(costs),
        "tensor_parallel_by_formula": tensor_parallel_table(setup, costs, tp_costs),
    }


def median_costs(rows: Sequence[dict[str, Any]], case: str) -> Costs:
    """Of all rounds."""
    measured = [row["costs"] for row in rows if row["case"] == case]
    return Costs(**{name: statistics.median(one[name] for one in measured) for name in measured[0]})


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over rounds, by case and requests; ratios are of one round's pair."""
    by_key: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_key.setdefault((row["requests"], row["case"]), {})[row["round"]] = row
    summary = []
    for (requests, case), mine in by_key.items():
        baseline = by_key[requests, "full"]
        over_full = [row["tokens_per_second"] / baseline[number]["tokens_per_second"] for number, row in mine.items()]
        over_formula = [row["tokens_per_second"] / row["formula"] for row in mine.values()]
        over = lambda name: common.median([row["tokens_per_second"] / row[name] for row in mine.values() if row[name]])
        summary.append({
            "case": case, "requests": requests,
            "tokens_per_second": common.median([row["tokens_per_second"] for row in mine.values()]),
            "over_full": common.median(over_full), "over_full_range": [min(over_full), max(over_full)],
            "over_formula": common.median(over_formula), "over_formula_range": [min(over_formula), max(over_formula)],
            "is_bound": next(iter(mine.values()))["is_bound"],
            "over_simulated": over("simulated"), "over_simulated_pausing": over("simulated_pausing"),
            "acceptance": statistics.fmean(row["acceptance"] for row in mine.values()),
        })  # fmt: skip
    return summary


def simulate_pipelines(setup: Setup, costs: Costs) -> list[dict[str, Any]]:
    """Pipelines of 2, 4 and 8 stages, with the costs of one stage as measured."""
    return [
        _simulated_row(setup, costs, stages, requests) for stages in (2, 4, 8) for requests in (1, 4, 16)
    ]  # fmt: skip


def simulate_row_costs(setup: Setup, costs: Costs) -> list[dict[str, Any]]:
    """Four stages, by what a row costs beside a pass: from where weights are read to where arithmetic counts."""
    return [
        {"beta_over_alpha": share} | _simulated_row(setup, replace(costs, beta=share * costs.alpha), 4, requests)
        for share in (0.005, 0.1, 0.5, 2.0)
        for requests in (4, 16)
    ]


def _simulated_row(setup: Setup, costs: Costs, stages: int, requests: int) -> dict[str, Any]:
    """Tokens per second, over those of full passes."""
    shares, num_tokens = _spread(setup.shares, stages), SIMULATED_TOKENS if requests == 1 else SIMULATED_TOKENS // 3

    def run(mode: Mode, **changes: Any) -> Outcome:
        setting = Setting(mode, stages, requests, costs, shares, setup.acceptance, setup.draft_length)
        return simulate(replace(setting, **changes), num_tokens)

    full, exits, pause = run("full").tokens_per_time, run("early_exit"), 1.1 * costs.turn
    speeds = {
        "early_exit": exits,
        "early_exit_pausing": run("early_exit", pause=pause),
        "draft_then_verify": run("draft_then_verify"),
        "across_stages": run("across_stages"),
        "across_stages_pausing": run("across_stages", pause=pause),
    }
    row: dict[str, Any] = {"stages": stages, "requests": requests, "full_tokens_per_second": full}
    row["early_exit_bound"] = formulas.exit_throughput(costs, exits.shares, requests) / full
    return row | {name: outcome.tokens_per_time / full for name, outcome in speeds.items()}


def _spread(shares: Sequence[float], num_stages: int) -> tuple[float, ...]:
    """The same shares by depth, with more or fewer stages."""
    if num_stages >= len(shares):
        each = num_stages // len(shares)
        return tuple(share / each for share in shares for _ in range(each))
    each = len(shares) // num_stages
    return tuple(sum(shares[first : first + each]) for first in range(0, len(shares), each))


def simulate_speculation(costs: Costs) -> list[dict[str, Any]]:
    """One request beside P / (a + P (1 - a)): without hops and heads, and with those that were measured."""
    rows = []
    for stages, acceptance in ((2, 0.8), (4, 0.8), (8, 0.8), (8, 0.94)):
        row: dict[str, Any] = {"stages": stages, "acceptance": acceptance}
        for name, one in (("bare", Costs(costs.alpha, 0.0)), ("measured", costs)):
            outcome = simulate(Setting("across_stages", stages, 1, one, acceptance=acceptance), 2 * SIMULATED_TOKENS)
            full = formulas.full_token(one, stages)
            expected = full / formulas.speculation_token(one, stages, outcome.acceptance)
            if name == "bare":
                expected = formulas.speculation_speedup(stages, outcome.acceptance)
            row[f"{name}_speedup"], row[f"{name}_formula"] = outcome.tokens_per_time * full, expected
        rows.append(row)
    return rows


def tensor_parallel_table(setup: Setup, costs: Costs, tp_costs: Costs) -> list[dict[str, float]]:
    """Milliseconds of a token of one request, by what collectives cost: formulas alone."""
    full, exits = formulas.full_token(costs, setup.num_stages), formulas.exit_token(costs, setup.shares)
    rows = []
    for collectives in (0.05, 0.2, 0.5, 1.0):
        stated = formulas.tensor_parallel(Costs(setup.alpha, setup.beta, setup.head), setup.num_stages, collectives)
        token = replace(stated, head=tp_costs.head, turn=tp_costs.turn).token(1)
        rows.append({"collectives": collectives, "tp": token, "pipeline_full": full, "pipeline_early_exit": exits})
    return rows


def goals(summary: Sequence[dict[str, Any]], speculation: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_key = {(row["case"], row["requests"]): row for row in summary}
    exits, across = by_key.get(("early_exit", 1)), by_key.get(("across_stages", 1))
    exact = [row for row in summary if not row["is_bound"]]
    beside = [{"case": row["case"], "requests": row["requests"], "over_formula": row["over_formula"]} for row in exact]
    of_bounds = [
        {name: row[name] for name in ("case", "requests", "over_simulated", "over_simulated_pausing")}
        for row in summary if row["is_bound"]
    ]  # fmt: skip
    long = [row["bare_speedup"] / row["bare_formula"] for row in speculation if row["stages"] == 8]
    return {
        "early exits of one request at least 2.2 times as fast": {
            "met": exits and exits["over_full"] >= 2.2, "over_full": exits and exits["over_full"],
        },
        "speculation across stages at least 0.9 of its formula": {
            "met": across and across["over_formula"] >= 0.9, "over_formula": across and across["over_formula"],
        },
        "within 10% of the formula": {
            "met": all(abs(row["over_formula"] - 1) <= 0.1 for row in beside), "checks": beside,
        },
        "where the formula is a bound, between the two simulations, within 10%": {
            "met": all(row["over_simulated"] >= 0.9 and row["over_simulated_pausing"] <= 1.1 for row in of_bounds),
            "checks": of_bounds,
        },
        "simulated speculation over 8 stages within 5% of the formula": {
            "met": all(abs(one - 1) <= 0.05 for one in long), "over_formula": long,
        },
    }  # fmt: skip
