"""Rows that compare ways to decode with the full model: speed, and what the answers are worth."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron.early_exit.evaluation.answer_quality import AnswerQuality
from megatron.early_exit.evaluation.decoding import Measurement
from megatron.early_exit.evaluation.statistics.intervals import (
    Interval,
    bootstrap,
    clopper_pearson,
    ratio_of_sums,
    speed_ratio,
)
from megatron.early_exit.evaluation.statistics.text_metrics import is_loop
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.results import RequestResult
from megatron.early_exit.platform.files import replaced

if TYPE_CHECKING:
    from megatron.early_exit.evaluation.prompts import EvalPrompt

Row = dict[str, Any]

Thresholds = dict[int, float]
"""By the layer that names the exit."""


@dataclass(frozen=True)
class Variant:
    """One way of our engine to decode."""

    name: str
    params: GenerationParams
    thresholds: Thresholds | None = None
    """Of early exit."""
    draft_exit: int | None = None
    """Of self-speculation."""

    @property
    def description(self) -> Row:
        """The columns of a row that say what it is of."""
        is_drafted = self.params.mode == "self_speculative"
        return {
            "name": self.name,
            "mode": self.params.mode,
            "thresholds": None if self.thresholds is None else {str(k): v for k, v in self.thresholds.items()},
            "level": self.params.certified_level,
            "draft_source": self.params.draft_source if is_drafted else None,
            "draft_exit": self.draft_exit,
            "draft_length": self.params.draft_length or "adaptive" if is_drafted else None,
        }


def row_of(
    variant: Variant,
    batch: int,
    measured: Measurement,
    baseline: Measurement,
    quality: Sequence[AnswerQuality],
    seed: int,
) -> Row:
    """All columns. baseline: the full model on the same prompts. quality: of each answer. seed: of intervals."""
    results = measured.results
    agreeing = np.array([[one.num_agreeing, one.num_tokens] for one in quality], dtype=float)
    num_identical = sum(one == other for one, other in zip(measured.answers, baseline.answers, strict=True))
    runs_saved = _saved(results, "layer_runs")
    drafted = sum(result.statistics.drafted for result in results)
    accepted = sum(result.statistics.accepted for result in results)
    return {
        **variant.description,
        "is_baseline": measured is baseline,
        **speed_columns(batch, measured, baseline),
        "layer_run_speedup": None if runs_saved is None else 1 / (1 - runs_saved),
        "layers_saved": _saved(results, "layer_passes"),
        "runs_saved": runs_saved,
        "agreement": ratio_of_sums(agreeing),
        "agreement_interval": share_interval(agreeing, seed),
        "identical_answers": num_identical / len(results),
        "identical_interval": clopper_pearson(num_identical, len(results)),
        "acceptance": accepted / drafted if drafted else None,
        "ngram_share": sum(result.statistics.ngram_accepted for result in results) / accepted if accepted else None,
        "perplexity": perplexity_of(quality),
        "loop_rate": sum(is_loop(answer) for answer in measured.answers) / len(results),
        "exit_shares": exit_shares(results),
    }


def speed_columns(batch: int, measured: Measurement, baseline: Measurement) -> Row:
    """Wall clock, of decoding alone but for the first token."""
    speedup, interval = speed_over(measured, baseline)
    return {
        "batch": batch,
        "prompts": len(measured.answers),
        "tokens_per_second": measured.tokens_per_second,
        "speedup": speedup,
        "speedup_interval": interval,
        "first_token_seconds": measured.first_token_seconds,
        "seconds_per_token": measured.latency_per_token,
    }


def speed_over(measured: Measurement, baseline: Measurement) -> tuple[float | None, Interval | None]:
    """(how many times as fast in tokens a second, its interval). Rounds are the blocks; of a single round, its groups
    of prompts. None: all answers have one token, or there is one block only."""
    if measured is baseline:
        return 1.0, None
    mine, theirs = measured.seconds_per_token, baseline.seconds_per_token
    is_known = ~(np.isnan(mine).any(0) | np.isnan(theirs).any(0))
    mine, theirs = mine[:, is_known], theirs[:, is_known]
    if not mine.size:
        return None, None
    if len(mine) == 1:
        mine, theirs = mine.T, theirs.T
    if len(mine) == 1:
        return float(theirs[0, 0] / mine[0, 0]), None
    return speed_ratio(mine, theirs)


def share_interval(counts: np.ndarray, seed: int) -> Interval | None:
    """Of a share of tokens. counts: [prompts, 2], tokens that have it and tokens.

    Bootstrap over prompts, which says nothing where all tokens of all prompts are alike; then Clopper and Pearson's, of
    the share of prompts that are like these, which is not wider on the side of the tokens. None for less than two
    prompts."""
    if len(counts) < 2:
        return None
    if (counts[:, 0] == counts[:, 1]).all():
        return clopper_pearson(len(counts), len(counts))
    if not counts[:, 0].any():
        return clopper_pearson(0, len(counts))
    return bootstrap(counts, ratio_of_sums, seed=seed)


def perplexity_of(quality: Sequence[AnswerQuality]) -> float | None:
    """Of all tokens of all answers under the full model; None: beyond what a number holds."""
    mean = -sum(one.log_prob for one in quality) / sum(one.num_tokens for one in quality)
    return math.exp(mean) if mean < 700 else None


def exit_shares(results: Sequence[RequestResult]) -> dict[str, float]:
    """Share of tokens that each head gave, by layer, and "final"."""
    counts: Counter[str] = Counter()
    for result in results:
        for usage in result.usage:
            counts["final" if usage.is_final else str(usage.exit_layer)] += usage.tokens
    return {head: count / counts.total() for head, count in counts.items()}


def _saved(results: Sequence[RequestResult], name: str) -> float | None:
    """Share of what the full model runs; None if that is nothing, as for answers of one token."""
    needed = sum(result.statistics.full_layer_passes for result in results)
    return 1 - sum(getattr(result.statistics, name) for result in results) / needed if needed else None


def per_prompt(
    name: str, batch: int, measured: Measurement, baseline: Measurement, quality: Sequence[AnswerQuality]
) -> Row:
    """The numbers behind a row, in the order of prompts; times by round and group of prompts."""
    of_runs = lambda value: [[value(run) for run in of_round] for of_round in measured.rounds]
    return {
        "name": name,
        "batch": batch,
        "tokens": [len(answer) for answer in measured.answers],
        "agreeing": [one.num_agreeing for one in quality],
        "log_prob": [one.log_prob for one in quality],
        "is_identical": [one == other for one, other in zip(measured.answers, baseline.answers, strict=True)],
        "is_loop": [is_loop(answer) for answer in measured.answers],
        "layer_runs": [result.statistics.layer_runs for result in measured.results],
        "full_layer_passes": [result.statistics.full_layer_passes for result in measured.results],
        "decode_seconds": of_runs(lambda run: run.decode_seconds),
        "decode_tokens": of_runs(lambda run: run.decode_tokens),
        "first_token_seconds": of_runs(lambda run: run.first_token_seconds),
        "fastest_step_seconds": of_runs(lambda run: run.fastest_step_seconds),
    }


def table(rows: Sequence[Row]) -> str:
    """For a terminal; columns that no row has are left out."""
    from megatron.early_exit.platform.columns import aligned

    columns = {
        "way": lambda row: row["name"],
        "batch": lambda row: str(row["batch"]),
        "tokens/s": lambda row: _number(row["tokens_per_second"], ".1f"),
        "speed": lambda row: _with_interval(row["speedup"], row["speedup_interval"], ".2f", "x"),
        "layer runs": lambda row: _number(row.get("layer_run_speedup"), ".2f", "x"),
        "agreement": lambda row: _with_interval(row.get("agreement"), row.get("agreement_interval"), ".1%"),
        "identical": lambda row: _number(row.get("identical_answers"), ".0%"),
        "perplexity": lambda row: _number(row.get("perplexity"), ".2f"),
        "loops": lambda row: _number(row.get("loop_rate"), ".0%"),
        "accepted": lambda row: _number(row.get("acceptance"), ".0%"),
        "first token": lambda row: _number(1e3 * row["first_token_seconds"], ".1f", " ms")
        if row["first_token_seconds"] is not None else "-",
    }  # fmt: skip
    cells = {name: [of_row(row) for row in rows] for name, of_row in columns.items()}
    shown = [name for name, values in cells.items() if any(value != "-" for value in values)]
    return aligned([shown, *zip(*(cells[name] for name in shown), strict=True)])


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _with_interval(value: float | None, interval: Sequence[float] | None, form: str, unit: str = "") -> str:
    ends = "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"
    return _number(value, form, unit) + ends


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row, at once or not at all: intervals as two columns, shares of exits and thresholds as one each."""
    lines = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(column for line in lines for column in line))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        partial.write_text(text.getvalue(), newline="")


def _flat(row: Mapping[str, Any]) -> Row:
    flat: Row = {}
    for name, value in row.items():
        if name.endswith("_interval"):
            low, high = value or (None, None)
            flat |= {name.replace("_interval", "_low"): low, name.replace("_interval", "_high"): high}
        elif isinstance(value, dict):
            flat |= {f"{name}_{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def names_of(prompts: Sequence[EvalPrompt]) -> list[Row]:
    """Where prompts are from, in the order of `per_prompt`."""
    return [{"name": prompt.name, "domain": prompt.domain} for prompt in prompts]
