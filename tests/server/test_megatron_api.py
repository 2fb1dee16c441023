"""Megatron's API over HTTP: the answers are those of the model without a server, the form is EE-LLM's, and
what was wrong there (I1 to I13, by the numbers of its defects) is right."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import torch
import transformers

from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.server.megatron_api import GenerateRequest, generation_params
from tests.server import models
from tests.server.serving import RunningServer, start_server

PROMPT, LONGER = "a small model reads", "and writes another line of text: it is not here ."


@pytest.fixture(scope="module")
def staged_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a SentencePiece vocabulary."""
    return models.sentencepiece_chat_model(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module")
def staged(staged_checkpoint: Path) -> Iterator[RunningServer]:
    """Of two pipeline stages."""
    with start_server(staged_checkpoint, "--max-requests", 4, "--pipeline-model-parallel-size", 2) as running:
        yield running.wait_until_ready()


@pytest.fixture(scope="module")
def staged_offline(staged_checkpoint: Path) -> LLM:
    """The same model in one process."""
    return LLM.load(str(staged_checkpoint), max_requests=4)


def ask(server: RunningServer, method: str = "PUT", **fields: Any) -> dict[str, Any]:
    response = httpx.request(method, f"{server.url}/api", json={"prompts": PROMPT, **fields}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def check(answer: dict[str, Any], offline: LLM, checkpoint: Path, prompts: list[str], **params: Any) -> None:
    """Compare the answers with those of the model and the tokenizer, with no server."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.parent / "hf")
    outputs = offline.generate(prompts, GenerationParams(**params))
    for index, output in enumerate(outputs):
        ids = output.result.token_ids
        assert answer["text"][index] == tokenizer.decode(ids, skip_special_tokens=True)
        assert answer["exit_layers"][index] == [token.exit_layer for token in output.tokens]
        assert len(answer["segments"][index]) == len(ids)
        if answer["logprobs"] is not None:
            assert answer["logprobs"][index] == pytest.approx([t.log_prob for t in output.tokens], abs=1e-4)
    assert len(answer["text"]) == len(outputs)


EARLY = {"mode": "early_exit"}
SAMPLED = SamplingSettings(temperature=1.5, top_k=40, top_p=0.9, top_p_decay=0.98, top_p_bound=0.2, seed=2**24 + 1)
CASES = {
    "defaults": ({}, {"max_tokens": 64}),
    "no early exit": ({"use_early_exit": False, "early_exit_thres": 0.1}, {"max_tokens": 64}),
    "threshold": ({"use_early_exit": True, "early_exit_thres": 0.95}, {**EARLY, "exit_thresholds": 0.95}),
    "the server's threshold": ({"use_early_exit": True}, {**EARLY, "exit_thresholds": 0.8}),
    "an integer": ({"use_early_exit": True, "early_exit_thres": 0}, {**EARLY, "exit_thresholds": 0}),
    "negative": ({"use_early_exit": True, "early_exit_thres": -2.5}, {**EARLY, "exit_thresholds": 0}),
    "over 1": ({"use_early_exit": True, "early_exit_thres": 40.0}, {}),
    "some exits": (
        {"use_early_exit": True, "early_exit_thres": 0.5, "exit_layers": [4]},
        {**EARLY, "exit_thresholds": 0.5, "exit_layers": 4},
    ),
    "sampled": (
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "top_p_decay": 0.98, "top_p_bound": 0.2,
         "random_seed": 2**24 + 1},
        {"sampling": SAMPLED},
    ),
    "greedy with top_p": ({"top_p": 0.9, "temperature": 0}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_answers_are_those_without_a_server(
    server: RunningServer, offline: LLM, checkpoint: Path, case: str
) -> None:
    fields, params = CASES[case]
    if "max_tokens" not in params:
        fields, params = {**fields, "tokens_to_generate": 24}, {**params, "max_tokens": 24}
    answer = ask(server, logprobs=True, **fields)
    check(answer, offline, checkpoint, [PROMPT], **params)
    assert answer["request_time"] == answer["requst_time"] > 0
    exits = set(answer["exit_layers"][0])
    if case == "threshold":
        assert len(exits) > 1, exits
    if case in ("an integer", "negative"):
        assert exits == {2}


def test_post_and_put_are_the_same(server: RunningServer) -> None:
    put = ask(server, tokens_to_generate=5)
    post = ask(server, "POST", tokens_to_generate=5, prompts=[PROMPT])
    for answer in (put, post):
        del answer["request_time"], answer["requst_time"]
    assert put == post and put["logprobs"] is None  # I3


def test_what_the_server_says_holds_for_requests_that_do_not(offline: LLM) -> None:
    checks = offline.engine.checks
    defaults = GenerationParams(mode="self_speculative", exit_thresholds=(0.3,), exit_layers=(4,), draft_length=3)
    of = lambda **fields: generation_params(GenerateRequest(prompts=["a"], **fields), defaults, checks)
    assert of().mode == "self_speculative" and of().draft_length == 3
    assert of(use_early_exit=True).mode == "early_exit" and of(use_early_exit=True).exit_thresholds == (0.3,)
    assert of(use_early_exit=True, exit_layers=[]).exit_layers == (4,)
    assert of(use_early_exit=False).mode == "full"
    assert of(early_exit_thres=1.5).mode == "self_speculative"
    assert of(exit_layers=[2]).exit_layers == (2,)


def test_log_probs_are_computed_for_those_who_ask(offline: LLM) -> None:
    of = lambda **fields: generation_params(
        GenerateRequest(prompts=["a"], **fields), GenerationParams(), offline.engine.checks
    )
    assert not of().log_probs and not of(use_early_exit=True).log_probs
    assert of(logprobs=True).log_probs and of(print_max_prob=True).log_probs and of(tokens_to_generate=0).log_probs


# What EE-LLM's tools/request_client.py sends, byte for byte, and how it reads the answer.
CLIENT_HEADER = {"Content-Type": "application/json; charset=UTF-8"}
CLIENT_BODY = (
    '{"prompts": ["%s"], "tokens_to_generate": 50, "top_k": 1, "logprobs": true, "random_seed": 4711, '
    '"echo_prompts": false, "early_exit_thres": %s, "exit_layers": []%s}'
)


@pytest.mark.parametrize(("threshold", "more", "params"), [
    ("1.0", ', "use_early_exit": true, "print_max_prob": true', {**EARLY, "exit_thresholds": 1}),
    ("0.8", ', "use_early_exit": true', {**EARLY, "exit_thresholds": 0.8}),
    ("0.8", "", {}),
])  # fmt: skip
def test_the_client_of_ee_llm(
    server: RunningServer, offline: LLM, checkpoint: Path, threshold: str, more: str, params: dict[str, Any]
) -> None:
    data = CLIENT_BODY % (PROMPT, threshold, more)
    response = requests.put(f"{server.url}/api", headers=CLIENT_HEADER, data=data)
    assert response.json()["text"][0]
    check(response.json(), offline, checkpoint, [PROMPT], max_tokens=50, **params)
    assert (response.json()["predictions"] is not None) == ("print_max_prob" in more)


def test_predictions_of_the_heads(server: RunningServer, offline: LLM) -> None:
    answer = ask(server, tokens_to_generate=24, use_early_exit=True, early_exit_thres=0.95, print_max_prob=True)
    params = GenerationParams(mode="early_exit", exit_thresholds=(0.95,), max_tokens=24)
    tokens = offline.generate(PROMPT, params)[0].tokens
    segments, predictions = answer["segments"][0], answer["predictions"][0]
    for token, segment, heads in zip(tokens, segments, predictions, strict=True):
        assert [head["exit_layer"] for head in heads] == [one.exit_layer for one in token.predictions]
        assert [head["prob"] for head in heads] == pytest.approx([one.confidence for one in token.predictions])
        assert heads[-1]["token"] == segment
    assert {len(heads) for heads in predictions} > {1}
    assert ask(server, tokens_to_generate=2, print_max_prob=False)["predictions"] is None  # I10


def log_probs(checkpoint: Path, ids: list[int]) -> list[float]:
    """Of all but the first, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.parent / "hf")
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    rows = torch.log_softmax(logits, dim=-1)[:-1]
    return rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


@pytest.mark.parametrize("fields", [
    {"tokens_to_generate": 6, "echo_prompts": True, "logprobs": True},
    {"tokens_to_generate": 0, "logprobs": True},
    {"tokens_to_generate": 0},  # implies logprobs, as in EE-LLM
], ids=["echo", "score", "score implied"])  # fmt: skip
@pytest.mark.parametrize("kind", ["one process", "two stages"])
def test_prompts_are_scored(request: pytest.FixtureRequest, kind: str, fields: dict[str, Any]) -> None:
    """I4 and I9."""
    names = ("server", "checkpoint") if kind == "one process" else ("staged", "staged_checkpoint")
    server, checkpoint = map(request.getfixturevalue, names)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.parent / "hf")
    answer = ask(server, prompts=[PROMPT, LONGER], **fields)
    for index, prompt in enumerate([PROMPT, LONGER]):
        prompt_ids, segments = tokenizer(prompt)["input_ids"], answer["segments"][index]
        assert len(segments) == len(prompt_ids) + fields["tokens_to_generate"]
        assert answer["text"][index].startswith(prompt)
        got = answer["logprobs"][index]
        assert len(got) == len(segments) - 1
        assert got[: len(prompt_ids) - 1] == pytest.approx(log_probs(checkpoint, prompt_ids), abs=1e-3)


