"""Arithmetic of the rows that compare ways to decode: times that are known, shares, files of numbers."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from megatron.early_exit.config.exits import ExitConfig, ExitUse
from megatron.early_exit.evaluation.comparison import ComparisonSettings
from megatron.early_exit.evaluation.correctness import Difference, first_difference
from megatron.early_exit.evaluation.correctness_cases import lossless_cases
from megatron.early_exit.evaluation.decoding import Measurement, Run, measure
from megatron.early_exit.evaluation.rows import share_interval, speed_columns, speed_over, table, write_csv
from megatron.early_exit.evaluation.step_parts import step_parts
from megatron.early_exit.evaluation.variants import Grid, variants_of
from megatron.early_exit.inference.certificates import AnswerSettings, Certificate, Certificates
from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.fingerprint import ExitFingerprint
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.protocol import ExitDescription, WorkerDescription


def measurement(seconds: list[list[float]], tokens: int = 10) -> Measurement:
    """[rounds, groups] of seconds for so many tokens."""
    return Measurement(tuple(tuple(Run(((1, 2),), tokens, one) for one in of_round) for of_round in seconds))


def test_speed_is_that_of_rounds() -> None:
    full = measurement([[2.0, 4.0], [2.2, 4.4], [1.8, 3.6]])
    fast = measurement([[1.0, 2.0], [1.0, 2.2], [1.2, 1.5]])
    ratios = np.log(np.array([[2.0, 2.0], [2.2, 2.0], [1.5, 2.4]])).mean(1)
    speed, interval = speed_over(fast, full)
    assert speed == pytest.approx(math.exp(ratios.mean()))
    expected = stats.t.interval(0.95, 2, ratios.mean(), stats.sem(ratios))
    assert interval == pytest.approx(np.exp(expected))
    assert speed == pytest.approx(fast.tokens_per_second / full.tokens_per_second)
    assert fast.tokens_per_second == pytest.approx(10 / stats.gmean([1.0, 2.0, 1.0, 2.2, 1.2, 1.5]))
    assert speed_over(full, full) == (1.0, None)


def test_the_time_of_the_first_token() -> None:
    theirs = Measurement(((Run(((1, 2),), 1, 1.0, first_token_seconds=2.0), Run(((1, 2),), 1, 1.0, (), 4.0)),))
    assert theirs.first_token_seconds == 3.0 and theirs.latency_per_token is None


def test_groups_are_the_blocks_of_a_single_round() -> None:
    ratios = np.log([2.0, 2.5, 1.5])
    speed, interval = speed_over(measurement([[1.0, 2.0, 2.0]]), measurement([[2.0, 5.0, 3.0]]))
    assert speed == pytest.approx(math.exp(ratios.mean()))
    assert interval == pytest.approx(np.exp(stats.t.interval(0.95, 2, ratios.mean(), stats.sem(ratios))))
    assert speed_over(measurement([[1.0]]), measurement([[4.0]])) == (4.0, None)


def test_groups_without_a_second_token_have_no_speed() -> None:
    ends = Run(((1,),), 0, 0.0)
    full = Measurement(((Run(((1, 2),), 5, 1.0), ends),) * 2)
    fast = Measurement(((Run(((1, 2),), 5, 0.5), Run(((1, 2),), 5, 9.0)),) * 2)
    speed, interval = speed_over(fast, full)
    assert speed == pytest.approx(2) and interval == pytest.approx((2, 2))
    nothing = Measurement(((ends,), (ends,)))
    assert speed_over(nothing, nothing) == (1.0, None) and nothing.tokens_per_second is None
    assert speed_over(nothing, Measurement(((ends,), (ends,)))) == (None, None)
    assert speed_columns(1, nothing, nothing)["tokens_per_second"] is None


def test_ways_take_turns_over_whole_groups() -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []

    def way(name: str) -> object:
        def answer(prompts: list[tuple[int]]) -> Run:
            calls.append((name, tuple(one for (one,) in prompts)))
            return Run(tuple(prompts), len(prompts), 1.0)

        return answer

    found = measure({"a": way("a"), "b": way("b")}, [(number,) for number in range(5)], batch=2, rounds=2)
    warm_up, measured = calls[:2], calls[2:]
    assert warm_up == [("a", (0, 1)), ("b", (0, 1))]
    first, second = (0, 1), (2, 3)  # the fifth is left over
    assert measured == [
        ("a", first), ("b", first), ("b", second), ("a", second), ("a", first), ("b", first), ("b", second),
        ("a", second),
    ]  # fmt: skip
    assert found["a"].answers == [(0,), (1,), (2,), (3,)] and np.shape(found["a"].seconds_per_token) == (2, 2)
    with pytest.raises(ValueError, match="1 prompts are fewer than the 2"):
        measure({}, [(1,)], batch=2, rounds=1)
    how = ComparisonSettings((1, 4), 1, num_prompts=10, seed=0)
    assert [how.prompts_at(batch) for batch in (1, 4, 16)] == [10, 8, 16]


def test_interval_of_a_share_of_tokens() -> None:
    counts = np.array([[9, 10], [5, 10], [10, 10], [7, 10]], dtype=float)
    low, high = share_interval(counts, seed=0)
    assert 0.5 <= low < 31 / 40 < high <= 1
    full = np.array([[10, 10]] * 20, dtype=float)
    assert share_interval(full, seed=0) == pytest.approx(stats.binomtest(20, 20).proportion_ci(0.95, "exact"))
    none = full * [0, 1]
    assert share_interval(none, seed=0) == pytest.approx(stats.binomtest(0, 20).proportion_ci(0.95, "exact"))
    assert share_interval(counts[:1], seed=0) is None


def test_where_a_step_goes() -> None:
    costs = StepCosts(
        (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (0.0,) * 6, (0.0,) * 6, (2.0, 2.5, 3.0, 3.5, 4.0, 4.5), slot_seconds=0.5
    )
    full = {"batch": 4, "fastest_step_seconds": [[40.0, 30.0], [20.0, None]]}
    parts = step_parts([full], costs, num_layers=3)
    assert [(one["part"], one["seconds"]) for one in parts] == [("layers", 13.5), ("final head", 3.0), ("rest", 3.5)]
    assert [one["share"] for one in parts] == pytest.approx([13.5 / 20, 3 / 20, 3.5 / 20])
    assert [one["seconds_alone"] for one in parts] == [13.5, 3.0, None]
    assert step_parts([{"batch": 1, "fastest_step_seconds": [[None]]}], costs, 3) == []
    (layers, head, rest) = step_parts([full | {"fastest_step_seconds": [[11.0]]}], costs, num_layers=3)
    assert (layers["seconds"], head["seconds"], rest["seconds"]) == pytest.approx((9.0, 2.0, 0.0))
    assert (layers["seconds_alone"], head["seconds_alone"], rest["share"]) == (13.5, 3.0, 0.0)


def test_tables_and_files_have_the_numbers(tmp_path: Path) -> None:
    row = {
        "name": "threshold 0.5", "batch": 2, "tokens_per_second": 12.34, "speedup": 1.5, "first_token_seconds": None,
        "speedup_interval": (1.25, 1.75), "agreement": 0.985, "agreement_interval": (0.97, 0.99), "acceptance": None,
        "exit_shares": {"2": 0.25},
    }  # fmt: skip
    text = table([row])
    assert "1.50x [1.25, 1.75]" in text and "98.5% [97.0%, 99.0%]" in text and "accepted" not in text
    write_csv([row, {**row, "speedup_interval": None, "level": 0.99}], tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["speedup_low"], first["speedup_high"], first["exit_shares_2"]) == ("1.25", "1.75", "0.25")
    assert (second["speedup_low"], second["level"], first["level"]) == ("", "0.99", "")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def checks(*levels: tuple[float, int, str | None], exits: tuple[int, ...] = (2, 4)) -> RequestChecks:
    """A model with exits and certificates (level, answers' tokens, why it was refused)."""
    fingerprint = ExitFingerprint("w", exits, "fp32", None, None, "t", (0,))
    certificates = [
        Certificate(level, 0.05, "A-max", fingerprint, AnswerSettings(tokens), {2: 0.7}, refusal, 0.01, 0.0, {})
        for level, tokens, refusal in levels
    ]
    model = WorkerDescription(8, 8, 50, tuple(ExitDescription(one, one, False) for one in exits), 2, 64)
    config = ExitConfig(exit_layer_nums=exits)
    return RequestChecks(model, config, (0,), (), Certificates(tuple(certificates)))


def test_certified_levels_are_those_of_such_answers() -> None:
    answers = GenerationParams(max_tokens=16)
    model = checks((0.95, 16, None), (0.98, 32, None), (0.99, 16, "too few prompts"))
    full, certified = variants_of(Grid(certified=None), answers, model)
    assert (full.name, full.description["level"], full.description["thresholds"]) == ("full", None, None)
    assert certified.name == "certified 0.95" and certified.thresholds == {2: 0.7}
    assert certified.description["level"] == 0.95 and certified.description["thresholds"] == {"2": 0.7}
    with pytest.raises(ValueError, match="too few prompts"):
        variants_of(Grid(certified=(0.99,)), answers, model)
    assert [one.name for one in variants_of(Grid(certified=None), GenerationParams(max_tokens=8), model)] == ["full"]


def test_a_grid_names_each_way_once() -> None:
    one_exit = checks(exits=(2,))
    grid = Grid(thresholds=(0.5,), exits="both", draft_lengths=(None, 3))
    names = [one.name for one in variants_of(grid, GenerationParams(max_tokens=8), one_exit)]
    assert names == ["full", "threshold 0.5", "draft with exit 2, length adaptive", "draft with exit 2, length 3"]
    assert [one.name for one in variants_of(grid, GenerationParams(max_tokens=8), checks(exits=()))] == ["full"]
    of_text = Grid(draft_lengths=(4,), draft_sources=("ngram", "both"))
    _, *drafts = variants_of(of_text, GenerationParams(max_tokens=8), one_exit)
    assert [one.name for one in drafts] == ["draft with n-grams, length 4", "draft with n-grams and exits, length 4"]
    columns = ("draft_source", "draft_exit", "draft_length")
    assert [[one.description[name] for name in columns] for one in drafts] == [["ngram", None, 4], ["both", None, 4]]
    without = variants_of(Grid(draft_lengths=(4,), draft_sources=("ngram",)), GenerationParams(), checks(exits=()))
    assert [one.params.draft_source for one in without[1:]] == ["ngram"]


@pytest.mark.parametrize("use", ["leave", "draft", "both"])
def test_ways_to_be_lossless_are_those_that_the_uses_of_exits_allow(use: ExitUse) -> None:
    model = checks()
    model = replace(model, exits=replace(model.exits, exit_uses=(use,)))
    cases = lossless_cases(model, GenerationParams(max_tokens=8), 4, 0.8)
    for case in cases:
        model.check(case.params)
    assert any(case.params.draft_source == "both" for case in cases) == (use != "leave")


def test_first_differences_and_what_explains_them() -> None:
    assert first_difference((1, 2, 3), [1, 2, 3]) is None
    assert first_difference((1, 2, 3), [1, 5, 3]) == 1
    assert first_difference((1, 2, 3), [1, 2]) == 2 == first_difference((1, 2), [1, 2, 3])
    assert Difference("p", 1, 2, 5, margin=0.1, gap=0.2).is_rounding(0.2)
    assert not Difference("p", 1, 2, 5, margin=0.1, gap=0.2).is_rounding(0.1)
    assert not Difference("p", 2, 3, None).is_rounding(math.inf)
    assert Difference("p", 1, 2, 5, margin=0.1, gap=9.0, is_explained=True).is_rounding(0.1)
