"""Lines of thresholds, losses and the split: against decisions that are walked one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron.early_exit.evaluation.calibration_settings import CalibrationSettings
from megatron.early_exit.evaluation.certification import (
    NEVER,
    Split,
    ThresholdLine,
    exit_shares,
    first_exits,
    layers_saved,
    losses,
    p_value,
    run_line_test,
)
from megatron.early_exit.inference.exit_records import PromptRecord


def make_records(count: int, seed: int = 0, num_exits: int = 3, digits: int | None = None) -> list[PromptRecord]:
    """Answers of different lengths; deeper exits are right more often, and surer where they are right."""
    draw, records = np.random.default_rng(seed), []
    for number in range(count):
        length = int(draw.integers(1, 40))
        tokens = draw.integers(0, 50, length)
        is_right = draw.random((length, num_exits)) < np.linspace(0.5, 0.9, num_exits)
        scores = draw.beta(np.where(is_right, 4, 1.5), 1.5)
        scores = scores if digits is None else scores.round(digits)  # with ties
        choices = np.where(is_right, tokens[:, None], 50)
        records.append(PromptRecord(number, tokens, scores, choices, np.full(length, 0.9)))
    return records


def walked_losses(record: PromptRecord, thresholds: list[float]) -> tuple[float, float, list[int]]:
    """(share of decisions with an error of any exit, 1 if there is one, the exit that is taken at each)"""
    errors, taken = 0, []
    for token, scores, choices in zip(record.tokens, record.scores, record.choices):
        reached = [index for index, score in enumerate(scores) if score >= thresholds[index]]
        errors += any(choices[index] != token for index in reached)
        taken.append(reached[0] if reached else len(scores))
    return errors / len(record.tokens), float(errors > 0), taken


@pytest.mark.parametrize("digits", [None, 1])
def test_losses_and_exits_are_those_of_a_walk(digits: int | None) -> None:
    records = make_records(30, digits=digits)
    points = np.array([[0.9, 0.8, 0.7], [0.5, NEVER, 0.5], [0.0, 0.0, 0.0], [NEVER] * 3])
    for risk, place in (("A-max", 0), ("B", 1)):
        found = losses(records, points, risk)
        walked = [[walked_losses(record, list(point))[place] for point in points] for record in records]
        assert found == pytest.approx(np.array(walked))
    for point in points:
        taken = [walked_losses(record, list(point))[2] for record in records]
        assert [first_exits(record, point).tolist() for record in records] == taken
        counts = np.bincount(np.concatenate(taken), minlength=4)
        assert exit_shares(records, point) == pytest.approx(counts / counts.sum())


def test_the_loss_bounds_that_of_every_choice_of_exits() -> None:
    records, point = make_records(40), np.array([[0.7, 0.75, 0.6]])
    bound = losses(records, point, "A-max")[:, 0]
    for enabled in ([0], [1], [2], [0, 2], [1, 2], [0, 1, 2]):
        subset = np.full(3, NEVER)
        subset[enabled] = point[0, enabled]
        for record, most in zip(records, bound, strict=True):
            taken = first_exits(record, subset)
            wrong = [exit_ < 3 and record.choices[t, exit_] != record.tokens[t] for t, exit_ in enumerate(taken)]
            assert np.mean(wrong) <= most + 1e-12


SAVINGS = (0.75, 0.5, 0.25)


@pytest.mark.parametrize("digits", [None, 2])
def test_the_tuned_line_spends_its_budget_and_no_more(digits: int | None) -> None:
    records = make_records(60, digits=digits)
    line = ThresholdLine.tuned(records, alpha=0.05, savings=SAVINGS)
    curves = risk_curves(records)
    assert len(line) == 64 and (np.diff(line.names) > 0).all()
    for budget, thresholds in zip(line.names, line.thresholds, strict=True):
        assert losses(records, thresholds[None], "A-max").mean() <= budget + 1e-12
        of_each = [
            np.array([thresholds[np.argmax(risks <= budget / count + 1e-12)] for thresholds, risks in curves])
            for count in (1, 2, 3)
        ]
        used = np.flatnonzero(thresholds < NEVER)
        # An exit that shares the budget may find no threshold for its part.
        assert any((thresholds[used] == of_each[count - 1][used]).all() for count in range(max(len(used), 1), 4))
        saved = layers_saved(records, thresholds, SAVINGS)
        for subset in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
            other = np.full(3, NEVER)
            other[subset] = of_each[len(subset) - 1][subset]
            assert saved >= layers_saved(records, other, SAVINGS)


def risk_curves(records: list[PromptRecord]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each exit alone, its thresholds from the smallest on, and their risks; beyond 1 none is reached."""
    curves = []
    for index in range(3):
        beyond = {math.nextafter(score, 2) for one in records for score in one.scores[:, index]}
        candidates = np.array([*sorted({0.0, *beyond}), NEVER])
        points = np.full((len(candidates), 3), NEVER)
        points[:, index] = candidates
        curves.append((np.where(candidates > 1.0, NEVER, candidates), losses(records, points, "A-max").mean(0)))
    return curves


