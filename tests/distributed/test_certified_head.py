"""Answers with certified heads: those of the exact ones, token for token, in all modes and layouts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.early_exit.checkpoint.writing import write_checkpoint
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.executor.local import LocalExecutor
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.inference.text_engine import RequestOutput
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.worker import Worker
from tests.distributed.engines import COSTS, decoder_of, reference_weights
from tests.distributed.parallel_model import layout
from tests.distributed.test_llm import Characters
from tests.distributed.workers import run_distributed
from tests.reference_checkpoint import decoding_config, reference_description, reference_tensors

FULL = GenerationParams(max_tokens=14, ignore_eod=True, log_probs=False)
EXITS = replace(FULL, mode="early_exit", exit_thresholds=(0.0114, 0.0115, 0.0117))
DRAFTS = replace(FULL, mode="self_speculative", draft_exit=1, draft_length=3)
GREEDY = (FULL, EXITS, replace(EXITS, exit_thresholds=(1.0,)), DRAFTS, replace(DRAFTS, draft_exit=3), FULL)
PROMPTS = [[5, 17, 80, 3, 41], [1], [9, 8, 7, 6], [2, 3, 2, 3, 2], [60], [50, 51]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied exits with temperatures."""
    folder = tmp_path_factory.mktemp("checkpoint")
    cfg = decoding_config(use_exit_norm=True, untie_exit_output_weights=True, exit_layer_temperature=(1.0, 0.7, 1.3))
    description = replace(
        reference_description(cfg), dtype="fp32", tokenizer=TokenizerConfig("NullTokenizer", None, 93)
    )
    write_checkpoint(folder, description, reference_tensors(cfg))
    return folder


def load(checkpoint: Path, certified_head: str = "on", **settings: object) -> LLM:
    return LLM.load(str(checkpoint), max_requests=3, certified_head=certified_head, **settings)


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> LLM:
    return load(checkpoint, "off")


@pytest.fixture(scope="module")
def certified(checkpoint: Path) -> LLM:
    return load(checkpoint)


def same(expected: list[RequestOutput], answers: list[RequestOutput]) -> None:
    for theirs, ours in zip(expected, answers, strict=True):
        assert ours.error is None
        assert ours.result.token_ids == theirs.result.token_ids
        assert [t.exit_layer for t in ours.tokens] == [t.exit_layer for t in theirs.tokens]
        assert ours.result.statistics.accepted == theirs.result.statistics.accepted


def share_certified(answers: list[RequestOutput]) -> float:
    """Of the final head's tokens."""
    final = [token for one in answers for token in one.tokens if token.is_final]
    return sum(token.log_prob is None for token in final) / len(final)


def test_greedy_tokens_of_all_modes(exact: LLM, certified: LLM) -> None:
    expected, answers = (llm.generate(PROMPTS, list(GREEDY)) for llm in (exact, certified))
    same(expected, answers)
    assert share_certified(expected) == 0 and share_certified(answers) > 0.8
    left = [token for token in answers[1].tokens if not token.is_final]
    assert left and all(token.confidence >= 0.0114 for token in left), "an exit that decides knows how sure it is"
    for token in answers[0].tokens:
        if token.log_prob is None:
            assert token.confidence is None and token.predictions[-1].confidence is None
    usage = answers[0].result.usage[-1]
    assert usage.tokens == 14 and usage.mean_confidence is None


def test_drafts_come_from_certified_heads(exact: LLM, certified: LLM) -> None:
    """Of exits, too, each with its temperature."""
    for draft_exit in (1, 2, 3):
        params = replace(DRAFTS, draft_exit=draft_exit)
        head = decoder_of(certified.engine).exits[draft_exit - 1].certified
        before = head.counts.batches - head.counts.refused
        same(exact.generate(PROMPTS, params), certified.generate(PROMPTS, params))
        assert head.counts.batches - head.counts.refused > before + 5


