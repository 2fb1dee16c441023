"""The workers of `benchmarks/pipeline_inference/`, which sleep, and what it makes of measurements."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.pipeline_inference import compare, measure
from benchmarks.pipeline_inference.compare import goals, summarise
from benchmarks.pipeline_inference.formulas import Costs, full_token, tensor_parallel
from benchmarks.pipeline_inference.measure import Run, Setup, decode, expect
from benchmarks.pipeline_inference.report import print_report
from benchmarks.pipeline_inference.workers import VOCAB_SIZE, PassTimes, Script, exit_config, make_worker
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.executor.local import LocalExecutor
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.worker.placement import AlonePlacement

SHARES = (0.6, 0.2, 0.1, 0.1)
COSTS = Costs(alpha=0.02, beta=0.0004, head=0.001, hop=0.001, turn=0.001)


@pytest.fixture
def ranks(tmp_path: Path) -> Any:
    """As `measure.Ranks`, in this process."""
    times = PassTimes(str(tmp_path / "times"))
    times.write(0.0, 0.0, 0.0)
    worker, _ = make_worker(
        AlonePlacement(), times=str(tmp_path / "times"), num_layers=4, num_stages=1, num_slots=4, seed=0,
        shares=list(SHARES), acceptance=0.8,
    )  # fmt: skip
    return SimpleNamespace(
        engine=Engine(LocalExecutor(worker), exit_config(4)), times=times, script=Script(0, SHARES, 0.8), num_layers=4
    )


def test_a_script_has_the_shares_that_are_asked_for() -> None:
    script, places = Script(0, SHARES, 0.7), [(position, token) for position in range(100) for token in range(50)]
    first = [next((exit for exit in range(3) if script.is_confident(exit, *one)), 3) for one in places]
    assert [first.count(stage) / len(places) for stage in range(4)] == pytest.approx(SHARES, abs=0.02)
    agrees = sum(script.exit_token(*one) == script.final_token(*one) for one in places)
    assert agrees / len(places) == pytest.approx(0.7, abs=0.02)
    different = VOCAB_SIZE * (1 - math.exp(-len(places) / VOCAB_SIZE))  # of draws that are all equally likely
    assert len({script.final_token(*one) for one in places}) == pytest.approx(different, rel=0.03)
    assert Script(1, SHARES, 0.7).final_token(5, 5) != script.final_token(5, 5)


def test_tokens_leave_as_the_script_says(ranks: Any) -> None:
    run = decode(ranks, GenerationParams(max_tokens=300, mode="early_exit"), 4, "prompts")
    assert run.shares(4) == pytest.approx(SHARES, abs=0.05)
    for prompt, result in zip(run.prompts, run.results, strict=True):
        for position, before, token in zip(range(2, 300), [prompt[-1], *result.token_ids], result.tokens):
            leaves = [layer for layer in (1, 2, 3) if ranks.script.is_confident(layer - 1, position, before)]
            assert token.exit_layer == min(leaves, default=4)


def test_drafts_are_accepted_as_the_script_says_and_change_no_token(ranks: Any) -> None:
    full = decode(ranks, GenerationParams(max_tokens=400), 2, "prompts")
    mode = {"mode": "self_speculative", "draft_length": 1}
    drafted = decode(ranks, GenerationParams(max_tokens=400, **mode), 2, "prompts")
    assert [one.token_ids for one in drafted.results] == [one.token_ids for one in full.results]
    assert full.acceptance(ranks.script) == drafted.acceptance(ranks.script) == pytest.approx(0.8, abs=0.06)
    accepted = sum(one.statistics.accepted for one in drafted.results)
    assert accepted / sum(one.statistics.drafted for one in drafted.results) == pytest.approx(0.8, abs=0.06)


def test_passes_take_their_time(ranks: Any) -> None:
    ranks.times.write(0.002, 0.001, 0.004)
    started = time.perf_counter()
    decode(ranks, GenerationParams(max_tokens=10), 2, "prompts")
    # Ten tokens of two rows: four layers of 2 + 2 * 1 ms, and the final head.
    assert time.perf_counter() - started >= 10 * (4 * 0.004 + 0.004)


def test_tensor_parallel_steps_end_with_the_row_that_leaves_last() -> None:
    setup = Setup(shares=(0.5, 0.0, 0.0, 0.5))
    of_tp = tensor_parallel(COSTS, 4, setup.collectives)
    one = expect(setup, "tp_early_exit", 1, COSTS, of_tp, setup.shares, 0.8)
    layer = of_tp.run(1) / 4
    assert 1 / one.formula == pytest.approx(0.5 * (layer + of_tp.head) + 0.5 * 4 * (layer + of_tp.head) + of_tp.turn)
    many = expect(setup, "tp_early_exit", 16, COSTS, of_tp, setup.shares, 0.8)
    assert 16 / many.formula == pytest.approx(of_tp.run(16) + 4 * of_tp.head + of_tp.turn, rel=0.001)
    assert not (one.is_bound or many.is_bound)


def test_which_formulas_are_bounds() -> None:
    is_bound = lambda case, requests: expect(Setup(), case, requests, COSTS, COSTS, SHARES, 0.8).is_bound
    assert not any(is_bound(case, 1) for case in ("full", "early_exit", "draft_then_verify", "across_stages"))
    assert not is_bound("full", 16)
    costly = Setup(beta=Setup().alpha)
    assert not expect(costly, "across_stages", 16, COSTS, COSTS, SHARES, 0.8).is_bound  # nothing is drafted there
    assert all(is_bound(case, 16) for case in ("early_exit", "draft_then_verify", "across_stages"))


def rows_of(case: str, speeds: list[float], requests: int = 1, **changes: Any) -> list[dict[str, Any]]:
    same = {
        "case": case, "requests": requests, "tokens": 50, "shares": SHARES, "acceptance": 0.8, "is_bound": False,
        "formula": 10.0, "simulated": 10.0, "simulated_pausing": 10.0, "costs": asdict(COSTS), **changes,
    }  # fmt: skip
    return [{"round": number, "tokens_per_second": speed, **same} for number, speed in enumerate(speeds)]


def test_ratios_are_of_the_same_round() -> None:
    rows = rows_of("full", [10.0, 5.0, 10.0]) + rows_of("early_exit", [22.0, 12.0, 24.0], formula=24.0)
    full, exits = summarise(rows)
    assert full["over_full"] == 1.0
    assert exits["over_full"] == pytest.approx(2.4)
    assert exits["over_full_range"] == pytest.approx([2.2, 2.4])
    assert exits["over_formula"] == pytest.approx(22 / 24)


@pytest.mark.parametrize(("speed", "is_met"), ((22.1, True), (21.9, False)))
def test_goals(speed: float, is_met: bool) -> None:
    bound = rows_of("draft_then_verify", [5.0], requests=4, is_bound=True, simulated=5.4, simulated_pausing=5.2)
    rows = rows_of("full", [10.0]) + rows_of("full", [10.0], requests=4) + bound
    rows += rows_of("early_exit", [speed], formula=22.0) + rows_of("across_stages", [9.5])
    speculation = [{"stages": 8, "bare_speedup": 5.0, "bare_formula": 5.2}]
    verdicts = list(goals(summarise(rows), speculation).values())
    assert [one["met"] for one in verdicts] == [is_met, True, True, True, True]
    slow = summarise(rows_of("full", [10.0]) + rows_of("across_stages", [8.9]))
    verdicts = list(goals(slow, [{"stages": 8, "bare_speedup": 4.9, "bare_formula": 5.2}]).values())
    assert [bool(one["met"]) for one in verdicts] == [False, False, False, True, False]


def test_answers_that_differ_are_an_error() -> None:
    measure._check_equal({"full": [[1, 2, 3]], "across_stages": [[1, 2]]})
    with pytest.raises(RuntimeError, match="across_stages does not give"):
        measure._check_equal({"full": [[1, 2, 3]], "across_stages": [[1, 3]]})


def test_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SIMULATED_TOKENS", 40)
    rows = rows_of("full", [1 / full_token(COSTS, 4)]) + rows_of(
        "tp_full", [20.0], simulated=None, simulated_pausing=None
    )
    results = compare.compare(Setup(), rows)
    verdicts = goals(results["summary"], results["simulated_speculation"])
    json.dumps([results, verdicts], allow_nan=False)
    assert len(results["simulated_pipelines"]) == 9
    print_report(results, verdicts)
    assert "over formula" in capsys.readouterr().out


def test_acceptance_is_that_of_the_answer() -> None:
    script = Script(0, SHARES, 0.5)
    tokens, position = [7], 4
    for _ in range(200):
        tokens.append(script.final_token(position, tokens[-1]))
        position += 1
    right = sum(script.exit_token(4 + i, tokens[i]) == tokens[i + 1] for i in range(200))
    run = Run(1.0, [SimpleNamespace(token_ids=tokens[1:])], [[1, 2, 3, 4, 7]])
    assert run.acceptance(script) == pytest.approx(right / 200)