def test_an_exit_that_is_often_wrong_leaves_the_budget_to_another() -> None:
    draw, records = np.random.default_rng(0), []
    for number in range(100):
        scores, tokens = draw.random((50, 2)), np.ones(50, np.int64)
        # The first exit is mostly wrong, at random, the second where its score is low.
        is_wrong = np.column_stack([draw.random(50) < 0.9, scores[:, 1] < 0.5])
        records.append(PromptRecord(number, tokens, scores, np.where(is_wrong, 2, 1), np.ones(50)))
    line = ThresholdLine.tuned(records, alpha=0.1, savings=(0.6, 0.5))
    middle = line.thresholds[line.names.index(min(line.names, key=lambda budget: abs(budget - 0.1)))]
    assert middle[0] == NEVER and middle[1] < 0.45
    # Where leaving at the second saves next to nothing, the first is worth its part.
    other = ThresholdLine.tuned(records, alpha=0.1, savings=(0.75, 0.01)).thresholds
    assert (other[32:, 0] < 1.0).all()


def test_an_exit_that_is_always_wrong_is_never_taken_and_one_that_never_is_always() -> None:
    records = [
        PromptRecord(0, np.array([1, 2]), np.array([[1.0, 0.3], [1.0, 0.2]]), np.array([[5, 1], [5, 2]]), np.ones(2))
    ]
    line = ThresholdLine.tuned(records, alpha=0.05, savings=(0.75, 0.5))
    assert (line.thresholds[:, 0] == NEVER).all() and (line.thresholds[:, 1] == 0.0).all()


def test_a_named_line_goes_from_safe_to_risky() -> None:
    assert ThresholdLine.named([0.5, 0.9, 0.9], 2).thresholds.tolist() == [[0.9, 0.9], [0.5, 0.5]]
    with pytest.raises(ValueError, match="--grid has 1.5; thresholds lie between 0 and 1"):
        ThresholdLine.named([0.5, 1.5], 2)


def test_the_sequence_stops_at_the_first_failure_and_takes_the_point_before() -> None:
    draw = np.random.default_rng(3)
    columns = [(draw.random(400) < rate).astype(float) for rate in (0.0, 0.01, 0.08, 0.0)]
    asked = []

    def of_point(point: int) -> np.ndarray:
        asked.append(point)
        return columns[point]

    tested = run_line_test(of_point, 4, alpha=0.05, delta=0.05, risk="A-max", seed=1)
    assert tested.chosen == 1 and asked == [0, 1, 2]  # what lies behind a failure is not looked at
    assert tested.p_values == tuple(p_value(columns[point], 0.05, "A-max", 1) for point in range(3))
    nothing = run_line_test(lambda _: columns[2], 4, alpha=0.05, delta=0.05, risk="A-max", seed=1)
    assert nothing.chosen is None and len(nothing.p_values) == 1


@pytest.mark.parametrize("with_free_running", [False, True])
def test_every_prompt_is_in_one_part(with_free_running: bool) -> None:
    split = Split.draw(1003, seed=5, with_free_running=with_free_running)
    parts = [split.tuning, split.calibration, split.free_running, split.test]
    assert sorted(np.concatenate(parts).tolist()) == list(range(1003))
    assert (len(split.free_running) > 0) == with_free_running
    assert split.sizes["tuning"] == split.sizes["test"] == 200
    other = Split.draw(1003, seed=6, with_free_running=with_free_running)
    assert other.test.tolist() != split.test.tolist()


@pytest.mark.parametrize(("changes", "message"), [
    ({"levels": (0.3,), "num_prompts": 9}, "9 prompts leave less than 2 to test on; give at least 10"),
    ({}, "300 prompts cannot support level 0.99: its test needs 299 prompts even if no decision differs, and gets 180 "
         "of them; give 197 more (--prompts 497)"),
    ({"with_free_running": True}, "its test needs 368 prompts even if no decision differs, and gets 90"),
    ({"levels": (0.95, 0.999)}, "level 0.999: its test needs 2995 prompts"),
])  # fmt: skip
def test_too_few_prompts_are_refused_with_how_many_are_missing(changes: dict, message: str) -> None:
    settings = {name: value for name, value in changes.items() if name != "num_prompts"}
    with pytest.raises(ValueError) as caught:
        CalibrationSettings(**settings).check_prompts(changes.get("num_prompts", 300))
    assert message in str(caught.value)
    CalibrationSettings().check_prompts(497)
    with pytest.raises(ValueError, match="give 49927868 more"):  # at once, not by trying one number after the other
        CalibrationSettings(levels=(0.9999999,)).check_prompts(1000)


@pytest.mark.parametrize(("changes", "message"), [
    ({"levels": (99.0,)}, "--levels has 99; a level lies between 0 and 1"),
    ({"delta": 0.0}, "--delta is 0; it must lie between 0 and 1"),
    ({"answer_tokens": 0}, "--answer-tokens is 0; it must be at least 1"),
    ({"rounding_prompts": -1}, "--rounding-prompts is -1"),
    ({"grid": (-0.1,)}, "--grid has -0.1"),
])  # fmt: skip
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        CalibrationSettings(**changes)
    assert message in str(caught.value)