def test_segments_of_a_byte_level_vocabulary_are_text(server: RunningServer) -> None:
    answer = ask(server, tokens_to_generate=0)
    assert answer["segments"] == [["<begin>", "a", " small", " model", " reads"]]


def test_text_is_that_of_the_generated_ids_alone(
    staged: RunningServer, staged_offline: LLM, staged_checkpoint: Path
) -> None:
    """SentencePiece drops the space before the first word. Segments are the vocabulary's pieces."""
    vocabulary = transformers.AutoTokenizer.from_pretrained(staged_checkpoint.parent / "hf")
    for seed in range(400):
        sampling = SamplingSettings(temperature=4.0, seed=seed)
        output = staged_offline.generate(PROMPT, GenerationParams(max_tokens=2, sampling=sampling))[0]
        if output.text.startswith(" ") and "\ufffd" not in output.text:
            break
    fields = {"tokens_to_generate": 2, "temperature": 4.0, "random_seed": seed}
    answer = ask(staged, **fields)
    assert output.text.startswith(" ") and answer["text"] == [output.text[1:]]
    assert answer["segments"] == [vocabulary.convert_ids_to_tokens(output.result.token_ids)]
    assert ask(staged, **fields, echo_prompts=True)["text"] == [PROMPT + output.text]


def test_stages_stop_at_the_end_of_a_document(
    staged: RunningServer, staged_offline: LLM, staged_checkpoint: Path
) -> None:
    """I1."""
    for seed in range(100):
        sampling = SamplingSettings(temperature=4.0, seed=seed)
        result = staged_offline.generate(PROMPT, GenerationParams(max_tokens=60, sampling=sampling))[0].result
        if result.finish_reason == "eod":
            break
    answer = ask(staged, tokens_to_generate=60, temperature=4.0, random_seed=seed)
    assert answer["finish_reasons"] == ["eod"] and answer["segments"][0][-1] == "</s>"
    assert "</s>" not in answer["text"][0] and len(answer["segments"][0]) == len(result.tokens) < 60
    check(answer, staged_offline, staged_checkpoint, [PROMPT], max_tokens=60, sampling=sampling)


