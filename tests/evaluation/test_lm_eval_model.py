"""The model `early-exit` of lm-eval: every likelihood and answer is that of lm-eval's `hf` over the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from megatron.early_exit.evaluation.lm_eval.adapter import EarlyExitLM
from megatron.early_exit.evaluation.lm_eval.model_arguments import ModelArguments
from megatron.early_exit.evaluation.lm_eval.modes import DecodingMode
from megatron.early_exit.inference.certificates import AnswerSettings, Certificate, Certificates
from megatron.early_exit.inference.fingerprint import ExitFingerprint
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from tests.server import models

MAX_LENGTH = 48
LONG = "a small model reads lines of text, and writes another line: it is not here . " * 6

PAIRS = [
    ("a small model", " reads lines"), ("a small model", " reads text"), ("a small model  ", "reads"),
    ("it is not here\n", "a"), ("", "a small model"), ("", "x"), ("<begin>a small", " model"),
    (LONG, " another small line"), (LONG[:100], LONG[:100]), ("€é€", "\N{GRINNING FACE}x"),
    ("<begin>", "a"), ("it", "<end>"),
]  # fmt: skip
TEXTS = ["a small model", LONG, LONG[:170], "", "<begin> reads", "€é€ and", "x"]
QUESTIONS = [
    ("a small model", {}),
    ("a small model", {"until": ["\n", " line"]}),
    ("it is not here", {"until": "a", "max_gen_toks": 20}),
    (LONG, {"until": ["zzz"], "max_gen_toks": 12}),
    ("<begin>a small", {"until": ["<end>", "e"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.7}),
    ("reads lines", {"until": ["<begin>", "zzz"], "max_gen_toks": 30}),
    ("writes another", {"until": [f"no such end {number}" for number in range(20)] + ["t"], "max_gen_toks": 16}),
    ("€é€", {"max_new_tokens": 9}),
]


class Models(NamedTuple):
    ours: EarlyExitLM
    theirs: HFLM


def load(checkpoint: Path, **more: Any) -> EarlyExitLM:
    given = {"pretrained": str(checkpoint), "max_length": MAX_LENGTH, "max_requests": 4, "dtype": "float32", **more}
    return EarlyExitLM.create_from_arg_obj(given, {"batch_size": 1, "device": None})


@pytest.fixture(scope="module", params=["chat_model", "plain_model", "sentencepiece_chat_model"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return getattr(models, request.param)(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def both(checkpoint: Path) -> Models:
    folder = str(checkpoint.parent / "hf")
    # Its cache of logits mixes up positions of requests whose contexts and continuations, together, begin alike.
    theirs = HFLM(folder, device="cpu", dtype="float32", max_length=MAX_LENGTH, batch_size=1, logits_cache=False)
    theirs.__class__ = type("Short", (HFLM,), {"max_gen_toks": 30})  # 256 tokens of an answer do not fit
    ours = load(checkpoint)
    ours.max_gen_toks = 30
    return Models(ours, theirs)


def instances(kind: str, arguments: Sequence[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def test_likelihoods_of_continuations(both: Models) -> None:
    ours, theirs = (one.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True) for one in both)
    for pair, (value, is_greedy), (expected, expected_greedy) in zip(PAIRS, ours, theirs, strict=True):
        assert value == pytest.approx(expected, abs=2e-4), pair
        assert is_greedy == expected_greedy, pair


def test_a_greedy_continuation_is_seen(both: Models) -> None:
    (answer,) = both.ours.generate_until(instances("generate_until", [("a small", {"max_gen_toks": 3})]))
    pair = ("a small", answer)
    found = [one.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)[0][1] for one in both]
    assert found[0] == found[1]


def test_likelihoods_of_whole_texts(both: Models) -> None:
    requests = [(text,) for text in TEXTS]
    ours, theirs = (one.loglikelihood_rolling(instances("loglikelihood_rolling", requests)) for one in both)
    assert len(both.ours.tok_encode(LONG)) > 2 * MAX_LENGTH  # several windows
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours[TEXTS.index("a small model")] < 0


def test_answers(both: Models) -> None:
    ours, theirs = (one.generate_until(instances("generate_until", QUESTIONS)) for one in both)
    assert ours == theirs
    assert any(ours)


def test_ids_and_special_tokens(both: Models) -> None:
    ours, theirs = both
    for text in (*TEXTS, "a small ", "<begin>", "<begin><begin>x", "<s>a"):
        assert ours.tok_encode(text) == theirs.tok_encode(text), text
        for flag in (True, False):
            assert ours.tok_encode(text, add_special_tokens=flag) == theirs.tok_encode(text, add_special_tokens=flag)
    assert (ours.eot_token_id, ours.prefix_token_id) == (theirs.eot_token_id, theirs.prefix_token_id)
    assert (ours.max_length, ours.chat_template(True)) == (theirs.max_length, theirs.chat_template(True))


def test_contexts_of_spaces_are_none(both: Models) -> None:
    """`hf` needs a tokenizer that begins texts with a token here."""
    ours = both.ours.loglikelihood(instances("loglikelihood", [("  ", "lines"), ("", "  lines")]), disable_tqdm=True)
    assert ours[0] == pytest.approx(ours[1])


def test_what_else_runs_does_not_matter(both: Models) -> None:
    together = both.ours.loglikelihood(instances("loglikelihood", PAIRS * 2), disable_tqdm=True)
    answers = both.ours.generate_until(instances("generate_until", QUESTIONS))
    alone = [both.ours.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)[0] for pair in PAIRS]
    for (value, is_greedy), (expected, expected_greedy) in zip(together, alone * 2, strict=True):
        assert (value, is_greedy) == (pytest.approx(expected, abs=2e-4), expected_greedy)
    assert answers == [both.ours.generate_until(instances("generate_until", [one]))[0] for one in QUESTIONS]


def test_contexts_are_computed_once(both: Models) -> None:
    engine = both.ours.llm.engine
    pairs = [(LONG[:130], choice) for choice in (" reads", " text", " another small line", " is here")]
    lengths = [len(both.ours.tok_encode("".join(pair))) for pair in pairs]
    submit, rows = engine.executor.submit, []
    engine.executor.submit = lambda step: (rows.extend(len(one.tokens) for one in step.rows), submit(step))[1]
    try:
        both.ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    finally:
        engine.executor.submit = submit
    assert sum(rows) < min(lengths) + 4 * 16  # beside the context, less than a block each


def test_chats(both: Models) -> None:
    ours, theirs = both
    history = [{"role": "user", "content": "a small model"}]
    if ours.tokenizer.chat_template is None:
        with pytest.raises(ValueError, match="no chat template"):
            ours.apply_chat_template(history)
        return
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    begun = [*history, {"role": "assistant", "content": "reads"}]
    texts = [one.apply_chat_template(begun, add_generation_prompt=False) for one in both]
    assert texts[0] == texts[1]
    answers = [one.generate_until(instances("generate_until", [(texts[0], {"max_gen_toks": 8})])) for one in both]
    assert answers[0] == answers[1]


# One model, our own modes.


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> EarlyExitLM:
    return load(models.chat_model(tmp_path_factory.mktemp("modes")), max_length=models.MAX_POSITIONS)


def in_mode(lm: EarlyExitLM, words: str) -> EarlyExitLM:
    return EarlyExitLM(lm.llm, DecodingMode.parse(words))


def test_an_exit_in_place_of_the_model(chat: EarlyExitLM) -> None:
    lm = in_mode(chat, "exit:4")
    values = lm.loglikelihood(instances("loglikelihood", PAIRS[:3]), disable_tqdm=True)
    for (context, continuation), (value, _) in zip(PAIRS[:3], values, strict=True):
        first, whole = (lm.tok_encode(text) for text in (context.rstrip(), context + continuation))
        (head,) = chat.llm.score([whole], ScoreParams(exit_layers=(4,), final=False))[0].check().heads
        assert value == pytest.approx(math.fsum(head.log_probs[len(first) - 1 :]), abs=1e-4)
    full = chat.loglikelihood(instances("loglikelihood", PAIRS[:3]), disable_tqdm=True)
    assert abs(full[0][0] - values[0][0]) > 1e-2
    ids = lm.tok_encode("a small")
    for _ in range(6):  # greedily, by the exit's head over what it has said so far
        (head,) = chat.llm.score([ids], ScoreParams(exit_layers=(4,), final=False))[0].check().heads
        ids.append(head.tokens[-1])
    (answer,) = lm.generate_until(instances("generate_until", [("a small", {"max_gen_toks": 6})]))
    assert answer == lm.llm.tokenizer.detokenize(ids[-6:])
    assert lm.get_model_info()["likelihoods"] == "head of exit 4"


def test_modes_of_answers(chat: EarlyExitLM) -> None:
    questions = [(text, {"max_gen_toks": 12}) for text in ("a small", "it is", "reads")]
    answers = {
        words: in_mode(chat, words).generate_until(instances("generate_until", questions))
        for words in ("full", "self_speculative", "self_speculative:4", "early_exit:0.1", "early_exit:1,0.01")
    }
    assert answers["self_speculative"] == answers["self_speculative:4"] == answers["full"]
    for words, thresholds in (("early_exit:0.1", (0.1,)), ("early_exit:1,0.01", (1.0, 0.01))):
        params = GenerationParams(mode="early_exit", exit_thresholds=thresholds, max_tokens=12)
        expected = [chat.llm.tokenizer.detokenize(one.result.token_ids)
                    for one in chat.llm.generate([text for text, _ in questions], params)]  # fmt: skip
        assert answers[words] == expected != answers["full"]


def test_certified_thresholds(chat: EarlyExitLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate holds for one length of answers; likelihoods need none."""
    fingerprint = ExitFingerprint("", (2, 4), "fp32", None, None, "", ())
    certificate = Certificate(
        0.9, 0.05, "A-max", fingerprint, AnswerSettings(max_tokens=12), {2: 0.1, 4: 0.2}, None, 0.01, 0.02, {}
    )
    checks = replace(chat.llm.engine.checks, certificates=Certificates((certificate,)))
    with pytest.raises(ValueError, match=r"certified:0\.9 needs a certificate"):
        in_mode(chat, "certified:0.9")
    monkeypatch.setattr(chat.llm.engine, "checks", checks)
    monkeypatch.setattr(chat.llm.engine._planner, "_checks", checks)
    lm, questions = in_mode(chat, "certified:0.9"), [(text, {"max_gen_toks": 12}) for text in ("a small", "it is")]
    answers = lm.generate_until(instances("generate_until", questions))
    assert answers == in_mode(chat, "early_exit:0.1,0.2").generate_until(instances("generate_until", questions))
    assert lm.get_model_info()["thresholds"] == {"2": 0.1, "4": 0.2}
    with pytest.raises(ValueError, match="made for answers of max_tokens 12, not 20"):
        lm.check_answers({"max_gen_toks": 20})
    with pytest.raises(ValueError, match="made for answers of max_tokens 12, not 20"):
        lm.generate_until(instances("generate_until", [("a", {"max_gen_toks": 20})]))
    assert lm.loglikelihood(instances("loglikelihood", PAIRS[:2]), disable_tqdm=True)


