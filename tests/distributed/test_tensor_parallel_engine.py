"""The engine over two tensor-parallel worker processes: what it does over one worker in this process, and what the
reference says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec
import pytest

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.engine.beam_search import beam_search
from megatron.early_exit.inference.engine.engine import Engine, Event
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
from tests.distributed.test_scores import check_scores

MODELS = [("untied_norm", "llama", VOCAB_SIZE), ("block", "gpt2", VOCAB_SIZE), ("mlp", "llama", 40)]
"""40 ids: the second rank holds padding alone."""
SAMPLED = SamplingSettings(temperature=1.0, top_p=0.9, seed=5)
BIASES = {7: 12.0, 70: 11.8, 12: 7.0, 71: 9.0, 1: -100.0}
"""On both ranks."""


@dataclass
class Pair:
    """The same model on one worker here, and on two processes."""

    cfg: RunConfig
    vocab_size: int
    local: Executor
    parallel: Executor

    def engines(self, **changes: object) -> tuple[Engine, Engine]:
        settings = {"costs": COSTS, "prefill_chunk": 8, **changes}
        return tuple(Engine(executor, self.cfg.exits, **settings) for executor in (self.local, self.parallel))

    def answers(self, requests: list[Request]) -> list[list[RequestResult]]:
        """Of both, in order; those of the two processes follow from the reference."""
        both = []
        for engine in self.engines():
            ids = [engine.add(prompt, params) for prompt, params in requests]
            results = run_all(engine)
            both.append([results[one] for one in ids])
        for (prompt, params), result in zip(requests, both[1], strict=True):
            check_against_reference(self.cfg, prompt, params, result, self.vocab_size)
        return both


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model[0])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    head, style, vocab_size = request.param
    local = LocalExecutor(make_worker(AlonePlacement(), head, style, vocab_size)[0])
    parallel = start_workers(factory(head, style, vocab_size), Layout(tensor_parallel_size=2))
    yield Pair(config_of(head, style), vocab_size, local, parallel)
    parallel.close()


def within(vocab_size: int, requests: list[Request]) -> list[Request]:
    return [([token % vocab_size for token in prompt], params) for prompt, params in requests]


def compare(local: list[RequestResult], parallel: list[RequestResult]) -> None:
    for mine, theirs in zip(local, parallel, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.finish_reason == theirs.finish_reason
        assert [(t.exit_layer, t.is_final, t.is_draft, t.caught_up) for t in mine.tokens] == [
            (t.exit_layer, t.is_final, t.is_draft, t.caught_up) for t in theirs.tokens
        ]
        log_probs = [[t.log_prob for t in result.tokens] for result in (mine, theirs)]
        assert log_probs[0] == pytest.approx(log_probs[1], rel=1e-4, abs=1e-5)
        assert mine.statistics.layer_passes == theirs.statistics.layer_passes


def test_descriptions_are_equal(pair: Pair) -> None:
    assert pair.local.description == replace_bytes(pair.parallel.description, pair.local.description)


def replace_bytes(description: object, other: object) -> object:
    """A rank holds a part of a position's keys and values."""
    return msgspec.structs.replace(description, bytes_per_token=other.bytes_per_token)


def test_requests_of_all_kinds(pair: Pair) -> None:
    compare(*pair.answers(within(pair.vocab_size, MIXED)))


@pytest.mark.parametrize("mode", ["full", "early_exit", "self_speculative"])
@pytest.mark.parametrize("sampling", [
    SamplingSettings(), SAMPLED, replace(SAMPLED, top_p=0.0, top_k=7), replace(SAMPLED, min_p=0.2, temperature=0.5),
    replace(SAMPLED, top_p=0.0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.5),
], ids=["greedy", "top_p", "top_k", "min_p", "penalties"])  # fmt: skip
def test_draws_are_those_of_one_rank(pair: Pair, mode: str, sampling: SamplingSettings) -> None:
    requests = [
        (PROMPT[:length], GenerationParams(
            max_tokens=12, mode=mode, exit_thresholds=(0.02, 0.9, 0.03), sampling=replace(sampling, seed=length),
            top_log_probs=2, draft_length=2,
        ))
        for length in (1, 3)
    ]  # fmt: skip
    compare(*pair.answers(within(pair.vocab_size, requests)))


def test_sampled_speculation_draws_the_full_model_s_tokens(pair: Pair) -> None:
    prompt = [token % pair.vocab_size for token in PROMPT]
    full = GenerationParams(max_tokens=20, sampling=SAMPLED)
    drafts = replace(full, mode="self_speculative", draft_length=3)
    requests = [(prompt, full), (prompt, replace(drafts, draft_exit=3))]
    requests += [(prompt, replace(drafts, draft_source=source)) for source in ("ngram", "both")]
    _, (plain, *speculative) = pair.answers(requests)
    assert all(one.token_ids == plain.token_ids for one in speculative)
    assert speculative[0].statistics.drafted > 0 and speculative[1].statistics.ngram_drafted > 0