def test_prompts_of_other_lengths_get_as_many_tokens(
    staged: RunningServer, staged_offline: LLM, staged_checkpoint: Path
) -> None:
    """I2, I3 and I11: several prompts on stages, without log-probabilities; each has exits of its own."""
    prompts = [LONGER, "a", PROMPT]
    answer = ask(staged, prompts=prompts, tokens_to_generate=15, use_early_exit=True, early_exit_thres=0.95)
    check(answer, staged_offline, staged_checkpoint, prompts, max_tokens=15, **EARLY, exit_thresholds=0.95)
    assert [len(segments) for segments in answer["segments"]] == [15, 15, 15] and answer["logprobs"] is None
    assert len({tuple(exits) for exits in answer["exit_layers"]}) == 3


def test_requests_that_come_together(staged: RunningServer, staged_offline: LLM, staged_checkpoint: Path) -> None:
    """I7, with twice as many as there are slots; I5: log-probabilities of tokens behind exits."""
    thresholds = [0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0, 0.8]
    fields = {"tokens_to_generate": 20, "logprobs": True, "use_early_exit": True}
    with ThreadPoolExecutor(len(thresholds)) as pool:
        answers = list(pool.map(lambda value: ask(staged, early_exit_thres=value, **fields), thresholds))
    for threshold, answer in zip(thresholds, answers, strict=True):
        check(answer, staged_offline, staged_checkpoint, [PROMPT], max_tokens=20, **EARLY, exit_thresholds=threshold)


def test_stop_sequences(staged: RunningServer) -> None:
    """I8: strings, on stages; the server goes on."""
    whole = ask(staged, tokens_to_generate=40, logprobs=True)
    text, segments = whole["text"][0], whole["segments"][0]
    stop = text[10:12]
    answer = ask(staged, tokens_to_generate=40, logprobs=True, stop_sequences=["not in it", stop])
    assert answer["finish_reasons"] == ["stop"] and answer["text"] == [text[: text.index(stop)]]
    num_tokens = len(answer["segments"][0])
    assert answer["segments"][0] == segments[:num_tokens] and num_tokens < 40
    assert len(answer["logprobs"][0]) == num_tokens
    assert ask(staged, tokens_to_generate=40, stop_sequences=[])["text"] == [text]


def test_ends_of_lines_stop(server: RunningServer, offline: LLM) -> None:
    for seed in range(100):
        sampling = SamplingSettings(temperature=4.0, seed=seed)
        text = offline.generate(PROMPT, GenerationParams(max_tokens=60, sampling=sampling))[0].text
        if "\n" in text and "\n\n" not in text:
            break
    fields = {"tokens_to_generate": 60, "temperature": 4.0, "random_seed": seed}
    assert ask(server, **fields, stop_on_eol=True)["text"] == [text[: text.index("\n")]]
    assert ask(server, **fields, stop_on_double_eol=True)["text"] == [text]
    assert ask(server, **fields, stop_on_eol=False)["text"] == [text]


