"""Requests that take over rows of others, on real engines: they answer and cache what the reference computes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.inference.results import RequestResult
from tests.configs import VOCAB_SIZE
from tests.distributed.engines import (
    check_against_reference,
    check_caches,
    check_invariants,
    decoder_of,
    make_engine,
    run_all,
)
from tests.distributed.parallel_model import layout
from tests.distributed.workers import run_distributed
from tests.reference_checkpoint import HEADS, decoding_config

NUM_POSITIONS = 120
CHUNK = 7
SYSTEM = [(11 * number + 3) % VOCAB_SIZE for number in range(40)]
SAMPLED = SamplingSettings(temperature=1.0, seed=5)
THRESHOLDS = {"tied": 0.014, "untied_norm": 0.0144, "block": 0.0142, "pre_exit_block": 0.0109}
"""By kind of exit: with the reference's weights some exits are more confident at some tokens."""
MODES = {
    "full": {},
    "early_exit": {"mode": "early_exit", "max_deferred": 4},
    "self_speculative": {"mode": "self_speculative", "draft_length": 3, "draft_exit": 2},
}


def on_one(function: Callable, **kwargs: object) -> object:
    return run_distributed(1, function, **kwargs)[0]


def config(**changes: object) -> RunConfig:
    return decoding_config(max_position_embeddings=NUM_POSITIONS, **changes)


def params_of(mode: str, **changes: object) -> GenerationParams:
    return GenerationParams(**{"max_tokens": 10, "sampling": SAMPLED, **MODES[mode], **changes})


def serve(cfg: RunConfig, engine: Engine, prompt: list[int], params: GenerationParams) -> tuple[int, RequestResult]:
    """(rows that it did not compute, its result), checked against the reference step for step."""
    request_id, num_shared, results = engine.add(prompt, params), None, {}
    while engine.has_work:
        results |= {event.request_id: event.result for event in engine.step() if event.result is not None}
        if request_id in engine._running:
            num_shared = engine._running[request_id].num_shared
        check_invariants(engine)
        check_caches(cfg, engine)
    check_against_reference(cfg, prompt, params, results[request_id], VOCAB_SIZE)
    return num_shared, results[request_id]


# Chats.


def chat(cfg: RunConfig, mode: str, threshold: float) -> list[tuple[int, int, RequestResult]]:
    """(rows of earlier turns, rows of them that were shared, result) of each turn."""
    with layout(cfg):
        engine = make_engine(cfg, num_slots=2, prefill_chunk=CHUNK)
        ids, turns, known = SYSTEM, [], 0
        for turn in range(3):
            num_shared, result = serve(cfg, engine, ids, params_of(mode, exit_thresholds=(threshold,)))
            turns.append((known, num_shared, result))
            known = len(ids) + len(result.tokens) - 1
            ids = ids + result.token_ids + [turn + 7] * 5
        return turns


@pytest.mark.parametrize("head", ["untied_norm", "block", "pre_exit_block"])
@pytest.mark.parametrize("mode", MODES)
def test_turns_of_a_chat(mode: str, head: str) -> None:
    turns = on_one(chat, cfg=config(**HEADS[head]), mode=mode, threshold=THRESHOLDS[head])
    assert turns[0][1] == 0
    for known, num_shared, _ in turns[1:]:
        # All rows but those that were deferred at the answer's end.
        assert known - (4 if mode == "early_exit" else 0) <= num_shared <= known
    if mode == "early_exit":
        exits = {token.exit_layer for *_, result in turns for token in result.tokens}
        assert len(exits) > 1
    if mode == "self_speculative":
        assert all(result.statistics.accepted < result.statistics.drafted for *_, result in turns)


def shared_after_deferred(cfg: RunConfig) -> int:
    with layout(cfg):
        engine = make_engine(cfg)
        params = params_of("early_exit", exit_thresholds=(0.0,), max_deferred=32)
        _, result = serve(cfg, engine, SYSTEM, params)
        return serve(cfg, engine, SYSTEM + result.token_ids + [1], params_of("full"))[0]


