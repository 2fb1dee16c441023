"""The engine against an independent model that knows no cache: its full forward over the generated sequence says, for
every row, what each exit and the final head predict, and what each layer's keys and values are."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.engine.engine import QueueFull
from megatron.early_exit.inference.engine.request import Progress
from megatron.early_exit.inference.engine.speculation import DraftingThenVerifying
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.inference.protocol import DrawnToken
from megatron.early_exit.inference.results import RequestResult
from megatron.early_exit.inference.worker.attention import Segment
from tests.configs import VOCAB_SIZE
from tests.distributed.engines import (
    Request,
    add_random_request,
    answer,
    answer_and_check,
    check_invariants,
    decoder_of,
    make_engine,
    reference_over,
    run_all,
    walk_at_random,
)
from tests.distributed.parallel_model import layout
from tests.distributed.workers import run_distributed
from tests.reference_checkpoint import HEADS, MAX_POSITIONS, STYLES, decoding_config

PROMPT = [5, 17, 80, 3, 41]
TP2 = {"tensor_model_parallel_size": 2}
# Every head in one style, every style with two heads.
PAIRS = [(head, "llama") for head in HEADS] + [
    (head, style) for head in ("tied", "block") for style in STYLES if style != "llama"
]
# Random weights soon repeat one token when greedy, and then always take the same exit: sampled tokens differ.
SAMPLED = SamplingSettings(temperature=1.0, seed=5)


def on_one(function: Any, **kwargs: Any) -> Any:
    return run_distributed(1, function, **kwargs)[0]


def early_exit(thresholds: Any, **changes: Any) -> GenerationParams:
    return GenerationParams(**{"max_tokens": 20, "mode": "early_exit", "exit_thresholds": tuple(thresholds), **changes})


def thresholds_between(
    cfg: RunConfig, exit_layers: Any = (), prompt: list[int] = PROMPT, share: float = 0.4, **changes: Any
) -> tuple[float, ...]:
    """For each exit a threshold that about this share of its confidences passes, half-way between two observed ones."""
    params = early_exit([1.0], exit_layers=tuple(exit_layers), **changes)
    (observed,) = on_one(answer, cfg=cfg, requests=[(prompt, params)])
    thresholds = []
    for layer in params.exit_policy(cfg.exits).exit_layers:
        confidences = sorted({r.confidence for t in observed.tokens for r in t.predictions if r.exit_layer == layer})
        index = int((len(confidences) - 1) * (1 - share))
        thresholds.append(sum(confidences[index : index + 2]) / 2)
    return tuple(thresholds)


def checked(cfg: RunConfig, params: GenerationParams, prompt: list[int] = PROMPT, **changes: Any) -> RequestResult:
    return on_one(answer_and_check, cfg=cfg, requests=[(prompt, params)], **changes)[0]


# Full and early exit.


@pytest.mark.parametrize("style", STYLES)
def test_full_model_and_threshold_one(style: str) -> None:
    cfg = decoding_config(**STYLES[style])
    full = checked(cfg, GenerationParams(max_tokens=20))
    never = checked(cfg, early_exit([1.0]))
    assert full.token_ids == never.token_ids
    assert [t.log_prob for t in full.tokens] == pytest.approx([t.log_prob for t in never.tokens], rel=1e-5)
    assert all(t.is_final for t in never.tokens)
    assert never.statistics.layers_saved == 0.0


@pytest.mark.parametrize("head", HEADS)
def test_threshold_zero_takes_the_first_exit(head: str) -> None:
    cfg = decoding_config(**HEADS[head])
    result = checked(cfg, early_exit([0.0]))
    assert {t.exit_layer for t in result.tokens} == {1}
    assert [len(t.predictions) for t in result.tokens] == [1] * 20
    layers_of_a_row = (0 if cfg.exits.pre_exit else 1) + cfg.exits.head_of(0).block
    assert result.statistics.layer_passes == 20 * layers_of_a_row


@pytest.mark.parametrize(("head", "style"), PAIRS)
def test_mixed_exits(head: str, style: str) -> None:
    cfg = decoding_config(**HEADS[head], **STYLES[style])
    thresholds = thresholds_between(cfg, sampling=SAMPLED)
    result = checked(cfg, early_exit(thresholds, sampling=SAMPLED))
    assert len({(t.exit_layer, t.is_final) for t in result.tokens}) >= 3


def test_mixed_exits_when_greedy() -> None:
    cfg = decoding_config(untie_exit_output_weights=True, use_exit_norm=True)
    checked(cfg, early_exit(thresholds_between(cfg)))


def test_exit_temperature_shapes_the_confidence() -> None:
    cfg = decoding_config(exit_layer_temperature=(0.2, 1.0, 3.0))
    thresholds = thresholds_between(cfg, sampling=SAMPLED)
    assert thresholds[0] > thresholds[1] > thresholds[2]
    checked(cfg, early_exit(thresholds, sampling=SAMPLED))


def test_subset_of_exits_with_thresholds_of_their_own() -> None:
    cfg = decoding_config(use_exit_block=True)
    thresholds = thresholds_between(cfg, exit_layers=[2, 3], sampling=SAMPLED)
    result = checked(cfg, early_exit(thresholds[::-1], exit_layers=(3, 2), sampling=SAMPLED))
    assert {r.exit_layer for t in result.tokens for r in t.predictions} == {2, 3, None}
    assert [usage.exit_layer for usage in result.usage] == [2, 3, 4]


@pytest.mark.parametrize("cap", [0, 1, 3])
@pytest.mark.parametrize("head", ["tied", "block", "pre_exit"])
def test_cap_runs_deferred_rows_and_keeps_the_exit_s_token(head: str, cap: int) -> None:
    cfg = decoding_config(**HEADS[head])
    result = checked(cfg, early_exit([0.0], max_deferred=cap))
    # `cap` rows are deferred, the next one catches up with them; all tokens are the exit's.
    assert [t.caught_up for t in result.tokens] == [index % (cap + 1) == cap for index in range(20)]
    assert {(t.exit_layer, t.is_final) for t in result.tokens} == {(1, False)}
    assert result.token_ids == checked(cfg, early_exit([0.0])).token_ids


@pytest.mark.parametrize("exits", [(1,), (4,), (2, 4), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("pre_exit", [False, True])
def test_exits_on_the_first_and_the_last_layer(exits: tuple[int, ...], pre_exit: bool) -> None:
    cfg = decoding_config(exit_layer_nums=exits, pre_exit=pre_exit, exit_layer_weight=())
    on_one(walk_at_random, cfg=cfg, num_steps=40, seed=2)


# Caches, slots and rows that wait, with requests of all modes at once.


@pytest.mark.parametrize(("head", "style"), PAIRS)
def test_caches_whatever_the_requests_do(head: str, style: str) -> None:
    on_one(walk_at_random, cfg=decoding_config(**HEADS[head], **STYLES[style]))


@pytest.mark.parametrize("head", HEADS)
def test_caches_with_tensor_parallelism(head: str) -> None:
    run_distributed(2, walk_at_random, cfg=decoding_config(**HEADS[head], **TP2), seed=1)


def fuzz(cfg: RunConfig, num_requests: int, seed: int) -> Counter:
    """Requests join, leave and are cancelled as chance has it. Returns how they ended."""
    random.seed(seed)
    with layout(cfg):
        engine = make_engine(cfg, num_slots=5, prefill_chunk=9, ends={5}, max_waiting=6)
        added, ended, refused = set(), {}, 0
        while len(added) < num_requests or engine.has_work:
            for _ in range(random.choice([0, 0, 1, 3]) if len(added) < num_requests else 0):
                try:
                    added.add(
                        add_random_request(engine, cfg, random.choice(["full", "early_exit", "self_speculative"]))
                    )
                except QueueFull:
                    refused += 1
            if random.random() < 0.1 and added:
                victim = random.choice(sorted(added))
                result = engine.cancel(victim)
                assert (result is None) == (victim in ended)
                if result is not None:
                    ended[victim] = result
            for event in engine.step():
                assert event.request_id not in ended
                if event.result is not None:
                    ended[event.request_id] = event.result
            check_invariants(engine)
        assert set(ended) == added
        assert engine.num_running == engine.num_waiting == 0
        return Counter([result.finish_reason for result in ended.values()] + ["refused"] * refused)


@pytest.mark.parametrize("head", ["tied", "pre_exit_block"])
def test_a_thousand_requests_come_and_go(head: str) -> None:
    reasons = on_one(fuzz, cfg=decoding_config(**HEADS[head]), num_requests=1000, seed=3)
    assert min(reasons[reason] for reason in ("eod", "max_tokens", "max_positions", "cancelled", "refused")) > 5, (
        reasons
    )
    assert reasons["error"] == 0


AUDITED = [
    (PROMPT, early_exit([0.0])),
    (PROMPT, early_exit([0.0, 0.0, 0.02], max_deferred=3)),
    ([7, 7, 20, 9] * 5, early_exit([0.012], exit_layers=(3,), max_tokens=9)),
    ([11, 60, 2], early_exit([1.0])),
    ([2] * 30, early_exit([0.02, 0.0109, 0.03])),
]
MIXED = [
    (PROMPT, GenerationParams(max_tokens=15)),
    (PROMPT[:1], GenerationParams(max_tokens=24, mode="self_speculative", draft_length=3, draft_exit=2)),
    ([7, 7, 20, 9] * 5, early_exit([0.03], exit_layers=(3,), max_tokens=9)),
    ([11, 60], early_exit([0.0, 0.0, 0.02], max_deferred=3)),
    ([2] * 30, GenerationParams(max_tokens=30, mode="self_speculative")),
    ([9, 8, 7], GenerationParams(max_tokens=12, sampling=SAMPLED, top_log_probs=2, echo=True)),
    ([9, 8, 7], early_exit([0.025], sampling=replace(SAMPLED, top_k=20, repetition_penalty=1.3))),
]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("head", ["untied_norm", "mlp", "block"])
def test_requests_of_all_kinds_do_not_disturb_each_other(head: str, world_size: int) -> None:
    cfg = decoding_config(**HEADS[head], tensor_model_parallel_size=world_size)
    together = run_distributed(world_size, answer_and_check_some, cfg=cfg, requests=MIXED)
    alone = run_distributed(world_size, answer, cfg=cfg, requests=MIXED, together=False)
    for ranks in (together, alone):
        assert all([one.tokens for one in rank] == [one.tokens for one in ranks[0]] for rank in ranks)
    for mine, theirs in zip(together[0], alone[0], strict=True):
        assert mine.token_ids == theirs.token_ids
        assert [t.exit_layer for t in mine.tokens] == [t.exit_layer for t in theirs.tokens]
        assert mine.finish_reason == theirs.finish_reason


def answer_and_check_some(cfg: RunConfig, requests: list[Request]) -> list[RequestResult]:
    return answer_and_check(cfg, requests, num_slots=3, prefill_chunk=8)


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 50, 40])
def test_ids_that_pad_the_embedding_are_never_produced(vocab_size: int) -> None:
    """40 ids: the second rank holds padding only."""
    prompt = [5, 17, 30, 3]
    requests = [
        (prompt, early_exit([0.03], sampling=sampling))
        for sampling in (SamplingSettings(), SamplingSettings(temperature=1.0, top_p=0.9, seed=7))
    ]
    alone = on_one(answer_and_check, cfg=decoding_config(), requests=requests, vocab_size=vocab_size)
    both = run_distributed(2, answer_and_check, cfg=decoding_config(**TP2), requests=requests, vocab_size=vocab_size)
    for mine, first, second in zip(alone, *both, strict=True):
        assert first.tokens == second.tokens
        assert [(t.token, t.exit_layer) for t in first.tokens] == [(t.token, t.exit_layer) for t in mine.tokens]
        assert max(mine.token_ids) < vocab_size


def shared_prefixes(cfg: RunConfig) -> tuple[list[int], list[list[int]]]:
    """(rows that each request did not have to compute, tokens of each)"""
    prompt = list(range(20, 40))
    prompts = [prompt, prompt, prompt[:18] + [3, 4], prompt[:10] + [3, 4] * 5]
    with layout(cfg):
        engine = make_engine(cfg, num_slots=4, prefill_chunk=8)
        for one in prompts:
            engine.add(one, early_exit([0.0], exit_layers=(2,)))
        copied, done = {}, {}
        while engine.has_work:
            for event in engine.step():
                if event.result is not None:
                    done[event.request_id] = event.result.token_ids
            copied |= {request_id: request.num_shared for request_id, request in engine._running.items()}
            check_invariants(engine)
        return [copied[i] for i in range(4)], [done[i] for i in range(4)]


@pytest.mark.parametrize("head", ["tied", "block"])
def test_equal_beginnings_of_prompts_are_computed_once(head: str) -> None:
    cfg = decoding_config(**HEADS[head])
    copied, tokens = on_one(shared_prefixes, cfg=cfg)
    assert copied == [0, 19, 18, 0]
    prompt = list(range(20, 40))
    for one, mine in zip([prompt, prompt, prompt[:18] + [3, 4]], tokens, strict=False):
        assert checked(cfg, early_exit([0.0], exit_layers=(2,)), one).token_ids == mine


# Speculation.


@pytest.mark.parametrize(("head", "style"), PAIRS)
def test_greedy_speculation_gives_the_full_model_s_tokens(head: str, style: str) -> None:
    cfg = decoding_config(**HEADS[head], **STYLES[style])
    full = checked(cfg, GenerationParams(max_tokens=30))
    for length, exit_layer in ((1, 1), (3, 2), (None, 3), (50, 1)):
        params = GenerationParams(
            max_tokens=30, mode="self_speculative", draft_length=length, draft_exit=exit_layer, top_log_probs=3
        )
        result = checked(cfg, params)
        assert result.token_ids == full.token_ids
        assert sum(t.is_draft for t in result.tokens) == result.statistics.accepted <= result.statistics.drafted


def test_drafts_are_accepted() -> None:
    """Exits after the last layer say what the final head says, but for the norm: nearly all drafts are right."""
    cfg = decoding_config(exit_layer_nums=(4,), exit_layer_weight=(), use_exit_norm=False)
    result = checked(cfg, GenerationParams(max_tokens=24, mode="self_speculative", draft_length=3))
    assert result.statistics.acceptance > 0.5
    assert any(t.is_draft for t in result.tokens)


def test_speculation_stops_where_the_full_model_does() -> None:
    cfg = decoding_config(use_exit_norm=True)
    full = checked(cfg, GenerationParams(max_tokens=30, sampling=SamplingSettings(repetition_penalty=1.5)))
    end = full.token_ids[7]
    params = GenerationParams(max_tokens=30, sampling=SamplingSettings(repetition_penalty=1.5), stop_tokens=(end,))
    stopped = checked(cfg, params)
    speculative = checked(cfg, replace(params, mode="self_speculative", draft_length=4))
    assert speculative.token_ids == stopped.token_ids == full.token_ids[: full.token_ids.index(end) + 1]
    assert speculative.finish_reason == stopped.finish_reason == "stop"
    for max_tokens in (1, 2, 3):
        short = checked(cfg, replace(params, mode="self_speculative", draft_length=4, max_tokens=max_tokens))
        assert short.token_ids == full.token_ids[:max_tokens]


def accept_all(request: DraftingThenVerifying, drawn: Sequence[DrawnToken]) -> Progress:
    """A wrong rule: what the exit drafted is taken, whatever all layers draw."""
    wrong = [msgspec.structs.replace(one, token=draft) for one, draft in zip(drawn, request.drafts)]
    return VERIFY(request, [*wrong, *drawn[len(wrong) :]])


VERIFY = DraftingThenVerifying._verify


def first_tokens(cfg: RunConfig, params: GenerationParams, draws: int, wrong_rule: bool = False) -> Counter:
    """How often each pair of first and second token was drawn over many seeds."""
    with mock.patch.object(DraftingThenVerifying, "_verify", accept_all if wrong_rule else VERIFY):
        requests = [(PROMPT, replace(params, sampling=replace(params.sampling, seed=seed))) for seed in range(draws)]
        results = answer(cfg, requests, num_slots=16)
    return Counter(tuple(result.token_ids) for result in results)


def probabilities(logits: torch.Tensor, history: list[int], sampling: SamplingSettings) -> torch.Tensor:
    """[vocabulary] after repetition penalty, temperature and top-k, without ties."""
    seen = torch.tensor(sorted(set(history)))
    logits = logits[:VOCAB_SIZE].clone()
    logits[seen] = torch.where(
        logits[seen] > 0, logits[seen] / sampling.repetition_penalty, logits[seen] * sampling.repetition_penalty
    )
    logits /= sampling.temperature
    if sampling.top_k:
        logits[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
    return logits.softmax(-1)


def expected_pairs(cfg: RunConfig, sampling: SamplingSettings) -> dict[tuple[int, int], float]:
    """Probability of each pair of tokens, from the full model's logits."""
    _, logits = reference_over(cfg, PROMPT)
    first = probabilities(logits[None][-1], PROMPT, sampling)
    pairs = {}
    for a in range(VOCAB_SIZE):
        if first[a] > 0:
            _, logits = reference_over(cfg, [*PROMPT, a])
            second = probabilities(logits[None][-1], [*PROMPT, a], sampling)
            pairs |= {(a, b): (first[a] * second[b]).item() for b in range(VOCAB_SIZE) if second[b] > 0}
    return pairs