def test_a_begin_of_text_comes_once(server: RunningServer, staged: RunningServer) -> None:
    fields = {"tokens_to_generate": 0, "prompts": ["a", ""], "add_BOS": True}
    assert ask(server, **fields)["segments"] == [["<begin>", "a"], ["<begin>"]]
    assert ask(staged, **fields)["segments"] == [["<s>", "▁a"], ["<s>"]]


def test_seeds_differ(server: RunningServer) -> None:
    """I13: also those that are the same number as 32-bit floats."""
    fields = {"tokens_to_generate": 20, "temperature": 3.0}
    answers = {ask(server, **fields, random_seed=seed)["text"][0] for seed in (2**24, 2**24 + 1, 1234)}
    assert len(answers) == 3 and ask(server, **fields)["text"][0] in answers  # 1234 is the default


def test_unknown_fields_are_named(server: RunningServer) -> None:
    answer = ask(server, tokens_to_generate=2, early_exit_threshold=0.1, stop_token=3, no_log=True, length_penalty=1)
    assert answer["ignored_fields"] == ["early_exit_threshold", "stop_token"]


BAD = {
    "no prompts": ({"prompts": None}, "prompts: "),
    "an empty list": ({"prompts": []}, "prompts: "),
    "too many": ({"prompts": ["a"] * 129}, "prompts has 129 texts; give at most 128"),
    "no text": ({"prompts": [3]}, "prompts.0: "),
    "empty text": ({"prompts": ["a", ""]}, "add_BOS"),
    "half a character": ({"prompts": ["\ud83d"]}, "not valid Unicode"),
    "too long": ({"prompts": ["a " * 126]}, "at most 4 tokens fit behind this prompt"),
    "far too long": ({"prompts": ["a" * 1_000_000]}, "at most 256 tokens fit"),
    "negative count": ({"tokens_to_generate": -1}, "tokens_to_generate: "),
    "no count": ({"tokens_to_generate": True}, "tokens_to_generate: "),
    "no truth": ({"use_early_exit": "yes"}, "use_early_exit: "),
    "no threshold": ({"early_exit_thres": "0.8"}, "early_exit_thres: "),
    "not a number": ({"early_exit_thres": math.nan}, "early_exit_thres: "),
    "unknown exit": ({"use_early_exit": True, "exit_layers": [3]}, "its exits are 2 4"),
    "no exits": ({"exit_layers": ["2"]}, "exit_layers.0: "),
    "top_p_decay alone": ({"top_p_decay": 0.5}, "top_p_decay is 0.5, which has no effect without top_p"),
    "temperature": ({"temperature": -1}, "temperature is -1"),
    "no log-probs": ({"logprobs": 1}, "logprobs: "),
    "stops": ({"stop_sequences": "x"}, "stop_sequences: "),
    "empty stop": ({"stop_sequences": [""]}, "stop_sequences.0: "),
    "many stops": ({"stop_sequences": ["x"] * 17}, "stop_sequences: "),
    "stop ids": ({"stop_sequences": [3]}, "stop_sequences.0: "),
    "seed": ({"random_seed": 2**63}, "random_seed: "),
    "beams": ({"beam_width": 4}, "beam_width is 4, and beams are not served"),
    "colon": ({"prevent_newline_after_colon": True}, "prevent_newline_after_colon is not served"),
    "max_len": ({"max_len": 5}, "max_len is no longer used; give tokens_to_generate"),
    "sentences": ({"sentences": ["a"]}, "sentences is no longer used; give prompts"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused(server: RunningServer, case: str) -> None:
    """I10 among them: with a status that says so, and words for the field."""
    fields, words = BAD[case]
    body = json.dumps({"prompts": PROMPT, "tokens_to_generate": 5, **fields})  # writes NaN, as httpx would not
    response = httpx.put(f"{server.url}/api", content=body, headers=CLIENT_HEADER, timeout=60)
    assert response.status_code == 400 and list(response.json()) == ["message"], response.text
    assert words in response.json()["message"]


@pytest.mark.parametrize("body", [b"{", b"[1]", b'"text"', b"\xff", b"", b'{"prompts": 1e999}'])
def test_bad_bodies_are_refused(server: RunningServer, body: bytes) -> None:
    response = httpx.put(f"{server.url}/api", content=body, headers=CLIENT_HEADER)
    assert response.status_code == 400 and list(response.json()) == ["message"]
    assert ask(server, tokens_to_generate=1)["text"]
