"""Settings and prompts as callers give them: single values, numbers of NumPy and torch, wrong types by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.llm import as_list
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings, ScoreParams, check_prompt
from megatron.early_exit.inference.protocol import WorkerDescription


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("stop", "END", ("END",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", None, ()),
        ("stop_tokens", 3, (3,)),
        ("stop_tokens", {3}, (3,)),
        ("stop_tokens", np.array([3, 4]), (3, 4)),
        ("stop_tokens", torch.tensor([3, 4]), (3, 4)),
        ("stop_tokens", np.int32(3), (3,)),
        ("exit_thresholds", 0.5, (0.5,)),
        ("exit_thresholds", 1, (1.0,)),
        ("exit_thresholds", [0.5, np.float64(0.25)], (0.5, 0.25)),
        ("exit_thresholds", torch.tensor(0.5), (0.5,)),
        ("exit_layers", 2, (2,)),
        ("exit_layers", (value for value in (2, 4)), (2, 4)),
        ("max_tokens", np.int64(7), 7),
        ("max_tokens", torch.tensor(7), 7),
        ("draft_exit", np.int16(2), 2),
        ("draft_length", None, None),
        ("echo", np.True_, True),
    ],
)
def test_values_are_what_their_fields_say(name: str, given: Any, expected: Any) -> None:
    value = getattr(GenerationParams(**{name: given}), name)
    assert value == expected and type(value) is type(expected)
    assert hash(GenerationParams(**{name: value})) == hash(GenerationParams(**{name: expected}))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("stop", 3, "stop is 3; it must be text"),
        ("stop", ["a", 3], "stop is 3; it must be text"),
        ("stop", b"END", "stop is b'END'; it must be text"),
        ("stop", ["a", ""], "a stop string is empty"),
        ("stop", "\ud83d", "not valid Unicode"),
        ("stop", ["a"] * 17, "stop has 17 strings; give at most 16"),
        ("stop", ["b" * 257], "'bbbbbbbbbbbbbbbbbbbb'... has 257 characters; it may have 256"),
        ("stop_tokens", range(1025), "stop_tokens has 1025 ids; give at most 1024"),
        ("top_log_probs", 513, "top_log_probs is 513; it must lie between 0 and 512"),
        ("top_log_probs", -1, "top_log_probs is -1; it must lie between 0 and 512"),
        ("n", 129, "n is 129; it must lie between 1 and 128"),
        ("n", 0, "n is 0; it must lie between 1 and 128"),
        ("stop_tokens", "3", "stop_tokens is '3'; it must be an integer"),
        ("stop_tokens", 3.0, "stop_tokens is 3.0; it must be an integer"),
        ("stop_tokens", {3: 4}, "stop_tokens is {3: 4}"),
        ("exit_thresholds", "0.5", "exit_thresholds is '0.5'; give numbers"),
        ("exit_thresholds", (), "exit_thresholds is empty"),
        ("exit_layers", [1.5], "exit_layers is 1.5; it must be an integer"),
        ("max_tokens", 1e9, "max_tokens is 1000000000.0; it must be an integer"),
        ("max_tokens", None, "max_tokens is None; it must be an integer"),
        ("min_tokens", 1.5, "min_tokens is 1.5; it must be an integer"),
        ("min_tokens", -1, "min_tokens is -1; it must lie between 0 and max_tokens (64)"),
        ("min_tokens", 65, "min_tokens is 65; it must lie between 0 and max_tokens (64)"),
        ("n", True, "n is True; it must be an integer"),
        ("echo", "no", "echo is 'no'; it must be True or False"),
        ("draft_length", "2", "draft_length is '2'; it must be an integer"),
        ("draft_source", "text", "draft_source is 'text'; choose one of exit, ngram, both"),
        ("draft_min_confidence", 1.5, "draft_min_confidence is 1.5; it must lie between 0 and 1"),
        ("draft_min_confidence", float("nan"), "draft_min_confidence is nan; it must lie between 0 and 1"),
        ("max_draft_length", 10**9, "max_draft_length is 1000000000; it must lie between 1 and 1024"),
        ("sampling", 0.7, "sampling is 0.7; it must be SamplingSettings"),
        ("mode", 1, "mode is 1"),
    ],
)
def test_wrong_types_are_refused_by_name(name: str, given: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        GenerationParams(**{name: given})
    assert message in str(caught.value)


def test_settings_at_their_bounds() -> None:
    params = GenerationParams(
        stop=["b" * 256] * 16, stop_tokens=range(1024), top_log_probs=512, n=128, sampling=SamplingSettings(1.0)
    )
    assert (len(params.stop), len(params.stop_tokens)) == (16, 1024)


def test_min_tokens_need_an_id_that_does_not_end_the_answer() -> None:
    checks = RequestChecks(WorkerDescription(2, 8, 96, (), 1, 40), ExitConfig(), ends={95, 200})
    params = GenerationParams(min_tokens=2, stop_tokens=range(95))
    with pytest.raises(ValueError, match="^min_tokens is 2, but each of the 96 ids ends the answer"):
        checks.check_generation([1], params)
    for changes in ({"ignore_eod": True}, {"min_tokens": 0}, {"stop_tokens": range(94)}):
        checks.check_generation([1], replace(params, **changes))


EXITS = ExitConfig(exit_layer_nums=(2, 4))


@pytest.mark.parametrize(
    ("params", "heads"),
    [
        (ScoreParams(), (2, 4, None)),
        (ScoreParams(exit_layers=()), (None,)),
        (ScoreParams(exit_layers=np.array([4]), final=np.False_), (4,)),
        (ScoreParams(exit_layers=[4, 2, 4]), (2, 4, None)),
    ],
)
def test_heads_that_score(params: ScoreParams, heads: tuple) -> None:
    assert params.heads(EXITS) == heads
    assert hash(params) == hash(replace(params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_layers": 3}, "exit_layers names 3, but the model's exits are 2, 4"),
        ({"exit_layers": (), "final": False}, "no head is to be evaluated"),
        ({"exit_layers": "2"}, "exit_layers is '2'; it must be an integer"),
        ({"final": 1}, "final is 1; it must be True or False"),
        ({"logits": None}, "logits is None; it must be True or False"),
        ({"top_log_probs": 513}, "top_log_probs is 513"),
        ({"score_from": -1}, "score_from is -1; it must be 0 or more"),
        ({"score_from": 3}, "score_from is 3; it must be below the number of tokens, 3"),
        (
            {"score_from": 2, "score_last": False},
            "score_from is 2; it must be below the number of tokens but the last, 2",
        ),
    ],
)
def test_scores_that_cannot_be_made(changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        params = ScoreParams(**changes)
        params.heads(EXITS)
        params.check_tokens([1, 2, 3], 10, 96)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt is empty"),
        ([1] * 11, "the prompt has 11 tokens; at most 10 fit"),
        ([1, 96], "the prompt has ids outside of the vocabulary of 96: [96]"),
        ([-1], "the prompt has ids outside of the vocabulary of 96: [-1]"),
    ],
)
def test_prompts_that_do_not_fit(ids: list[int], message: str) -> None:
    for check in (check_prompt, ScoreParams().check_tokens):
        with pytest.raises(ValueError) as caught:
            check(ids, 10, 96)
        assert message in str(caught.value)


def test_settings_of_sampling() -> None:
    settings = SamplingSettings(temperature=np.float32(0.5), top_k=np.int64(3), top_p=1, seed=torch.tensor(5))
    assert (settings.temperature, settings.top_k, settings.top_p, settings.seed) == (0.5, 3, 1.0, 5)
    for name, value in (("temperature", "0.7"), ("top_k", 2.5), ("top_p", None), ("seed", 1.0)):
        with pytest.raises(ValueError, match=f"{name} is "):
            SamplingSettings(**{name: value})


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("text", ["text"]),
        ([1, 2], [[1, 2]]),
        ([], []),
        ((1, 2), [[1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([np.int64(1), torch.tensor(2)], [[1, 2]]),
        (iter(["a", "b"]), ["a", "b"]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_one_prompt_or_several(prompts: Any, expected: list) -> None:
    assert as_list(prompts) == expected


def test_several_arrays_are_several_prompts() -> None:
    one, two = as_list([torch.tensor([1]), torch.tensor([2])])
    assert (one.tolist(), two.tolist()) == ([1], [2])


@pytest.mark.parametrize("prompts", [b"text", 5, None, {"input_ids": [1]}])
def test_what_is_no_prompt(prompts: Any) -> None:
    with pytest.raises(ValueError, match=f"prompts is .*{type(prompts).__name__}"):
        as_list(prompts)