def chi_square(seen: Counter, expected: dict[tuple[int, int], float]) -> tuple[float, int]:
    """(statistic, degrees of freedom); rare pairs are taken together."""
    total = sum(seen.values())
    assert set(seen) <= set(expected), set(seen) - set(expected)
    bins: list[list[float]] = [[0.0, 0.0]]
    for pair, probability in sorted(expected.items(), key=lambda item: item[1]):
        if bins[-1][1] >= 8:
            bins.append([0.0, 0.0])
        bins[-1][0] += seen[pair]
        bins[-1][1] += probability * total
    return sum((count - mean) ** 2 / mean for count, mean in bins), len(bins) - 1


def limit_of(degrees: int) -> float:
    """What chi-square exceeds once in some ten thousand times (Wilson-Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.9 * (2 / (9 * degrees)) ** 0.5) ** 3


# top-k 6 of peaked distributions: some thirty pairs.
DISTRIBUTION = SamplingSettings(temperature=0.05, top_k=6, repetition_penalty=1.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "full"},
        {"mode": "self_speculative", "draft_length": 1},
        {"mode": "self_speculative", "draft_length": 2, "draft_exit": 3},
        {"mode": "self_speculative", "draft_length": 3, "max_tokens": 5},
    ],
    ids=str,
)
def test_sampled_speculation_has_the_full_model_s_distribution(changes: dict) -> None:
    cfg = decoding_config(use_exit_norm=True, untie_exit_output_weights=True)
    params = GenerationParams(**{"max_tokens": 2, "sampling": DISTRIBUTION, **changes})
    draws = 2000
    statistic, degrees = on_one(distribution_of_first_two, cfg=cfg, params=params, draws=draws)
    assert degrees >= 10
    assert statistic < limit_of(degrees), (statistic, degrees)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("head", ["tied", "block", "pre_exit"])
def test_sampled_speculation_draws_the_full_model_s_tokens(head: str, world_size: int) -> None:
    cfg = decoding_config(**HEADS[head], tensor_model_parallel_size=world_size)
    sampling = SamplingSettings(temperature=0.7, top_p=0.95, top_k=40, repetition_penalty=1.2)
    modes = [
        GenerationParams(max_tokens=20), GenerationParams(max_tokens=20, mode="self_speculative"),
        GenerationParams(max_tokens=20, mode="self_speculative", draft_length=3, draft_exit=3),
    ]  # fmt: skip
    requests = [
        (PROMPT[: 2 + seed], replace(params, sampling=replace(sampling, seed=seed)))
        for seed in range(3)
        for params in modes
    ]
    for results in run_distributed(world_size, answer, cfg=cfg, requests=requests):
        tokens = [result.token_ids for result in results]
        for first in range(0, len(tokens), len(modes)):
            full, *speculative = tokens[first : first + len(modes)]
            assert speculative == [full] * 2
        assert len({tuple(one) for one in tokens}) == 3
        assert any(result.statistics.accepted for result in results)


def distribution_of_first_two(
    cfg: RunConfig, params: GenerationParams, draws: int, wrong_rule: bool = False
) -> tuple[float, int]:
    seen = first_tokens(cfg, params, draws, wrong_rule)
    firsts: Counter = Counter()
    for tokens, count in seen.items():
        firsts[tokens[:2]] += count
    return chi_square(firsts, expected_pairs(cfg, params.sampling))


def test_the_distribution_test_notices_a_wrong_rule() -> None:
    cfg = decoding_config(use_exit_norm=True, untie_exit_output_weights=True)
    params = GenerationParams(
        max_tokens=2, sampling=replace(DISTRIBUTION, top_k=0), mode="self_speculative", draft_length=1
    )
    statistic, degrees = on_one(distribution_of_first_two, cfg=cfg, params=params, draws=1000, wrong_rule=True)
    assert statistic > 5 * limit_of(degrees)


# Limits, ends and refusals.


def test_end_of_document_stops() -> None:
    cfg = decoding_config()
    full = checked(cfg, GenerationParams(max_tokens=20))
    end = full.token_ids[4]
    until = full.token_ids[: full.token_ids.index(end) + 1]
    stopped = checked(cfg, GenerationParams(max_tokens=20), ends={end})
    assert (stopped.token_ids, stopped.finish_reason, full.finish_reason) == (until, "eod", "max_tokens")
    assert checked(cfg, GenerationParams(max_tokens=20, ignore_eod=True), ends={end}).token_ids == full.token_ids


@pytest.mark.parametrize("style", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["full", "early_exit", "self_speculative"])
def test_the_last_position_stops(mode: str, style: str) -> None:
    cfg = decoding_config(**STYLES[style])
    prompt = list(itertools.islice(itertools.cycle(PROMPT), MAX_POSITIONS - 3))
    params = GenerationParams(max_tokens=20, mode=mode, exit_thresholds=(0.0,), draft_length=4)
    result = checked(cfg, params, prompt)
    assert (len(result.tokens), result.finish_reason) == (4, "max_positions")
    last = checked(cfg, replace(params, max_tokens=1), [1] * MAX_POSITIONS)
    assert (len(last.tokens), last.finish_reason) == (1, "max_tokens")


@pytest.mark.parametrize("mode", ["full", "early_exit", "self_speculative"])
def test_log_probs_of_a_prompt_alone(mode: str) -> None:
    params = GenerationParams(max_tokens=0, echo=True, mode=mode, top_log_probs=2)
    result = checked(decoding_config(), params, PROMPT * 4, prefill_chunk=6)
    assert (result.tokens, result.finish_reason) == ((), "max_tokens")
    assert len(result.prompt) == 20
    assert [len(one.top_log_probs) for one in result.prompt] == [0] + [2] * 19


# Biases, and ends that may not come yet.


@pytest.mark.parametrize("head", ["untied_norm", "pre_exit_block"])
@pytest.mark.parametrize("sampling", [SamplingSettings(), SAMPLED], ids=["greedy", "sampled"])
def test_biases_and_min_tokens_in_all_modes(sampling: SamplingSettings, head: str) -> None:
    """Of three tokens that are all but forced, two end the answer."""
    biased = replace(sampling, logit_bias={3: 98.0, 7: 100.0, 11: 99.9})
    full = GenerationParams(max_tokens=20, min_tokens=9, stop_tokens=(7, 11), ignore_eod=True, sampling=biased)
    changes = [
        {}, {"mode": "early_exit", "exit_thresholds": (0.0108,)}, {"mode": "early_exit", "exit_thresholds": (0.0,)},
        *({"mode": "self_speculative", "draft_length": 2, "draft_exit": layer} for layer in (1, 3)),
        {"min_tokens": 0}, {"stop_tokens": (7,)},
    ]  # fmt: skip
    cfg, requests = decoding_config(**HEADS[head]), [(PROMPT, replace(full, **one)) for one in changes]
    results = on_one(answer_and_check, cfg=cfg, requests=requests)
    for result in results[:5]:
        assert (set(result.token_ids[:9]), result.finish_reason) == ({3}, "stop")
    assert len({tuple(results[index].token_ids) for index in (0, 3, 4)}) == 1
    assert all(result.statistics.accepted >= 6 for result in results[3:5]), "drafts are biased as well"
    assert len(results[5].tokens) < 9 and 11 in results[6].token_ids[:9]
    # The model's own ends are no others than those of the request.
    requests = [(prompt, replace(params, stop_tokens=(7,), ignore_eod=False)) for prompt, params in requests[:5]]
    for result, same in zip(on_one(answer, cfg=cfg, requests=requests, ends={11, 200}), results, strict=False):
        assert result.token_ids == same.token_ids


def refusal(cfg: RunConfig, prompt: list[int], params: GenerationParams) -> str:
    with layout(cfg), pytest.raises(ValueError) as caught:
        make_engine(cfg).add(prompt, params)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "prompt", "params", "message"),
    [
        ({}, [], {}, "the prompt is empty"),
        ({}, [1] * (MAX_POSITIONS + 1), {}, "has 41 tokens; at most 40 fit"),
        ({}, [1, VOCAB_SIZE], {}, "outside of the vocabulary of 96: [96]"),
        ({}, [1, -1], {}, "outside of the vocabulary"),
        ({}, PROMPT, {"stop_tokens": (96,)}, "stop_tokens has ids outside of the vocabulary of 96: [96]"),
        (
            {},
            PROMPT,
            {"sampling": SamplingSettings(logit_bias={9: 1, 96: 1})},
            "logit_bias has ids outside of the voca",
        ),
        ({}, PROMPT, {"min_tokens": 2, "stop_tokens": range(96)}, "min_tokens is 2, but each of the 96 ids ends the"),
        ({}, PROMPT, {"mode": "early_exit", "exit_layers": (2, 9)}, "no exit named 9; its exits are 1 2 3"),
        ({}, PROMPT, {"mode": "self_speculative", "draft_exit": 9}, "draft_exit is 9, but the model's exits are 1, 2"),
        ({"exit_layer_nums": ()}, PROMPT, {"mode": "self_speculative"}, "the model has none"),
        ({"exit_layer_nums": ()}, PROMPT, {"mode": "early_exit"}, "the model has no exits"),
    ],
)
def test_what_cannot_be_answered_is_refused(changes: dict, prompt: list[int], params: dict, message: str) -> None:
    cfg = decoding_config(**{"exit_layer_weight": (), **changes})
    world_size = cfg.parallel.tensor_model_parallel_size
    for text in run_distributed(world_size, refusal, cfg=cfg, prompt=prompt, params=GenerationParams(**params)):
        assert message in text


def spoil_one_request(cfg: RunConfig) -> list[tuple[str, int, str | None]]:
    """One request's cached keys become NaN; the others must not notice."""
    with layout(cfg):
        engine = make_engine(cfg, num_slots=3)
        for prompt in (PROMPT, PROMPT[::-1], PROMPT[:2]):
            engine.add(prompt, GenerationParams(max_tokens=6))
        engine.step()
        decoder_of(engine).cache.layers()[1][engine._running[1].slot, :2] = torch.nan
        engine.add([1], GenerationParams(max_tokens=6))  # waits for the slot of the one that fails
        results = run_all(engine)
        check_invariants(engine)
        return [(results[i].finish_reason, len(results[i].tokens), results[i].error) for i in range(4)]