@pytest.mark.parametrize("head", ["tied", "block"])
def test_deferred_rows_at_the_end_of_an_answer_are_computed_again(head: str) -> None:
    assert on_one(shared_after_deferred, cfg=config(**HEADS[head])) == len(SYSTEM) - 1


def rows_by_exits(cfg: RunConfig) -> list[int]:
    """Rows that requests with different exits share, one after the other."""
    with layout(cfg):
        engine = make_engine(cfg, num_slots=3)
        shared = []
        for layers in ((2,), (2,), (1, 2), (1,), (1, 2, 3), ()):
            params = params_of("early_exit" if layers else "full", exit_layers=layers)
            shared.append(serve(cfg, engine, [*SYSTEM, len(shared)], params)[0])
        return shared


def test_blocks_see_every_row() -> None:
    assert on_one(rows_by_exits, cfg=config(**HEADS["block"])) == [0, 40, 0, 40, 0, 40]
    assert on_one(rows_by_exits, cfg=config(**HEADS["tied"])) == [0, 40, 40, 40, 40, 40]


# Donors that end early, or badly.


def cancelled_donor(cfg: RunConfig, threshold: float) -> tuple[int, list[int]]:
    """(rows that the donor computed, rows that each of two others with its prompt shared)"""
    with layout(cfg):
        engine = make_engine(cfg, num_slots=3, prefill_chunk=CHUNK)
        params = params_of("early_exit", exit_thresholds=(threshold,))
        first, *others = (engine.add(SYSTEM, params) for _ in range(3))
        for _ in range(3):
            engine.step()
        assert engine.num_running == 1
        num_computed = engine._running[first].complete_to
        engine.cancel(first)
        shared, results = {}, {}
        while engine.has_work:
            results |= {event.request_id: event.result for event in engine.step() if event.result is not None}
            shared |= {request_id: one.num_shared for request_id, one in engine._running.items()}
            check_caches(cfg, engine)
        for request_id in others:
            check_against_reference(cfg, SYSTEM, params, results[request_id], VOCAB_SIZE)
        return num_computed, [shared[request_id] for request_id in others]


@pytest.mark.parametrize("head", ["tied", "block"])
def test_a_donor_that_is_cancelled_leaves_what_it_has_computed(head: str) -> None:
    assert on_one(cancelled_donor, cfg=config(**HEADS[head]), threshold=THRESHOLDS[head]) == (21, [21, 39])


def spoiled_donor(cfg: RunConfig) -> list[tuple[str, int]]:
    """(finish reason, rows shared) of one request whose keys become NaN and of the next with its prompt."""
    with layout(cfg):
        engine = make_engine(cfg, num_slots=1)
        request_id = engine.add(SYSTEM, params_of("full"))
        engine.step()
        decoder_of(engine).cache.layers()[1][0, 2:4] = torch.nan
        reason = run_all(engine)[request_id].finish_reason
        num_shared, result = serve(cfg, engine, SYSTEM, params_of("full"))
        return [(reason, 0), (result.finish_reason, num_shared)]


def test_rows_that_are_not_finite_are_not_shared() -> None:
    assert on_one(spoiled_donor, cfg=config()) == [("error", 0), ("max_tokens", 0)]