def test_results_are_given_to_a_cache_as_they_come(chat: EarlyExitLM) -> None:
    lm, kept = in_mode(chat, "full"), []
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda *given: kept.append(given)))
    values = lm.loglikelihood(instances("loglikelihood", PAIRS[:2]), disable_tqdm=True)
    whole = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("a small",)]))
    question = ("a small", {"max_gen_toks": 3})
    answers = lm.generate_until(instances("generate_until", [question]))
    expected = [("loglikelihood", pair, value) for pair, value in zip(PAIRS[:2], values, strict=True)]
    expected += [("loglikelihood_rolling", ("a small",), whole[0]), ("generate_until", question, answers[0])]
    assert sorted(kept, key=repr) == sorted(expected, key=repr)


def test_samples_differ_and_can_be_repeated(chat: EarlyExitLM) -> None:
    question = ("a small", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12, "top_p": 0.95})
    first, second = (chat.generate_until(instances("generate_until", [question] * 3)) for _ in range(2))
    assert first == second and len(set(first)) == 3


def test_what_cannot_be_asked(chat: EarlyExitLM) -> None:
    refused = {
        "num_beams=4": {"num_beams": 4, "max_gen_toks": 8}, "max_gen_toks": {"max_gen_toks": 256},
        "top_p is 1.5": {"top_p": 1.5, "max_gen_toks": 8},
    }  # fmt: skip
    for words, arguments in refused.items():
        with pytest.raises(ValueError, match=words):
            chat.generate_until(instances("generate_until", [("a", arguments)]))
    with pytest.raises(ValueError, match="has no tokens"):
        chat.loglikelihood(instances("loglikelihood", [("a small", "")]), disable_tqdm=True)
    with pytest.raises(ValueError, match="a continuation has .* tokens, but the model takes 256"):
        chat.loglikelihood(instances("loglikelihood", [("a", LONG * 4)]), disable_tqdm=True)
    assert not chat.llm.engine.has_work


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("early_exit", "'early_exit' names no way to decode"),
        ("early_exit:high", "'high' is not a number"),
        ("full:1", "'full:1' names no way"),
        ("exit:two", "'two' is not a layer number"),
        ("early_exit:2", "threshold is 2.0"),
        ("certified:", "names no way"),
        ("certified:2", "level between 0 and 1"),
        ("beam", "there are full, early_exit:THRESHOLD"),
    ],
)
def test_words_that_name_no_mode(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodingMode.parse(words)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"exit_layr": 2}, "no argument 'exit_layr'; did you mean exit_layer"),
        ({"pretrained": ""}, "needs pretrained=DIR"),
        ({"exit_thresholds": 0.9}, "exit_thresholds=0.9 has no effect here: the mode is full"),
        ({"mode": "self_speculative", "exit_layers": 4}, "exit_layers=4 has no effect here"),
        ({"exit_layer": 4, "draft_exit": 2}, "draft_exit=2 has no effect here"),
        ({"exit_layer": 4, "mode": "early_exit"}, "leave out mode=early_exit"),
        ({"mode": "exit:4", "draft_length": 2}, "draft_length=2 has no effect here"),
        ({"mode": "early_exit", "exit_thresholds": "0.9/x"}, "'0.9/x' is no number"),
        ({"iteration": "last"}, "iteration is 'last'; it must be an integer"),
        ({"add_bos_token": "maybe"}, "add_bos_token is 'maybe'"),
        ({"device": "mps"}, "device=mps, but this program computes on"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"exit_layer": 3}, "no exit named 3"),
        ({"mode": "self_speculative", "draft_exit": 3}, "draft_exit is 3"),
    ],
)
def test_arguments_that_contradict(chat: EarlyExitLM, given: dict[str, Any], message: str) -> None:
    folder = str(Path(chat.get_model_info()["checkpoint"]).parent)
    with pytest.raises(ValueError, match=message):
        EarlyExitLM.create_from_arg_obj({"pretrained": folder, **given})


def test_arguments_that_say_how_to_decode() -> None:
    decoding: Callable[..., DecodingMode] = lambda **given: ModelArguments("folder", **given).decoding()
    assert decoding().params == GenerationParams()
    two = decoding(mode="early_exit", exit_thresholds="0.9/0.8", exit_layers="2/4")
    assert (two.params.exit_thresholds, two.params.exit_layers) == ((0.9, 0.8), (2, 4))
    assert decoding(mode="early_exit", exit_thresholds="certified:0.9").params.certified_level == 0.9
    assert decoding(mode="certified:0.9").params.certified_level == 0.9
    assert decoding(mode="self_speculative", draft_exit=4, draft_length=3).params.draft_length == 3
    assert decoding(exit_layer=2) == decoding(mode="exit:2")