def test_a_request_that_fails_harms_no_other() -> None:
    first, second, third, next_one = on_one(spoil_one_request, cfg=decoding_config())
    assert first == third == next_one == ("max_tokens", 6, None)
    assert second[:2] == ("error", 1)
    assert "not finite" in second[2]


def test_bf16() -> None:
    on_one(decode_in_bf16, cfg=decoding_config(bf16=True))


def decode_in_bf16(cfg: RunConfig) -> None:
    """Row by row, the final head says what one forward of the training model in bf16 says."""
    from tests.distributed.parallel_model import build_with_reference_parameters

    tokens = list(range(3, 3 + 20))
    with layout(cfg):
        chunk = build_with_reference_parameters(cfg, wrap_with_ddp=False).chunks[0].eval()
        with torch.no_grad():
            whole = chunk(torch.tensor([tokens]), torch.arange(20)[None], None)[0].float()
        decoder = decoder_of(make_engine(cfg))
        assert decoder.weights.dtype == torch.bfloat16
        with torch.inference_mode():
            for row, token in enumerate(tokens):
                rows = decoder.attention_metadata([Segment(1, row, 1)])
                hidden, _ = decoder.run_layers(decoder.embed([token], rows), rows, 0, decoder.num_layers)
                logits = decoder.final_output(hidden).logits(0)
                assert (logits[:VOCAB_SIZE] - whole[row]).abs().max() < 0.02 * whole[row].abs().max()


def training_logits(cfg: RunConfig) -> None:
    """Prefill of two sequences at once gives the training model's logits at every row."""
    from tests.distributed.parallel_model import build_with_reference_parameters

    tokens = torch.randint(0, VOCAB_SIZE, (2, 30), generator=torch.Generator().manual_seed(0))
    with layout(cfg):
        chunk = build_with_reference_parameters(cfg, wrap_with_ddp=False).chunks[0].eval()
        with torch.no_grad():
            whole = chunk(tokens, torch.arange(30).expand(2, 30), None)
        decoder = decoder_of(make_engine(cfg))
        with torch.inference_mode():
            rows = decoder.attention_metadata([Segment(1, 0, 30), Segment(2, 0, 30)])
            hidden = decoder.embed(tokens.flatten().tolist(), rows)
            output = decoder.final_output(decoder.run_layers(hidden, rows, 0, decoder.num_layers)[0])
        for row in range(60):
            assert torch.allclose(output.logits(row), whole[row // 30, row % 30], atol=2e-5), row


@pytest.mark.parametrize("style", STYLES)
def test_logits_are_those_of_the_training_model(style: str) -> None:
    on_one(training_logits, cfg=decoding_config(**STYLES[style]))