def test_drafts_of_requests_for_the_most_probable_tokens(exact: LLM, certified: LLM) -> None:
    """The answer's tokens have them, and drafts, of which nobody sees them, still come from certified heads."""
    params = replace(DRAFTS, log_probs=True, top_log_probs=2)
    head = decoder_of(certified.engine).exits[0].certified
    before = head.counts.batches
    expected, answers = (llm.generate(PROMPTS, replace(params, draft_exit=1)) for llm in (exact, certified))
    same(expected, answers)
    assert head.counts.batches > before
    for theirs, ours in zip(expected, answers, strict=True):
        assert [token.top_log_probs for token in ours.tokens] == [token.top_log_probs for token in theirs.tokens]


def check_against_exact(llm: LLM) -> float:
    """Requests for log-probabilities are answered by exact heads, the others with the same tokens. Returns the share of
    certified ones. (Of ranks and types the last bits of the layers' sums are their own, so `exact` is no measure.)"""
    expected = llm.generate(PROMPTS, [replace(params, log_probs=True) for params in GREEDY])
    answers = llm.generate(PROMPTS, list(GREEDY))
    same(expected, answers)
    assert share_certified(expected) == 0
    return share_certified(answers)


@pytest.mark.parametrize("settings", [{"pipeline_parallel_size": 2}, {"dtype": "bf16"}], ids=str)
def test_pipeline_stages_and_bf16(checkpoint: Path, settings: dict[str, object]) -> None:
    with closing(load(checkpoint, "on", **settings)) as llm:
        assert check_against_exact(llm) > (0.5 if "dtype" in settings else 0.8)


def of_ranks(cfg: RunConfig) -> float:
    with layout(cfg):
        decoder = Decoder(reference_weights(cfg, certified_heads="on"), num_slots=3, vocab_size=94)
        engine = Engine(LocalExecutor(Worker(decoder)), cfg.exits, costs=COSTS)
        share = check_against_exact(LLM(engine, Characters(), cfg.exits))
        counts = [head.counts for head in decoder.weights.certified_heads]
        assert len(counts) == 4 and all(one.batches - one.refused > 5 for one in (counts[0], counts[1], counts[3]))
        return share


def test_tensor_parallel_ranks() -> None:
    cfg = decoding_config(tensor_model_parallel_size=2, use_exit_norm=True, untie_exit_output_weights=True)
    shares = run_distributed(2, of_ranks, cfg=cfg)
    assert shares[0] == shares[1] > 0.8


def test_what_is_reported_comes_from_the_exact_head(exact: LLM, certified: LLM) -> None:
    """Log-probabilities, also beside requests that want none; samples, penalties, biases."""
    sampled = SamplingSettings(temperature=1.0, seed=4)
    params = [
        replace(FULL, log_probs=True), replace(FULL, log_probs=True, top_log_probs=3), replace(FULL, sampling=sampled),
        replace(FULL, sampling=SamplingSettings(repetition_penalty=1.3)),
        replace(FULL, sampling=SamplingSettings(logit_bias=((7, 1.5),))), replace(FULL, min_tokens=9, stop_tokens=(3,)),
    ]  # fmt: skip
    for prompt, one in zip(PROMPTS, params, strict=True):
        expected, (answer,) = exact.generate(prompt, one), certified.generate(prompt, one)
        same(expected, [answer])
        if one.min_tokens == 0:
            assert all(token.log_prob == theirs.log_prob for token, theirs in zip(answer.tokens, expected[0].tokens))
            assert all(
                token.top_log_probs == theirs.top_log_probs for token, theirs in zip(answer.tokens, expected[0].tokens)
            )


@pytest.fixture
def broken(certified: LLM) -> Iterator[LLM]:
    yield certified
    for keys in decoder_of(certified.engine).cache.layers():
        keys.zero_()


def test_a_request_whose_logits_are_not_finite_fails_alone(broken: LLM) -> None:
    engine = broken.engine
    expected = [broken.generate(prompt, FULL)[0].result.token_ids for prompt in PROMPTS[:3]]
    ids = [engine.add(prompt, FULL) for prompt in PROMPTS[:3]]
    engine.step()
    with torch.inference_mode():
        decoder_of(engine).cache.layers()[1][engine._running[ids[1]].slot, :2] = torch.nan
    results = {}
    while engine.has_work:
        results |= {event.request_id: event.result for event in engine.step() if event.result is not None}
    assert "not finite" in results[ids[1]].error
    assert [results[ids[index]].token_ids for index in (0, 2)] == [expected[0], expected[2]]
