"""Exits behind approximate heads, over a shortlist: what is decided, and what never changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.executor.local import LocalExecutor
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.inference.results import RequestResult
from megatron.early_exit.inference.shortlist import Shortlist
from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.inference.worker.cost_measurement import measure_costs
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.linear import Int8Linear, fastest_linear
from megatron.early_exit.inference.worker.worker import Worker
from tests.configs import VOCAB_SIZE
from tests.distributed.engines import (
    COSTS,
    check_against_reference,
    check_invariants,
    reference_over,
    reference_weights,
    run_all,
)
from tests.distributed.parallel_model import layout
from tests.distributed.workers import run_distributed
from tests.reference_checkpoint import decoding_config

PROMPT = [5, 17, 80, 3, 41]
SHORTLISTS = {"of both ranks": tuple(range(0, 96, 3)), "of one rank": (1, 2, 40)}
SAMPLED = SamplingSettings(temperature=1.0, seed=5)


def make_decoder(cfg: RunConfig, shortlist: tuple[int, ...] = (), **changes: object) -> Decoder:
    weights = reference_weights(cfg, shortlist=shortlist, **changes)
    return Decoder(weights, num_slots=3, vocab_size=VOCAB_SIZE)


def answer(cfg: RunConfig, params: list[GenerationParams], shortlist: tuple[int, ...] = ()) -> list[RequestResult]:
    with layout(cfg):
        engine = Engine(LocalExecutor(Worker(make_decoder(cfg, shortlist))), cfg.exits, costs=COSTS)
        for one in params:
            engine.add(PROMPT, one)
        results = run_all(engine)
        check_invariants(engine)
        return [results[i] for i in sorted(results)]


def compare_questions(cfg: RunConfig, shortlist: tuple[int, ...]) -> None:
    """The cheap head says of its ids what the exit's own head says, among themselves."""
    with layout(cfg), torch.inference_mode():
        decoder = make_decoder(cfg, shortlist)
        rows = decoder.attention_metadata([Segment(0, 0, len(PROMPT))])
        hidden = decoder.run_layers(decoder.embed(PROMPT, rows), rows, 0, 1)[0]
        cheap, own = decoder.approximate_output(0, hidden), decoder.exit_output(0, hidden)
        assert decoder.has_approximate_heads
        ids = list(shortlist)
        others = sorted(set(range(VOCAB_SIZE)) - set(ids))
        for row in range(len(PROMPT)):
            logits = own.logits(row)[:VOCAB_SIZE]
            assert (cheap.logits(row)[ids] - logits[ids]).abs().max() < 1e-5
            assert torch.isneginf(cheap.logits(row)[others]).all()
            among = cheap.logits(row)[ids].log_softmax(-1)
            assert cheap.token(row) == ids[int(among.argmax())]
            assert cheap.max_log_prob(row) == pytest.approx(among.max().item(), abs=1e-5)
            assert torch.allclose(torch.tensor(cheap.log_probs_of([row] * len(ids), ids)), among, atol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", SHORTLISTS)
def test_what_a_cheap_head_says(kind: str, world_size: int) -> None:
    cfg = decoding_config(tensor_model_parallel_size=world_size, use_exit_norm=True)
    run_distributed(world_size, compare_questions, cfg=cfg, shortlist=SHORTLISTS[kind])


def never_falsely_confident(cfg: RunConfig, shortlist: tuple[int, ...]) -> None:
    thresholds = (0.0122, 0.0123, 0.0122)
    params = [
        GenerationParams(
            max_tokens=20, mode="early_exit", exit_thresholds=thresholds, sampling=SamplingSettings(1.0, seed=seed)
        )
        for seed in range(6)
    ]
    taken = 0
    for result in answer(cfg, params, shortlist):
        # What it says of tokens that left is the exits' own word.
        logits = reference_over(cfg, PROMPT + result.token_ids[:-1])[1]
        for row, token in enumerate(result.tokens, start=len(PROMPT) - 1):
            head = None if token.is_final else token.exit_layer
            log_probs = logits[head][row].log_softmax(-1)
            assert token.confidence == pytest.approx(log_probs.max().exp().item(), rel=1e-5)
            assert token.log_prob == pytest.approx(log_probs[token.token].item(), rel=1e-5, abs=1e-6)
            if head is not None:
                taken += 1
                assert token.confidence >= thresholds[cfg.exits.index_of(head)]
            assert not token.predictions[-1].is_approximate
    assert taken > 5


@pytest.mark.parametrize("kind", SHORTLISTS)
def test_exits_are_taken_only_where_their_own_heads_are_sure(kind: str) -> None:
    cfg = decoding_config(use_exit_norm=True, untie_exit_output_weights=True)
    run_distributed(1, never_falsely_confident, cfg=cfg, shortlist=SHORTLISTS[kind])


def test_a_shortlist_of_everything_changes_nothing() -> None:
    cfg = decoding_config(use_exit_norm=True)
    params = [GenerationParams(max_tokens=20, mode="early_exit", exit_thresholds=(0.016,), sampling=SAMPLED)]
    (with_list,) = run_distributed(1, answer, cfg=cfg, params=params, shortlist=tuple(range(VOCAB_SIZE)))[0]
    (without,) = run_distributed(1, answer, cfg=cfg, params=params)[0]
    assert with_list.token_ids == without.token_ids
    assert [t.exit_layer for t in with_list.tokens] == [t.exit_layer for t in without.tokens]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", SHORTLISTS)
def test_cheap_drafts_give_the_full_model_s_tokens(kind: str, world_size: int) -> None:
    cfg = decoding_config(tensor_model_parallel_size=world_size, use_exit_norm=True)
    params = [
        GenerationParams(max_tokens=20, mode=mode, draft_length=3, sampling=sampling)
        for mode in ("full", "self_speculative")
        for sampling in (SamplingSettings(), SamplingSettings(repetition_penalty=1.4))
    ]
    # Drafts may be one token alone, whatever the shortlist: it is biased, and the others of the smallest one are ends.
    chosen = SHORTLISTS[kind][-1]
    biased = SamplingSettings(logit_bias={chosen: 100})
    params += [
        replace(one, sampling=biased, min_tokens=20, stop_tokens=(1, 2), max_tokens=20)
        for one in (params[0], params[2])
    ]
    for rank in run_distributed(world_size, answer_and_check, cfg=cfg, params=params, shortlist=SHORTLISTS[kind]):
        full, penalised, drafted, penalised_drafted, forced, forced_drafted = (result.token_ids for result in rank)
        assert (full, penalised) == (drafted, penalised_drafted)
        assert forced == forced_drafted == [chosen] * 20
        assert rank[-1].statistics.accepted == rank[-1].statistics.drafted > 10


@pytest.mark.parametrize("kind", SHORTLISTS)
def test_no_exit_is_taken_because_of_a_bias(kind: str) -> None:
    cfg = decoding_config(use_exit_norm=True, untie_exit_output_weights=True)
    common = {"max_tokens": 20, "mode": "early_exit", "sampling": SamplingSettings(logit_bias={3: 100})}
    params = [GenerationParams(**common, exit_thresholds=(threshold,)) for threshold in (0.0122, 0.9)]
    params += [GenerationParams(**common | {"mode": "full"})]
    own = run_distributed(1, answer_and_check, cfg=cfg, params=params)[0]
    cheap = run_distributed(1, answer, cfg=cfg, params=params, shortlist=SHORTLISTS[kind])[0]
    for mine, theirs in zip(cheap, own, strict=True):
        assert mine.token_ids == theirs.token_ids == [3] * 20
        for token, of_own_heads in zip(mine.tokens, theirs.tokens, strict=True):
            assert token.exit_layer >= of_own_heads.exit_layer
    assert all(token.is_final for token in cheap[1].tokens)


def answer_and_check(
    cfg: RunConfig, params: list[GenerationParams], shortlist: tuple[int, ...] = ()
) -> list[RequestResult]:
    results = answer(cfg, params, shortlist)
    with layout(cfg):
        for one, result in zip(params, results, strict=True):
            check_against_reference(cfg, PROMPT, one, result, VOCAB_SIZE)
    return results


def answer_in_int8(cfg: RunConfig) -> None:
    """The whole decoder in int8: what it computes is what its rounded weights compute, within bf16."""
    tokens = list(range(3, 23))
    with layout(cfg), torch.inference_mode():
        outputs = []
        for make_linear in (fastest_linear, Int8Linear):
            decoder = make_decoder(cfg, make_linear=make_linear)
            rows = decoder.attention_metadata([Segment(0, 0, 20)])
            hidden = decoder.run_layers(decoder.embed(tokens, rows), rows, 0, decoder.num_layers)[0]
            outputs.append(decoder.final_output(hidden).logits(19))
        exact, rounded = outputs
        assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_whole_decoder_in_int8(world_size: int) -> None:
    cfg = decoding_config(tensor_model_parallel_size=world_size)
    run_distributed(world_size, answer_in_int8, cfg=cfg)


def observe(cfg: RunConfig, shortlist: tuple[int, ...] = ()) -> None:
    """What observed exits report is what early exit compares with thresholds, along the full model's own answer."""
    with layout(cfg):
        engine = Engine(LocalExecutor(Worker(make_decoder(cfg, shortlist))), cfg.exits)
        prompts = [PROMPT, [1, 2], [90] * 9]
        full = GenerationParams(max_tokens=4, ignore_eod=True)
        plain = [engine.add(prompt, full) for prompt in prompts]
        observed = [engine.add(prompt, replace(full, observe_exits=True)) for prompt in prompts]
        results = run_all(engine)
        for prompt, without, one in zip(prompts, plain, observed, strict=True):
            result = results[one]
            assert result.token_ids == results[without].token_ids
            assert all(token.is_final for token in result.tokens)
            _, logits = reference_over(cfg, prompt + result.token_ids[:-1])
            for index, token in enumerate(result.tokens):
                *exits, final = token.predictions
                assert [one.exit_layer for one in exits] == list(cfg.exits.exit_layer_nums)
                assert final.exit_layer is None and final.token == token.token
                for one in exits:
                    exact = logits[one.exit_layer][len(prompt) - 1 + index, :VOCAB_SIZE].softmax(-1)
                    assert one.token == exact.argmax() and not one.is_approximate
                    if not shortlist:
                        assert one.confidence == pytest.approx(exact.max().item(), rel=1e-4)
                    # Rounding depends on the batch, so not the very next numbers.
                    for threshold, is_taken in ((one.confidence * 0.9999, True), (one.confidence * 1.0001, False)):
                        again = engine.add(prompt + result.token_ids[:index], GenerationParams(
                            max_tokens=1, mode="early_exit", exit_layers=(one.exit_layer,), exit_thresholds=(threshold,)
                        ))  # fmt: skip
                        (first,) = run_all(engine)[again].tokens
                        assert first.is_final != is_taken, (one, threshold)
        check_invariants(engine)


@pytest.mark.parametrize("head", [{}, {"use_exit_mlp": True}, {"use_exit_block": True}, {"pre_exit": True}], ids=str)
def test_observed_exits_say_what_early_exit_would_compare(head: dict) -> None:
    run_distributed(1, observe, cfg=decoding_config(use_exit_norm=True, **head))


def test_observed_exits_behind_an_approximate_head() -> None:
    run_distributed(1, observe, cfg=decoding_config(use_exit_norm=True), shortlist=SHORTLISTS["of both ranks"])


def test_observing_needs_the_full_model() -> None:
    with pytest.raises(ValueError, match="observe_exits needs mode 'full', not 'early_exit'"):
        GenerationParams(mode="early_exit", observe_exits=True)


def test_a_shortlist_survives_a_round_trip(tmp_path: Path) -> None:
    assert Shortlist.load(tmp_path) is None
    shortlist = Shortlist.of_counts(np.array([5, 0, 9, 1, 5]), 3)
    assert shortlist.ids.tolist() == [0, 2, 4] and shortlist.coverage == 19 / 20
    shortlist.save(tmp_path)
    loaded = Shortlist.load(tmp_path)
    assert loaded.coverage == shortlist.coverage and loaded.ids.tolist() == [0, 2, 4]
    assert loaded.digest == shortlist.digest != Shortlist.of_counts(np.array([5, 0, 9, 1, 5]), 2).digest
    with pytest.raises(ValueError, match="the corpus is empty"):
        Shortlist.of_counts(np.zeros(5), 3)
    (tmp_path / "exit_shortlist.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read"):
        Shortlist.load(tmp_path)


def plan(cfg: RunConfig) -> None:
    with layout(cfg):
        decoder = make_decoder(cfg, SHORTLISTS["of both ranks"])
        measured = measure_costs(decoder, repetitions=1)
        assert measured.has_approximate_heads and min(measured.layer_seconds + measured.approximate_seconds) > 0
        scores = np.tile([0.1, 0.9, 0.9], (10, 1))
        engine = Engine(LocalExecutor(Worker(decoder)), cfg.exits, costs=COSTS, exit_scores={"head": scores})
        engine.add(PROMPT, GenerationParams(max_tokens=4, mode="early_exit", exit_thresholds=(0.0,), plan_exits=True))
        engine.add(
            PROMPT,
            GenerationParams(
                max_tokens=4, mode="early_exit", exit_thresholds=(0.99,), exit_layers=(1, 3), plan_exits=True
            ),
        )
        first, second = run_all(engine).values()
        # At threshold 0 all tokens leave at the first exit; from 0.99 on none would, so none is asked.
        assert first.exit_layers == (1,) and {t.exit_layer for t in first.tokens} == {1}
        assert second.exit_layers == () and all(t.is_final and not t.caught_up for t in second.tokens)
        with pytest.raises(ValueError, match="plan_exits needs a calibration"):
            engine = Engine(LocalExecutor(Worker(decoder)), cfg.exits)
            engine.add(PROMPT, GenerationParams(mode="early_exit", plan_exits=True))


def test_planned_exits() -> None:
    run_distributed(1, plan, cfg=decoding_config(use_exit_norm=True))


def plan_again(cfg: RunConfig) -> list[tuple[int, ...]]:
    """The exits that one request asks, with 0 to 3 others that run with it, and alone again."""
    with layout(cfg):
        decoder = make_decoder(cfg)
        # Half of the tokens leave at the first exit: one request then saves half of three layers and a head, which
        # costs a head; two of them leave together a quarter of the time.
        scores = np.array([[0.9, 0.0, 0.0], [0.1, 0.0, 0.0]] * 5)
        engine = Engine(LocalExecutor(Worker(decoder)), cfg.exits, costs=COSTS, exit_scores={"head": scores})
        planned = GenerationParams(
            max_tokens=30, mode="early_exit", exit_thresholds=(0.5,), exit_layers=(1,), plan_exits=True
        )
        engine.add(PROMPT, planned)
        enabled = []
        enabled_exits = lambda engine: tuple(one.exit for one in engine._running[0].thresholds)
        for _ in range(3):
            engine.step()
            enabled.append(enabled_exits(engine))
            engine.add(PROMPT[:2], GenerationParams(max_tokens=30))
        for other in [*engine._running, *engine._queue][1:]:
            engine.cancel(other)
        engine.step()
        enabled.append(enabled_exits(engine))
        result = run_all(engine)[0]
        assert {token.exit_layer for token in result.tokens if not token.is_final} <= set(result.exit_layers)
        return enabled


@pytest.mark.parametrize("head", [{}, {"use_exit_block": (False, True, True)}], ids=["", "another exit has a block"])
def test_exits_are_planned_again_when_others_come_and_go(head: dict[str, object]) -> None:
    (enabled,) = run_distributed(1, plan_again, cfg=decoding_config(use_exit_norm=True, **head))
    assert enabled == [(0,), (), (), (0,)]
