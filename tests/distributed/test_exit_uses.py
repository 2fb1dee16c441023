"""Exits that only draft and exits that only leave, each with a head of its own, over one process, tensor-parallel ranks
and pipeline stages: what is chosen by default, what is refused, and that every token follows from the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest

from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.engine.exit_selection import ExitSelector
from megatron.early_exit.inference.executor.base import Executor
from megatron.early_exit.inference.executor.distributed import start_workers
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.executor.local import LocalExecutor
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings, ScoreParams
from megatron.early_exit.inference.protocol import ExitThreshold
from megatron.early_exit.inference.results import RequestResult
from megatron.early_exit.inference.worker.placement import AlonePlacement
from tests.configs import VOCAB_SIZE
from tests.distributed.engines import COSTS, check_against_reference, make_engine, run_all, score_all
from tests.distributed.reference_workers import config_of, factory, make_worker
from tests.distributed.test_engine import PROMPT
from tests.distributed.test_scores import check_scores
from tests.reference_checkpoint import decoding_config

LAYOUTS = {"one process": (1, ()), "TP 2": (2, ()), "PP 2": (1, (1, 3))}
CFG = config_of("uses", "llama")  # exit 1 drafts, 2 is to leave at, 3 does both
SAMPLED = SamplingSettings(temperature=1.0, seed=5)


def start(layout: str) -> Executor:
    size, layers_per_stage = LAYOUTS[layout]
    if layout == "one process":
        return LocalExecutor(make_worker(AlonePlacement(), "uses", "llama")[0])
    stages = len(layers_per_stage) or 1
    return start_workers(factory("uses", "llama", VOCAB_SIZE, layers_per_stage), Layout(size, stages))


@pytest.fixture(scope="module", params=LAYOUTS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    executor = start(request.param)
    yield Engine(executor, CFG.exits, costs=COSTS, prefill_chunk=5)
    executor.close()


def answers(engine: Engine, *requests: GenerationParams) -> list[RequestResult]:
    """Of requests that run together; all follow from the reference."""
    ids = [engine.add(PROMPT, params) for params in requests]
    results = run_all(engine)
    for one, params in zip(ids, requests, strict=True):
        check_against_reference(CFG, PROMPT, params, results[one], VOCAB_SIZE)
    return [results[one] for one in ids]


def test_the_description_tells_uses_and_heads(engine: Engine) -> None:
    assert [(one.layer_number, one.use, one.has_block) for one in engine.description.exits] == [
        (1, "draft", True), (2, "leave", False), (3, "both", False)
    ]  # fmt: skip


@pytest.mark.parametrize("sampling", [SamplingSettings(), SAMPLED], ids=["greedy", "sampled"])
def test_all_modes_together(engine: Engine, sampling: SamplingSettings) -> None:
    params = lambda **changes: GenerationParams(max_tokens=12, sampling=sampling, **changes)
    full, observed, first, some, drafted, by_another = answers(
        engine, params(), params(observe_exits=True), params(mode="early_exit", exit_thresholds=(0.0,)),
        params(mode="early_exit", exit_thresholds=(0.02, 0.0105)),
        params(mode="self_speculative", draft_exit=1, draft_length=2),
        params(mode="self_speculative", draft_exit=3, draft_length=3),
    )  # fmt: skip
    assert observed.token_ids == drafted.token_ids == by_another.token_ids == full.token_ids
    assert {tuple(one.exit_layer for one in token.predictions) for token in observed.tokens} == {(2, 3, None)}
    assert {token.exit_layer for token in first.tokens} == {2}
    assert {usage.exit_layer for usage in some.usage} == {2, 3, 4}
    assert drafted.statistics.drafted > 0 and by_another.statistics.drafted > 0


def test_scores_of_all_heads(engine: Engine) -> None:
    """Whatever they are for."""
    (result,) = score_all(engine, [PROMPT], ScoreParams())
    check_scores(CFG, ScoreParams(), PROMPT, result)


@pytest.mark.parametrize(("params", "message"), [
    ({"mode": "early_exit", "exit_layers": (1, 2)}, "exit_layers 1 2: the use of exit 1 is to draft"),
    ({"mode": "self_speculative", "draft_exit": 2}, "draft_exit is 2, an exit that is for leaving alone (--exit-uses);"
                                                    " those that may draft are 1, 3"),
])  # fmt: skip
def test_an_exit_that_is_asked_for_something_else(engine: Engine, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.add(PROMPT, GenerationParams(**params))


@pytest.mark.parametrize(("uses", "params", "message"), [
    ("draft", {"mode": "early_exit"}, "the model's exits \\(1 2 3\\) only draft"),
    ("leave", {"mode": "self_speculative"}, "the model's exits are for leaving alone \\(--exit-uses\\)"),
])  # fmt: skip
def test_a_model_without_exits_for_a_mode(uses: str, params: dict, message: str) -> None:
    engine = make_engine(decoding_config(exit_uses=(uses,)))
    with pytest.raises(ValueError, match=message):
        engine.add(PROMPT, GenerationParams(**params))


def test_planned_exits_are_found_in_records_of_those_that_tokens_may_leave_at(engine: Engine) -> None:
    scores = np.array([[0.0, 1.0]] * 9)  # [decisions, exits 2 and 3]
    candidates = (ExitThreshold(1, 0.5), ExitThreshold(2, 0.5))
    assert ExitSelector(engine.description, {"head": scores}).select(candidates, 1, COSTS) == candidates[1:]
