"""The engine over pipeline stages in processes of their own: what it does over one worker in this process, and what the
reference says. `test_pipeline_simulator.py` shows the same in all orders of events, without processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec
import pytest

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.engine.beam_search import beam_search
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.executor.base import Executor
from megatron.early_exit.inference.executor.distributed import start_workers
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.executor.local import LocalExecutor
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings, ScoreParams
from megatron.early_exit.inference.results import RequestResult
from megatron.early_exit.inference.worker.placement import AlonePlacement
from tests.configs import VOCAB_SIZE
from tests.distributed.engines import (
    COSTS,
    Request,
    add_random_request,
    audit_and_check,
    check_against_reference,
    run_all,
    score_all,
)
from tests.distributed.reference_workers import config_of, factory, make_worker
from tests.distributed.test_engine import AUDITED, MIXED, PROMPT, early_exit
from tests.distributed.test_pipeline_simulator import compare
from tests.distributed.test_scores import check_scores

LAYOUTS = {
    "PP 2": ("untied_norm", "llama", (3, 1), 1, 64),
    "PP 4": ("pre_exit", "llama", (1, 1, 1, 1), 1, 2),
    "TP 2 x PP 2": ("block", "gpt2", (2, 2), 2, 64),
}
"""Head, style, layers of each stage, tensor-parallel ranks of each, fill credit."""
SAMPLED = SamplingSettings(temperature=1.0, top_p=0.9, seed=5)
PENALISED = SamplingSettings(temperature=0.7, top_k=9, repetition_penalty=1.3, presence_penalty=0.5, seed=2)
MODES = [
    {"mode": "full"},
    {"mode": "early_exit", "exit_thresholds": (0.02, 0.0109, 0.03)},
    {"mode": "early_exit", "exit_thresholds": (0.0,), "max_deferred": 2},
    {"mode": "self_speculative", "draft_length": 2},
    {"mode": "self_speculative", "draft_length": 2, "speculation": "draft_then_verify"},
    {"mode": "self_speculative", "draft_exit": 3},
    {"mode": "self_speculative", "draft_source": "ngram", "draft_length": 4},
    {"mode": "self_speculative", "draft_source": "ngram", "draft_length": 4, "speculation": "draft_then_verify"},
    {"mode": "self_speculative", "draft_source": "both"},
]


@dataclass
class Pair:
    """The same model on one worker here, and on stages in processes."""

    cfg: RunConfig
    local: Executor
    stages: Engine
    """The only one over the stages: outputs of requests that have ended may still come."""

    def one_worker(self) -> Engine:
        return Engine(self.local, self.cfg.exits, costs=COSTS, prefill_chunk=3)

    def answers(self, requests: list[Request]) -> list[RequestResult]:
        """Of the stages, in order; they are those of one worker and follow from the reference."""
        both = []
        for engine in (self.one_worker(), self.stages):
            ids = [engine.add(prompt, params) for prompt, params in requests]
            results = run_all(engine)
            both.append([results[one] for one in ids])
        for (prompt, params), expected, result in zip(requests, *both, strict=True):
            compare(expected, result)
            check_against_reference(self.cfg, prompt, params, result, VOCAB_SIZE)
        return both[1]


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    head, style, layers_per_stage, size, fill_credit = LAYOUTS[request.param]
    local = LocalExecutor(make_worker(AlonePlacement(), head, style)[0])
    stages = start_workers(
        factory(head, style, VOCAB_SIZE, layers_per_stage, fill_credit), Layout(size, len(layers_per_stage))
    )
    cfg = config_of(head, style)
    yield Pair(cfg, local, Engine(stages, cfg.exits, costs=COSTS, prefill_chunk=3))
    stages.close()


def test_the_description_is_that_of_one_worker_and_tells_the_stages(pair: Pair) -> None:
    described, alone = pair.stages.description, pair.local.description
    assert sum(described.layers_per_stage) == alone.num_layers and described.num_stages > 1
    same = {"layers_per_stage": (), "bytes_per_token": 0}
    assert msgspec.structs.replace(described, **same) == msgspec.structs.replace(alone, **same)
    assert 0 < described.bytes_per_token < alone.bytes_per_token


def test_requests_of_all_kinds(pair: Pair) -> None:
    pair.answers(MIXED)


@pytest.mark.parametrize("sampling", [SamplingSettings(), SAMPLED, PENALISED], ids=["greedy", "top_p", "penalties"])
def test_draws_in_all_modes(pair: Pair, sampling: SamplingSettings) -> None:
    common = {"max_tokens": 12, "sampling": sampling, "top_log_probs": 2}
    pair.answers([(PROMPT[: 1 + number], GenerationParams(**common, **mode)) for number, mode in enumerate(MODES[:4])])
    pair.answers([(PROMPT, GenerationParams(**common, **mode)) for mode in MODES])


@pytest.mark.parametrize("sampling", [SamplingSettings(), SAMPLED], ids=["greedy", "sampled"])
def test_biases_and_min_tokens(pair: Pair, sampling: SamplingSettings) -> None:
    biased = replace(sampling, logit_bias={7: 12.0, 70: 11.8, 12: 7.0, 71: 9.0, 1: -100.0})
    common = {"max_tokens": 14, "min_tokens": 6, "stop_tokens": (7, 70), "sampling": biased}
    results = pair.answers([(PROMPT, GenerationParams(**common, **mode)) for mode in MODES])
    assert all(len(result.tokens) >= 6 and result.finish_reason == "stop" for result in results)
    full, drafted = results[0], results[3:]
    assert all(result.token_ids == full.token_ids for result in drafted)
    assert min(result.statistics.accepted for result in drafted[:2]) > 0


@pytest.mark.parametrize("draft_exit", [1, 3])
def test_sampled_speculation_draws_the_full_model_s_tokens(pair: Pair, draft_exit: int) -> None:
    full = GenerationParams(max_tokens=20, sampling=SAMPLED)
    drafts = replace(full, mode="self_speculative", draft_length=3, draft_exit=draft_exit)
    plain, across, then_verified = pair.answers(
        [(PROMPT, full), (PROMPT, drafts), (PROMPT, replace(drafts, speculation="draft_then_verify"))]
    )
    assert plain.token_ids == across.token_ids == then_verified.token_ids
    assert min(across.statistics.drafted, then_verified.statistics.drafted) > 0


def test_one_request_that_speculates(pair: Pair) -> None:
    """Alone it may have several rows on their way."""
    params = GenerationParams(max_tokens=25, mode="self_speculative")
    (result,) = pair.answers([([7], params)])
    (full,) = pair.answers([([7], replace(params, mode="full"))])
    assert result.token_ids == full.token_ids
    assert result.statistics.accepted + sum(not one.is_draft for one in result.tokens) == 25


def test_the_cap_keeps_the_exit_s_tokens(pair: Pair) -> None:
    results = pair.answers([(PROMPT, early_exit([0.0], max_deferred=cap)) for cap in (0, 2, 32)])
    assert len({tuple(result.token_ids) for result in results}) == 1
    assert {token.exit_layer for result in results for token in result.tokens} == {1}


def test_echo(pair: Pair) -> None:
    params = GenerationParams(max_tokens=4, echo=True, top_log_probs=2)
    for result in pair.answers(
        [(PROMPT * 2, params), (PROMPT, replace(params, mode="early_exit", exit_thresholds=(0.0,)))]
    ):
        assert len(result.prompt) in (len(PROMPT), 2 * len(PROMPT))


def test_scores(pair: Pair) -> None:
    engine = pair.stages
    for params in (ScoreParams(top_log_probs=3, logits=True), ScoreParams(exit_layers=(2,), final=False)):
        sequences = [PROMPT * 4, [7], list(range(30)), PROMPT, [1, 2]]
        for tokens, result in zip(sequences, score_all(engine, sequences, params), strict=True):
            check_scores(pair.cfg, params, tokens, result)


def test_audits(pair: Pair) -> None:
    assert audit_and_check(pair.cfg, pair.stages, AUDITED) > 0


def test_the_next_turn_of_a_chat_finds_the_rows_of_the_last(pair: Pair) -> None:
    """All of them where the last stage has given the answer. Where exits have, it may not have said yet what is
    complete when the slot is freed; what is shared then is right in any case."""
    engine, first = pair.stages, list(range(20))
    full = GenerationParams(max_tokens=5)
    for params, least in ((full, 16), (early_exit([0.0, 0.0, 0.0], max_tokens=6), 0)):
        first = [one + 1 for one in first]
        engine.add(first, params)
        prompt = [*first, *run_all(engine).popitem()[1].token_ids, 3, 1]
        request_id = engine.add(prompt, full)
        engine.step()
        assert engine._running[request_id].num_shared >= least
        check_against_reference(pair.cfg, prompt, full, run_all(engine)[request_id], VOCAB_SIZE)


def test_observed_exits(pair: Pair) -> None:
    params = GenerationParams(max_tokens=6, observe_exits=True)
    observed, plain = pair.answers([(PROMPT, params), (PROMPT, replace(params, observe_exits=False))])
    assert observed.token_ids == plain.token_ids
    assert all(len(token.predictions) == len(pair.cfg.exits.exit_layer_nums) + 1 for token in observed.tokens)


def test_more_requests_than_slots_that_share_prefixes(pair: Pair) -> None:
    prompts = [list(range(18)) + [50 + number] for number in range(10)]
    params = [replace(GenerationParams(max_tokens=5), **MODES[number % len(MODES)]) for number in range(10)]
    pair.answers(list(zip(prompts, params, strict=True)))


def test_events_bring_each_token_once(pair: Pair) -> None:
    engine = pair.stages
    ids = [engine.add(PROMPT, GenerationParams(max_tokens=9, **mode)) for mode in MODES[:4]]
    streamed, results = {one: [] for one in ids}, {}
    while engine.has_work:
        for event in engine.step():
            streamed[event.request_id] += [token.token for token in event.tokens]
            if event.result is not None:
                results[event.request_id] = event.result
    assert streamed == {one: results[one].token_ids for one in ids}


def test_a_stop_token_and_a_stop_string_end_an_answer(pair: Pair) -> None:
    (whole,) = pair.answers([(PROMPT, GenerationParams(max_tokens=9, sampling=SAMPLED))])
    params = GenerationParams(max_tokens=9, sampling=SAMPLED, stop_tokens=(whole.token_ids[4],))
    (stopped,) = pair.answers([(PROMPT, params)])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[4]) + 1]
    engine = pair.stages
    request_id = engine.add(PROMPT, replace(params, stop_tokens=()))
    while not engine.step():
        pass
    assert engine.stop(request_id, 1).token_ids == whole.token_ids[:1]
    assert not engine.has_work


def test_a_cancelled_request_leaves_the_others_alone(pair: Pair) -> None:
    engine = pair.stages
    prompts = [[1, 2, 3 + number] for number in range(len(MODES))]
    params = [GenerationParams(max_tokens=10, **mode) for mode in MODES]
    ids = [engine.add(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    engine.step()
    for number in (1, 4, 5):
        assert engine.cancel(ids[number]).finish_reason == "cancelled"
    results = run_all(engine)
    assert set(results) == set(ids) - {ids[1], ids[4], ids[5]}
    for number in set(range(len(MODES))) - {1, 4, 5}:
        check_against_reference(pair.cfg, prompts[number], params[number], results[ids[number]], VOCAB_SIZE)


def test_beams(pair: Pair) -> None:
    mine, theirs = (
        beam_search(engine, [1, 2, 3], beam_width=4, max_tokens=8, num_return=3)
        for engine in (pair.one_worker(), pair.stages)
    )
    assert [beam.tokens for beam in mine] == [beam.tokens for beam in theirs]
    assert [beam.score for beam in mine] == pytest.approx([beam.score for beam in theirs], rel=1e-4)


def test_requests_come_and_go(pair: Pair) -> None:
    """They come and are cancelled at random; what ends by itself is what one worker answers."""
    engine = pair.stages
    generator, asked, results = random.Random(7), {}, {}
    for step in range(200):
        if generator.random() < 0.4 and step < 150:
            random.seed(generator.random())
            request_id = add_random_request(engine, pair.cfg, random.choice(["full", "early_exit", "self_speculative"]))
            request = engine._queue[request_id]
            asked[request_id] = list(request.prompt.tokens), request.params
        if generator.random() < 0.1 and engine._running:
            engine.cancel(generator.choice(list(engine._running)))
        for event in engine.step():
            if event.result is not None:
                results[event.request_id] = event.result
    results |= run_all(engine)  # how many are left depends on how fast the stages are
    assert len(results) > 15
    for request_id, result in results.items():
        check_against_reference(pair.cfg, *asked[request_id], result, VOCAB_SIZE)


def test_costs_are_measured_on_the_stages(pair: Pair) -> None:
    costs = pair.stages.executor.measure_costs()
    assert len(costs.layer_seconds) == len(COSTS.layer_seconds) and min(costs.layer_seconds) > 0
    pair.answers([(PROMPT, GenerationParams(max_tokens=3))])
