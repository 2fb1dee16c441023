"""Drafts of all sources change no answer: tokens, log-probabilities and ends are those of all layers without drafts."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.inference.protocol import Rows, Step
from megatron.early_exit.inference.results import RequestResult
from tests.distributed.engines import check_invariants, make_engine, run_all
from tests.reference_checkpoint import HEADS, decoding_config

HEAD_KINDS = ("untied_norm", "block", "none")


@functools.cache
def engine_of(kind: str) -> Engine:
    """One engine for all cases, so that its requests also find shared prefixes and what was learned before."""
    changes = {"exit_layer_nums": (), "exit_layer_weight": ()} if kind == "none" else HEADS[kind]
    return make_engine(decoding_config(**changes), num_slots=3, prefill_chunk=7, ends={5})


@st.composite
def repeating_prompts(draw: st.DrawFn) -> list[int]:
    """Pieces that come again, so that there is something to copy."""
    pieces = draw(st.lists(st.lists(st.integers(0, 80), min_size=1, max_size=6), min_size=1, max_size=3))
    order = draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=4))
    return [token for piece in order for token in piece]


SAMPLING = st.sampled_from([
    SamplingSettings(), SamplingSettings(repetition_penalty=1.3), SamplingSettings(temperature=0.3, seed=5),
    SamplingSettings(temperature=0.8, top_k=20, frequency_penalty=0.5, presence_penalty=0.5, seed=3),
    SamplingSettings(logit_bias=((5, 2.0), (9, 1.5))),
])  # fmt: skip


@st.composite
def params_of(draw: st.DrawFn, sources: tuple[str, ...]) -> tuple[GenerationParams, GenerationParams]:
    """(with drafts, the same without)"""
    most = draw(st.integers(1, 30))
    full = GenerationParams(
        max_tokens=most, min_tokens=draw(st.integers(0, min(most, 6))), sampling=draw(SAMPLING),
        stop_tokens=tuple(draw(st.lists(st.integers(0, 80), max_size=3))), ignore_eod=draw(st.booleans()),
        top_log_probs=draw(st.sampled_from([0, 2])), echo=draw(st.sampled_from([False, False, True])),
    )  # fmt: skip
    source = draw(st.sampled_from(sources))
    drafts = replace(
        full, mode="self_speculative", draft_source=source,
        draft_exit=None if source == "ngram" else draw(st.sampled_from([None, 1, 2, 3])),
        draft_length=draw(st.sampled_from([None, None, 1, 3, 9])),
        draft_min_confidence=draw(st.sampled_from([None, None, 0.02, 1.0])),
    )  # fmt: skip
    return drafts, full


def check_equal(drafted: RequestResult, full: RequestResult) -> None:
    assert (drafted.token_ids, drafted.finish_reason) == (full.token_ids, full.finish_reason)
    for mine, theirs in zip(drafted.tokens, full.tokens, strict=True):
        assert mine.log_prob == pytest.approx(theirs.log_prob, rel=1e-4, abs=1e-5)
        assert mine.confidence == pytest.approx(theirs.confidence, rel=1e-4)
        assert [head.exit_layer for head in mine.predictions] == [None]
        assert [value for _, value in mine.top_log_probs] == pytest.approx(
            [value for _, value in theirs.top_log_probs], rel=1e-4, abs=1e-5
        )
    prompts = [[one.log_prob for one in result.prompt[1:]] for result in (drafted, full)]
    assert prompts[0] == pytest.approx(prompts[1], rel=1e-4)
    statistics = drafted.statistics
    assert sum(one.is_draft for one in drafted.tokens) == statistics.accepted <= statistics.drafted
    assert 0 <= statistics.ngram_accepted <= statistics.ngram_drafted <= statistics.drafted


@pytest.mark.parametrize("kind", HEAD_KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drafts_change_no_answer(kind: str, data: st.DataObject) -> None:
    """Up to three requests at once, of other sources and lengths, one of which may be cancelled."""
    engine = engine_of(kind)
    sources = ("ngram",) if kind == "none" else ("exit", "ngram", "both")
    asked = data.draw(st.lists(st.tuples(repeating_prompts(), params_of(sources)), min_size=1, max_size=3))
    ids = [engine.add(prompt, drafts) for prompt, (drafts, _) in asked]
    cancelled, results = None, {}
    if data.draw(st.booleans()):
        for event in [*engine.step(), *engine.step()]:
            results |= {event.request_id: event.result} if event.result is not None else {}
        cancelled = engine.cancel(ids[0])
        check_invariants(engine)
    results |= run_all(engine)
    check_invariants(engine)
    for (prompt, (_, full)), request_id in zip(asked, ids, strict=True):
        plain = engine.add(prompt, full)
        expected = run_all(engine)[plain]
        if request_id in results:
            check_equal(results[request_id], expected)
        else:
            assert request_id == ids[0] and cancelled.finish_reason == "cancelled"
            assert cancelled.token_ids == expected.token_ids[: len(cancelled.tokens)]


def test_text_that_comes_again_is_accepted_and_costs_few_steps() -> None:
    engine = make_engine(decoding_config(exit_layer_nums=(), exit_layer_weight=(), max_position_embeddings=80))
    full = run_all_of(engine, GenerationParams(max_tokens=60, ignore_eod=True))
    drafted = run_all_of(
        engine, GenerationParams(max_tokens=60, ignore_eod=True, mode="self_speculative", draft_source="ngram")
    )
    check_equal(drafted, full)
    statistics = drafted.statistics
    assert statistics.ngram_accepted == statistics.accepted > 20  # a model of random weights repeats itself
    assert statistics.layer_runs < 0.7 * full.statistics.layer_runs


def run_all_of(engine: Engine, params: GenerationParams) -> RequestResult:
    engine.add([17, 80, 3, 41, 17], params)
    return run_all(engine).popitem()[1]


def test_drafts_across_requests_are_verified_together() -> None:
    """One that would run all layers while another drafts waits; so no step has both."""
    engine, steps = make_engine(decoding_config(**HEADS["untied_norm"]), num_slots=4), []
    submit = engine.executor.submit

    def recorded(step: Step) -> None:
        steps.append({rows.phase for rows in step.rows if rows.phase in ("draft", "verify")})
        submit(step)

    engine.executor.submit = recorded
    for number in range(4):
        engine.add(
            [7 + number, 80, 3], GenerationParams(max_tokens=9, mode="self_speculative", draft_length=1 + number)
        )
        engine.step()
    assert all(len(result.tokens) == 9 for result in run_all(engine).values())
    assert {"draft"} in steps and {"verify"} in steps and {"draft", "verify"} not in steps


def test_exits_that_do_not_draft_are_asked_beside_verifications() -> None:
    """What is asked is what the exit says behind the newest row, and no one else sees it."""
    engine, asked = make_engine(decoding_config(**HEADS["untied_norm"], max_position_embeddings=180), num_slots=1), []
    submit = engine.executor.submit

    def recorded(step: Step) -> None:
        rows: Rows
        for rows in step.rows:
            asked.append([one.exit for one in rows.exits if rows.phase == "verify"])
        submit(step)

    engine.executor.submit = recorded
    params = GenerationParams(max_tokens=150, mode="self_speculative", ignore_eod=True)
    engine.add([17, 80, 3], params)
    (result,) = run_all(engine).values()
    assert any(asked) and all(len(token.predictions) == 1 for token in result.tokens)
    rates = engine._planner.draft_rates(params)
    spent = sum(map(len, asked)) * rates.observed_exit_seconds
    assert spent <= 0.02 * rates.step_seconds(1) * (len(asked) + 51)


def test_exits_that_are_for_leaving_do_not_draft() -> None:
    exits = ExitConfig(exit_layer_nums=(1, 2, 3), exit_uses=("draft", "leave", "both"))
    assert GenerationParams(mode="self_speculative").drafting_exits(exits) == (1, 3)
    with pytest.raises(ValueError, match="draft_exit is 2, an exit that is for leaving alone"):
        GenerationParams(mode="self_speculative", draft_exit=2).drafting_exits(exits)
    with pytest.raises(ValueError, match="the model's exits are for leaving alone"):
        GenerationParams(mode="self_speculative").drafting_exits(replace(exits, exit_uses=("leave",)))


def test_models_without_exits_draft_from_text_alone() -> None:
    engine = engine_of("none")
    for source in ("exit", "both"):
        with pytest.raises(
            ValueError, match=f"draft_source '{source}' needs an exit.*--draft-source ngram.*needs none"
        ):
            engine.add([1], GenerationParams(mode="self_speculative", draft_source=source))
    with pytest.raises(ValueError, match="speculation 'across_stages' needs a pipeline stage behind it"):
        engine.add([1], GenerationParams(mode="self_speculative", draft_source="ngram", speculation="across_stages"))
