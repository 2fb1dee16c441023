"""After how many audits a live audit's monitor raises an alarm: false ones while the promise holds, real ones after.

    python -m benchmarks.risk_monitor_simulation

Losses are those of prompts of `certificate_exits.py` at thresholds whose true risk is a given part of what is
promised. A run ends with its first alarm, or after 10,000 audits without one.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.certificate_exits import DECISIONS, draw_population
from megatron.early_exit.inference.engine.risk_monitor import RiskMonitor
from megatron.early_exit.platform.command_line import show_progress

DELTA = 0.05
PROMISES = tuple(itertools.product((0.01, 0.05), (0.05, 0.2)))
"""(alpha, correlation of errors within prompts)"""
RATIOS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""True risk / alpha."""
MOST_AUDITS = 10_000


def audits_until_alarm(losses: np.ndarray, alpha: float, generator: np.random.Generator, most: int) -> int | None:
    """None: there was no alarm. losses: of the whole population, drawn from with replacement."""
    monitor = RiskMonitor(alpha, DELTA)
    drawn = losses[generator.integers(len(losses), size=most)].tolist()
    return next((number for number, loss in enumerate(drawn, 1) if monitor.observe(loss)), None)


def row_of(runs: list[int | None], most: int, **about: float) -> dict[str, Any]:
    """runs: audits until the alarm."""
    shown = [most if run is None else run for run in runs]
    median = statistics.median(shown)
    return {
        **about,
        "without_alarm": runs.count(None) / len(runs),
        "median": None if median >= most else median,
        "mean_at_least": statistics.fmean(shown),
    }


def run(repeats: int, population_size: int, most: int, seed: int) -> list[dict[str, Any]]:
    rows, show = [], show_progress("cases")
    for alpha, correlation in PROMISES:
        population = draw_population(population_size, alpha, correlation, seed)
        generator = np.random.default_rng(seed)
        for ratio in RATIOS:
            losses = population.errors(population.threshold(ratio * alpha)) / DECISIONS
            runs = [audits_until_alarm(losses, alpha, generator, most) for _ in range(repeats)]
            rows.append(row_of(runs, most, alpha=alpha, correlation=correlation, risk_over_alpha=ratio))
            show(len(rows), len(PROMISES) * len(RATIOS))
    return rows


def goals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    kept = [row["mean_at_least"] for row in rows if row["risk_over_alpha"] <= 1]
    broken = [row["without_alarm"] for row in rows if row["risk_over_alpha"] > 1]
    return {
        "false alarms at least 1 / delta audits apart": {"met": min(kept) >= 1 / DELTA, "least_mean": min(kept)},
        "every broken promise is noticed": {"met": max(broken) == 0, "unnoticed": max(broken)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200, help="runs of each case (default: %(default)s)")
    parser.add_argument("--population", type=int, default=100_000, help="prompts to draw from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: benchmarks/results/NAME_MACHINE_DATE.json"
    )
    args = parser.parse_args()
    machine = common.machine_info()
    rows = run(args.repeats, args.population, MOST_AUDITS, args.seed)
    verdicts = goals(rows)
    print(common.format_table(list(rows[0]), [[common.cell(value) for value in row.values()] for row in rows]))
    print("\nGoals\n\n" + common.goals_table(verdicts))
    settings = {
        "repeats": args.repeats, "population": args.population, "delta": DELTA, "most_audits": MOST_AUDITS,
        "decisions": DECISIONS,
    }  # fmt: skip
    document = common.result_document("risk_monitor_simulation", machine, settings, args.seed, {"rows": rows}, verdicts)
    common.finish(document, args.output)


if __name__ == "__main__":
    main()
