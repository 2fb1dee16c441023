"""Whether certified thresholds keep their promise, and how often other ways to choose thresholds break it.

    python -m benchmarks.certificate_simulation

Prompts are drawn from a population (`certificate_exits.py`) whose risk is known at every threshold of a grid, a
thousand times for each case; every method chooses a point from the same losses. A *violation* is a point whose true
risk is above alpha. A one-sided exact binomial test (level .001) says whether violations are more frequent than delta.
Methods that are right must pass everywhere; each wrong one must fail in the cases that show its mistake, or the
simulation would prove nothing. *certified_by_the_program* is the whole way of `tools/evaluate.py calibrate` from
records on: prompts are split, a threshold for each exit is tuned on one part, and the line of them tested on another.
*power*: how often a point with 1/4, 1/2, 3/4 of alpha is certified with the numbers of prompts that users are told.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.certificate_exits import DECISIONS, Population, draw_population
from megatron.early_exit.evaluation.certification import Split, ThresholdLine, losses, run_line_test
from megatron.early_exit.evaluation.statistics.distributions import binomial_cdf
from megatron.early_exit.evaluation.statistics.learn_then_test import (
    betting_p_value,
    binomial_p_value,
    fixed_sequence,
)
from megatron.early_exit.inference.exit_records import PromptRecord
from megatron.early_exit.platform.command_line import show_progress

DELTA = 0.05
ALPHAS = (0.01, 0.05)
CORRELATIONS = (0.05, 0.2)
SIZES = (300, 1000, 3000)
TEST_LEVEL = 0.001
TEXT_ALPHA = 0.05
"""Of the loss "the text differs"."""

GRIDS = {
    "fine": (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.85, 0.92, 0.96, 0.99, 1.005, 1.02, 1.05, 1.1, 1.2, 1.35),
    "coarse": (0.25, 0.5, 0.75, 1.25, 2.0),
}
"""Risks of the points over alpha, from safe to risky."""

TOLD_RATIOS = (0.25, 0.5, 0.75)
TOLD = {
    (0.01, 0.05): (500, 800, 2000), (0.01, 0.2): (1000, 1600, 6000),
    (0.05, 0.05): (100, 150, 400), (0.05, 0.2): (200, 300, 1200),
}  # fmt: skip
"""(alpha, correlation) -> prompts for `TOLD_POWER` at these ratios of the risk to alpha."""
TOLD_POWER = 0.9

cached_binomial_p_value = functools.cache(binomial_p_value)


def certified(counts: np.ndarray, alpha: float, seed: int) -> int | None:
    """counts: [points, prompts], decisions of each prompt that err; so for all methods."""
    return fixed_sequence(betting_p_value(counts / DECISIONS, alpha, seed), DELTA)


def certified_texts(counts: np.ndarray, alpha: float, seed: int) -> int | None:
    num_losses = (counts > 0).sum(1).tolist()
    return fixed_sequence([cached_binomial_p_value(k, counts.shape[1], alpha) for k in num_losses], DELTA)


def naive(counts: np.ndarray, alpha: float, seed: int) -> int | None:
    """The riskiest point whose risk in the sample is at most alpha."""
    return _last(counts.mean(1) / DECISIONS <= alpha)


def in_expectation(counts: np.ndarray, alpha: float, seed: int) -> int | None:
    """Conformal risk control, arXiv:2208.02814: its risk is at most alpha on average over calibrations, which is no
    promise for one of them."""
    n = counts.shape[1]
    return _last((counts.sum(1) / DECISIONS + 1) / (n + 1) <= alpha)


def pooled_tokens(counts: np.ndarray, alpha: float, seed: int) -> int | None:
    """A fixed sequence of binomial tests over all decisions, as if those of one prompt were independent."""
    n = counts.shape[1] * DECISIONS
    return fixed_sequence([cached_binomial_p_value(k, n, alpha) for k in counts.sum(1).tolist()], DELTA)


def normal(counts: np.ndarray, alpha: float, seed: int) -> int | None:
    """A fixed sequence of tests by the normal approximation of the mean over prompts."""
    losses = counts / DECISIONS
    deviation = losses.std(1, ddof=1) / math.sqrt(losses.shape[1])
    z = (losses.mean(1) - alpha) / np.maximum(deviation, 1e-300)
    return fixed_sequence([math.erfc(-value / math.sqrt(2)) / 2 for value in z], DELTA)


def first_failing(counts: np.ndarray, alpha: float, seed: int) -> int | None:
    """The certified sequence off by one: the point at which it ended."""
    chosen = certified(counts, alpha, seed)
    return min(0 if chosen is None else chosen + 1, len(counts) - 1)


def _last(is_accepted: np.ndarray) -> int | None:
    accepted = np.flatnonzero(is_accepted)
    return int(accepted[-1]) if len(accepted) else None


Method = Callable[[np.ndarray, float, int], int | None]
RIGHT: dict[str, tuple[Method, ...]] = {"A-max": (certified,), "text": (certified_texts,)}
WRONG: tuple[Method, ...] = (naive, in_expectation, pooled_tokens, first_failing, normal)


@dataclass(frozen=True)
class Case:
    loss: str
    """A-max: share of decisions that err; text: 1 if any does."""
    alpha: float
    correlation: float
    grid: str
    prompts: int

    @property
    def methods(self) -> tuple[Method, ...]:
        return RIGHT[self.loss] + (WRONG if self.loss == "A-max" else ())

    def shows(self, method: Method) -> bool:
        """Whether a wrong method must be seen to break its promise here. Choices with too small a margin do where
        points lie just above alpha (that of `in_expectation`, 1 / prompts, is small for many prompts only); off by
        one does where the last good point is nearly always certified, and the next is bad."""
        is_largest = self.prompts == max(SIZES)
        if method is first_failing:
            return self.grid == "coarse" and is_largest
        return self.grid == "fine" and (method in (naive, pooled_tokens) or (method is in_expectation and is_largest))


def cases() -> Iterator[Case]:
    for alpha, correlation, grid, prompts in itertools.product(ALPHAS, CORRELATIONS, GRIDS, SIZES):
        yield Case("A-max", alpha, correlation, grid, prompts)
    for correlation, prompts in itertools.product(CORRELATIONS, SIZES):
        yield Case("text", TEXT_ALPHA, correlation, "fine", prompts)


PROGRAM_CASES = (Case("A-max", 0.01, 0.2, "tuned", 1000), Case("A-max", 0.05, 0.2, "tuned", 500))


@dataclass(frozen=True)
class Grid:
    """Points of a population, from safe to risky."""

    counts: np.ndarray
    """[points, prompts]"""
    risks: np.ndarray
    """[points], exact."""

    @classmethod
    def of(cls, population: Population, loss: str, alpha: float, ratios: tuple[float, ...]) -> Grid:
        threshold = population.threshold if loss == "A-max" else population.threshold_of_texts
        counts = np.stack([population.errors(threshold(ratio * alpha)) for ratio in ratios]).astype(np.uint8)
        return cls(counts, (counts.mean(1) / DECISIONS) if loss == "A-max" else (counts > 0).mean(1))

    def samples(self, prompts: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
        """[points, prompts] for each calibration."""
        generator = np.random.default_rng(seed)
        for _ in range(repeats):
            yield self.counts[:, generator.integers(self.counts.shape[1], size=prompts)]


def simulate(case: Case, grid: Grid, repeats: int, seed: int) -> list[dict[str, Any]]:
    """A row for each method."""
    chosen: dict[Method, list[float | None]] = {method: [] for method in case.methods}
    for number, counts in enumerate(grid.samples(case.prompts, repeats, seed)):
        for method in case.methods:
            point = method(counts, case.alpha, number)
            chosen[method].append(None if point is None else float(grid.risks[point]))
    return [
        _row(case, method.__name__, method in RIGHT[case.loss], case.shows(method), risks)
        for method, risks in chosen.items()
    ]


def simulate_program(population: Population, case: Case, repeats: int, seed: int) -> dict[str, Any]:
    """A row for the functions behind `tools/evaluate.py calibrate`, whose points have a threshold for each exit."""
    generator = np.random.default_rng(seed)
    scores, is_wrong = (np.moveaxis(of, 0, -1) for of in (population.decisions.scores, population.decisions.is_wrong))
    choices = is_wrong.astype(np.int64)
    savings = 1.0 - np.arange(1, scores.shape[-1] + 1) / (scores.shape[-1] + 1)
    right, sure = np.zeros(DECISIONS, np.int64), np.ones(DECISIONS)
    risks: list[float | None] = []
    for number in range(repeats):
        drawn = generator.integers(len(scores), size=case.prompts).tolist()
        records = [PromptRecord(i, right, scores[one].astype(float), choices[one], sure) for i, one in enumerate(drawn)]
        split = Split.draw(len(records), number, with_free_running=False)
        line = ThresholdLine.tuned([records[i] for i in split.tuning], case.alpha, savings)
        of_points = losses([records[i] for i in split.calibration], line.thresholds, "A-max")
        tested = run_line_test(
            lambda point, of=of_points: of[:, point],
            len(line),
            alpha=case.alpha,
            delta=DELTA,
            risk="A-max",
            seed=number,
        )
        risks.append(None if tested.chosen is None else population.risk(line.thresholds[tested.chosen]))
    return _row(case, "certified_by_the_program", True, False, risks)


def _row(case: Case, method: str, is_right: bool, shows: bool, risks: list[float | None]) -> dict[str, Any]:
    """risks: of the point that each calibration chose, None where it refused all."""
    accepted = [risk for risk in risks if risk is not None]
    violations = sum(risk > case.alpha for risk in accepted)
    p_value = 1 - binomial_cdf(violations - 1, len(risks), DELTA) if violations else 1.0
    return {
        **{name: getattr(case, name) for name in ("loss", "alpha", "correlation", "grid", "prompts")},
        "method": method,
        "is_right": is_right,
        "must_be_seen_to_fail": shows,
        "repeats": len(risks),
        "violations": violations,
        "violation_rate": violations / len(risks),
        "p_value": p_value,
        "is_rejected": p_value < TEST_LEVEL,
        "refused": 1 - len(accepted) / len(risks),
        "mean_risk_over_alpha": float(np.mean(accepted)) / case.alpha if accepted else None,
    }


def simulate_power(population: Population, alpha: float, correlation: float, repeats: int, seed: int) -> list[dict]:
    """A row for each number of prompts that users are told."""
    grid = Grid.of(population, "A-max", alpha, TOLD_RATIOS)
    rows = []
    for point, (ratio, prompts) in enumerate(zip(TOLD_RATIOS, TOLD[alpha, correlation], strict=True)):
        samples = enumerate(grid.samples(prompts, repeats, seed))
        chosen = [certified(counts, alpha, number) for number, counts in samples]
        successes = sum(one is not None and one >= point for one in chosen)
        rows.append({
            "alpha": alpha, "correlation": correlation, "risk_over_alpha": ratio, "prompts": prompts,
            "power": successes / repeats, "p_value": binomial_cdf(successes, repeats, TOLD_POWER),
        })  # fmt: skip
    return rows


def run(repeats: int, population_size: int, seed: int) -> dict[str, Any]:
    populations = {key: draw_population(population_size, *key, seed) for key in itertools.product(ALPHAS, CORRELATIONS)}
    all_cases, rows, power = list(cases()), [], []
    show = show_progress("cases")
    rows += [simulate_program(populations[case.alpha, case.correlation], case, repeats, seed) for case in PROGRAM_CASES]
    for done, case in enumerate(all_cases, 1):
        grid = Grid.of(populations[case.alpha, case.correlation], case.loss, case.alpha, GRIDS[case.grid])
        rows += simulate(case, grid, repeats, seed)
        show(done, len(all_cases))
    for (alpha, correlation), population in populations.items():
        power += simulate_power(population, alpha, correlation, repeats, seed)
    return {
        "populations": [_described(population, *key) for key, population in populations.items()],
        "cases": rows,
        "power": power,
    }


def _described(population: Population, alpha: float, correlation: float) -> dict[str, Any]:
    threshold = population.threshold(alpha)
    return {
        "alpha": alpha,
        "correlation": correlation,
        "threshold": threshold,
        "measured_risk": float(population.errors(threshold).mean() / DECISIONS),
        "measured_correlation": population.correlation(threshold),
    }


def goals(results: dict[str, Any]) -> dict[str, Any]:
    rows = results["cases"]
    found = {
        f"{loss}: violations at most delta": _no_row_is_rejected(
            [row for row in rows if row["is_right"] and row["loss"] == loss]
        )
        for loss in RIGHT
    }
    for method in WRONG:
        shown = [row for row in rows if row["method"] == method.__name__ and row["must_be_seen_to_fail"]]
        if shown:
            found[f"{method.__name__}: seen to break its promise"] = {
                "met": all(row["is_rejected"] for row in shown),
                "cases": len(shown),
                "violation_rates": [
                    min(row["violation_rate"] for row in shown),
                    max(row["violation_rate"] for row in shown),
                ],
            }
    found["power of 90% with the prompts that users are told"] = {
        "met": not any(row["p_value"] < TEST_LEVEL for row in results["power"]),
        "least": min(row["power"] for row in results["power"]),
    }
    return found


def _no_row_is_rejected(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "met": not any(row["is_rejected"] for row in rows),
        "cases": len(rows),
        "highest_violation_rate": max(row["violation_rate"] for row in rows),
        "lowest_p_value": min(row["p_value"] for row in rows),
    }


def print_tables(results: dict[str, Any], verdicts: dict[str, Any]) -> None:
    group_of = lambda row: (row["loss"], row["alpha"], row["correlation"])
    for group, rows in itertools.groupby(sorted(results["cases"], key=group_of), group_of):
        print("\n{}, alpha {}, correlation {}: share of violations (*: above delta, not by chance)\n".format(*group))
        print(_violations_table(list(rows)))
    print("\nPower of the certificate\n")
    names = list(results["power"][0])
    print(common.format_table(names, [[str(row[name]) for name in names] for row in results["power"]]))
    print("\nGoals\n\n" + common.goals_table(verdicts))


def _violations_table(rows: list[dict[str, Any]]) -> str:
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        column = f"{row['grid']} {row['prompts']}"
        cells.setdefault(row["method"], {})[column] = f"{row['violation_rate']:.3f}{'*' if row['is_rejected'] else ' '}"
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    return common.format_table(
        ["method", *columns], [[name, *(row.get(column) for column in columns)] for name, row in cells.items()]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000, help="calibrations of each case (default: %(default)s)")
    parser.add_argument("--population", type=int, default=100_000, help="prompts to draw from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: benchmarks/results/NAME_MACHINE_DATE.json"
    )
    args = parser.parse_args()
    machine = common.machine_info()
    results = run(args.repeats, args.population, args.seed)
    verdicts = goals(results)
    print_tables(results, verdicts)
    settings = {
        "repeats": args.repeats, "population": args.population, "delta": DELTA, "test_level": TEST_LEVEL,
        "decisions": DECISIONS, "grids": GRIDS,
    }  # fmt: skip
    document = common.result_document("certificate_simulation", machine, settings, args.seed, results, verdicts)
    common.finish(document, args.output)


if __name__ == "__main__":
    main()