@pytest.mark.parametrize("sampling", [SamplingSettings(), SAMPLED], ids=["greedy", "sampled"])
def test_biases_and_min_tokens(pair: Pair, sampling: SamplingSettings) -> None:
    biases = {token % pair.vocab_size: bias for token, bias in BIASES.items()}
    common = {"max_tokens": 14, "min_tokens": 6, "stop_tokens": (7, 70 % pair.vocab_size)}
    modes = [
        {}, {"mode": "early_exit", "exit_thresholds": (0.0,)}, {"mode": "self_speculative", "draft_length": 3},
    ]  # fmt: skip
    params = [GenerationParams(**common, **mode, sampling=replace(sampling, logit_bias=biases)) for mode in modes]
    local, parallel = pair.answers(within(pair.vocab_size, [(PROMPT, one) for one in params]))
    compare(local, parallel)
    assert all(len(result.tokens) >= 6 and result.finish_reason == "stop" for result in parallel)
    assert parallel[2].token_ids == parallel[0].token_ids and parallel[2].statistics.accepted > 0


def test_the_cap_keeps_the_exit_s_tokens(pair: Pair) -> None:
    requests = within(pair.vocab_size, [(PROMPT, early_exit([0.0], max_deferred=cap)) for cap in (0, 2, 32)])
    _, results = pair.answers(requests)
    assert len({tuple(result.token_ids) for result in results}) == 1
    assert [sum(token.caught_up for token in result.tokens) for result in results] == [20, 6, 0]


def test_scores(pair: Pair) -> None:
    sequences = [[token % pair.vocab_size for token in one] for one in (PROMPT * 4, [7], list(range(30)))]
    params = ScoreParams(top_log_probs=3, logits=pair.vocab_size == VOCAB_SIZE)
    _, engine = pair.engines()
    if pair.vocab_size < VOCAB_SIZE:  # probabilities are those over fewer ids than the reference has
        mine, theirs = (score_all(engine, sequences, params) for engine in pair.engines())
        assert [[head.tokens for head in one.heads] for one in mine] == [
            [head.tokens for head in one.heads] for one in theirs
        ]
        return
    for tokens, result in zip(sequences, score_all(engine, sequences, params), strict=True):
        check_scores(pair.cfg, params, tokens, result)


def test_audits(pair: Pair) -> None:
    if pair.vocab_size == VOCAB_SIZE:  # the reference has so many ids
        _, engine = pair.engines()
        assert audit_and_check(pair.cfg, engine, AUDITED) > 0


def test_the_next_turn_of_a_chat_finds_the_rows_of_the_last(pair: Pair) -> None:
    """Also those that were deferred when the answer ended: they are computed again."""
    first = [token % pair.vocab_size for token in range(20)]
    params = early_exit([0.0, 0.0, 0.0], max_tokens=6)
    both = []
    for engine in pair.engines():
        engine.add(first, params)
        answer = run_all(engine).popitem()[1].token_ids
        prompt = [*first, *answer, 3, 1]
        request_id = engine.add(prompt, replace(params, mode="full", max_tokens=5))
        engine.step()
        assert engine._running[request_id].num_shared == 19  # all rows of the first prompt but its last
        result = run_all(engine)[request_id]
        check_against_reference(pair.cfg, prompt, replace(params, mode="full"), result, pair.vocab_size)
        both.append([result])
    compare(*both)


def test_a_cancelled_request_leaves_the_others_alone(pair: Pair) -> None:
    both = []
    for engine in pair.engines():
        ids = [engine.add([1, 2, 3 + i], GenerationParams(max_tokens=10)) for i in range(6)]
        engine.step()
        assert engine.cancel(ids[1]).finish_reason == engine.cancel(ids[5]).finish_reason == "cancelled"
        results = run_all(engine)
        assert set(results) == set(ids) - {ids[1], ids[5]}
        assert not engine.has_work
        both.append([results[one] for one in sorted(results)])
    compare(*both)


def test_beams(pair: Pair) -> None:
    mine, theirs = (
        beam_search(engine, [1, 2, 3], beam_width=4, max_tokens=8, num_return=3) for engine in pair.engines()
    )
    assert [beam.tokens for beam in mine] == [beam.tokens for beam in theirs]
    assert [beam.score for beam in mine] == pytest.approx([beam.score for beam in theirs], rel=1e-4)


def test_requests_come_and_go(pair: Pair) -> None:
    """Both engines get the same requests and cancellations; after every step the same has become of them."""
    engines = pair.engines(ends={5})
    generators = [random.Random(7), random.Random(7)]
    finished = 0
    for step in range(120):
        news = []
        for engine, generator in zip(engines, generators, strict=True):
            if generator.random() < 0.4 and step < 90:
                random.seed(generator.random())
                mode = random.choice(["full", "early_exit", "self_speculative"])
                add_random_request(engine, pair.cfg, mode, pair.vocab_size)
            if generator.random() < 0.1 and engine._running:
                engine.cancel(generator.choice(list(engine._running)))
            news.append(engine.step())
        assert [summary(event) for event in news[0]] == [summary(event) for event in news[1]]
        finished += sum(event.result is not None for event in news[0])
    assert finished > 15
    for engine in engines:
        run_all(engine)


def summary(event: Event) -> tuple:
    tokens = [(token.token, token.exit_layer, token.is_final) for token in event.tokens]
    return event.request_id, tokens, event.result and (event.result.finish_reason, event.result.token_ids)


def test_costs_are_measured_on_the_workers(pair: Pair) -> None:
    _, engine = pair.engines(costs=None)
    engine.add([1, 2, 3], GenerationParams(max_tokens=4))
    engine.prepare(GenerationParams(mode="self_speculative"))
    assert engine._planner.measured_costs is None  # not while somebody waits
    run_all(engine)
    engine.prepare(GenerationParams(mode="self_speculative"))
    assert min(engine._planner.measured_costs.layer_seconds) > 0