def poisoned_prompt(cfg: RunConfig, poison: int) -> list[tuple[int, str]]:
    """(slot, finish reason) of two requests, the second in the slot of one that was cancelled amid a prompt which is
    not finite."""
    with layout(cfg):
        engine = make_engine(cfg, num_slots=2, prefill_chunk=CHUNK)
        decoder_of(engine).weights.embedding.words[poison] = torch.nan
        first = engine.add([poison] * 30, params_of("full"))
        engine.step()
        engine.step()
        engine.cancel(first)
        # Their rows attend together, over as many keys as the longer one has.
        ids = [engine.add(prompt, params_of("full")) for prompt in (SYSTEM, [1, 2])]
        slots, results = {}, {}
        while engine.has_work:
            results |= {event.request_id: event.result for event in engine.step() if event.result is not None}
            slots |= {request_id: request.slot for request_id, request in engine._running.items()}
        assert poison not in SYSTEM + [token for one in ids for token in results[one].token_ids]
        return [(slots[one], results[one].finish_reason) for one in ids]


def test_a_slot_of_rows_that_are_not_finite_harms_no_later_request() -> None:
    cfg = config(untie_embeddings_and_output_weights=True)
    assert on_one(poisoned_prompt, cfg=cfg, poison=8) == [(1, "max_tokens"), (0, "max_tokens")]


# Whatever comes.


def fuzz(cfg: RunConfig, threshold: float, seed: int, num_steps: int) -> tuple[int, int]:
    """(requests that shared rows, rows shared) of many that come, go and are cancelled."""
    chance = random.Random(seed)
    with layout(cfg):
        engine = make_engine(cfg, num_slots=3, prefill_chunk=9, ends={5})
        known, asked, shared = [SYSTEM], {}, {}
        for step in range(num_steps):
            if chance.random() < 0.5 and engine.num_waiting < 4:
                base = chance.choice(known)[:90]
                prompt = base[: chance.randrange(len(base) // 2, len(base) + 1)] + [chance.randrange(VOCAB_SIZE)]
                params = random_params(chance, list(cfg.exits.exit_layer_nums), threshold)
                asked[engine.add(prompt, params)] = prompt, params
            if chance.random() < 0.05 and engine._running:
                engine.cancel(chance.choice(list(engine._running)))
            for event in engine.step():
                if event.result is not None:
                    prompt, params = asked[event.request_id]
                    assert event.result.finish_reason != "error", event.result.error
                    known.append(prompt + event.result.token_ids)
                    check_against_reference(cfg, prompt, params, event.result, VOCAB_SIZE)
            shared |= {request_id: one.num_shared for request_id, one in engine._running.items() if one.num_shared}
            check_invariants(engine)
            if step % 5 == 0:
                check_caches(cfg, engine)
        return len(shared), sum(shared.values())


def random_params(chance: random.Random, layers: list[int], threshold: float) -> GenerationParams:
    return params_of(
        chance.choice(list(MODES)),
        max_tokens=chance.randrange(1, 12),
        sampling=SamplingSettings(temperature=chance.choice([0.0, 1.0]), seed=chance.randrange(1000)),
        exit_layers=chance.choice([(), layers[:1], layers[1:]]),
        exit_thresholds=(threshold,),
        max_deferred=chance.choice([0, 2, 32]),
        draft_exit=chance.choice(layers),
        draft_length=chance.choice([1, 3]),
        echo=chance.random() < 0.1,
    )


@pytest.mark.parametrize("head", ["untied_norm", "block", "pre_exit_block"])
def test_requests_that_share_prefixes_come_and_go(head: str) -> None:
    num_requests, num_rows = on_one(fuzz, cfg=config(**HEADS[head]), threshold=THRESHOLDS[head], seed=1, num_steps=200)
    assert num_requests >= 10
    assert num_rows >= 200


def chat_on_two_ranks(cfg: RunConfig) -> list[tuple[int, list[int]]]:
    return [(num_shared, result.token_ids) for _, num_shared, result in chat(cfg, "early_exit", THRESHOLDS["block"])]


def test_tensor_parallel_ranks_share_the_same_rows() -> None:
    cfg = config(tensor_model_parallel_size=2, **HEADS["block"])
    first, second = run_distributed(2, chat_on_two_ranks, cfg=cfg)
    assert first == second
    assert first[1][0] >= len(SYSTEM)
