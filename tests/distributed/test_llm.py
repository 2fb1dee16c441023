"""Text in, text out, with a tokenizer of one character an id."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings, ScoreParams
from megatron.early_exit.inference.text import StopStrings
from megatron.early_exit.inference.text_engine import RequestOutput
from megatron.early_exit.inference.worker.head_output import HeadOutput
from megatron.early_exit.inference.worker.sampling import Draw
from tests.configs import VOCAB_SIZE
from tests.distributed.engines import check_invariants, decoder_of, make_engine, reference_over
from tests.distributed.parallel_model import layout
from tests.distributed.test_added_exits import save
from tests.distributed.workers import run_distributed
from tests.reference_checkpoint import decoding_config

SAMPLED = GenerationParams(max_tokens=20, sampling=SamplingSettings(temperature=1.0, seed=3))
MODES = ("full", "early_exit", "self_speculative")


class Characters:
    """Ids 0 to 93 are printable characters."""

    cleans_up_spaces = False

    def tokenize(self, text: str) -> list[int]:
        return [ord(character) - 33 for character in text]

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.tokenize(text)

    def detokenize(self, ids: list[int]) -> str:
        return "".join(chr(33 + token) for token in ids)


def make_llm(cfg: RunConfig, **changes: object) -> LLM:
    return LLM(make_engine(cfg, vocab_size=94, **changes), Characters(), cfg.exits)


def on_one(function: object, **kwargs: object) -> object:
    return run_distributed(1, function, cfg=decoding_config(), **kwargs)[0]


def generate(cfg: RunConfig, prompts: object, params: object, **changes: object) -> list[RequestOutput]:
    with layout(cfg):
        llm = make_llm(cfg, **changes)
        answers = llm.generate(prompts, params)
        assert not llm.engine.has_work and not llm._outputs and not llm._scores
        check_invariants(llm.engine)
        return answers


def test_texts_and_ids() -> None:
    texts = on_one(generate, prompts=["hello", "world!"], params=SAMPLED)
    ids = on_one(generate, prompts=[Characters().tokenize("hello"), Characters().tokenize("world!")], params=SAMPLED)
    single = on_one(generate, prompts="hello", params=SAMPLED)
    assert [one.text for one in texts] == [one.text for one in ids]
    assert [one.text for one in single] == [texts[0].text]
    for one in texts:
        assert one.text == Characters().detokenize(one.result.token_ids) == "".join(one.pieces)
        assert [t.token for t in one.tokens] == one.result.token_ids
        assert (one.finish_reason, len(one.tokens), one.error) == ("max_tokens", 20, None)


def test_every_prompt_may_have_settings_of_its_own() -> None:
    params = [replace(SAMPLED, max_tokens=5 + i, mode=mode) for i, mode in enumerate(MODES)]
    answers = on_one(generate, prompts=["a", "b", "c"], params=params)
    assert [len(one.tokens) for one in answers] == [5, 6, 7]


def test_several_answers() -> None:
    three = on_one(generate, prompts=["hello", "world"], params=replace(SAMPLED, n=3))
    assert [(one.prompt_index, one.sample_index) for one in three] == [(p, s) for p in (0, 1) for s in (0, 1, 2)]
    # (With random weights all tokens are about equally probable, so the two prompts' answers to one seed are alike.)
    assert len({one.text for one in three[:3]}) == len({one.text for one in three[3:]}) == 3
    settings = replace(SAMPLED.sampling, seed=SAMPLED.sampling.seed + 2)
    (alone,) = on_one(generate, prompts="world", params=replace(SAMPLED, sampling=settings))
    assert alone.text == three[5].text


@pytest.mark.parametrize("mode", MODES)
def test_stop_strings(mode: str) -> None:
    params = replace(SAMPLED, mode=mode, exit_thresholds=(0.011,), draft_length=4)
    (whole,) = on_one(generate, prompts="hello", params=params)
    stop = whole.text[7:9]
    at = whole.text.index(stop)
    (cut,) = on_one(generate, prompts="hello", params=replace(params, stop=("not there", stop)))
    assert cut.text == whole.text[:at]
    assert cut.finish_reason == "stop"
    assert [t.token for t in cut.result.tokens] == whole.result.token_ids[: at + 2]
    assert [t.token for t in cut.tokens] == whole.result.token_ids[: at + 2]
    assert sum(usage.tokens for usage in cut.result.usage) == at + 2


def test_a_stop_string_at_the_very_end() -> None:
    (whole,) = on_one(generate, prompts="hello", params=SAMPLED)
    (cut,) = on_one(generate, prompts="hello", params=replace(SAMPLED, stop=(whole.text[-2:],)))
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(whole.text[-2:])], "stop")


def test_what_cannot_be_answered_harms_no_other() -> None:
    prompts = ["hello", "", "x" * 41, [1, 95], "hello", "hello"]
    params = [*[SAMPLED] * 4, replace(SAMPLED, stop_tokens=(1, 94)), SAMPLED]
    first, *refused, last = on_one(generate, prompts=prompts, params=params)
    assert first.text == last.text and len(first.text) == 20
    assert [(one.finish_reason, one.result, one.text) for one in refused] == [("error", None, "")] * 4
    empty, long, unknown, stops = (one.error for one in refused)
    assert "the prompt is empty" in empty and "the prompt has 41 tokens" in long
    assert "the prompt has ids outside of the vocabulary of 94: [95]" in unknown
    assert "stop_tokens" in stops and "outside of the vocabulary of 94" in stops and "[94]" in stops


@pytest.mark.parametrize("mode", MODES)
def test_the_text_of_a_stop_token_is_left_out(mode: str) -> None:
    params = replace(SAMPLED, mode=mode, exit_thresholds=(0.011,), draft_length=4)
    (whole,) = on_one(generate, prompts="hello", params=params)
    stop = whole.result.token_ids[8]
    (cut,) = on_one(generate, prompts="hello", params=replace(params, stop_tokens=(stop,)))
    count = whole.result.token_ids.index(stop) + 1
    assert cut.result.token_ids == whole.result.token_ids[:count] and cut.finish_reason == "stop"
    assert (cut.text, cut.pieces[-1]) == (whole.text[: count - 1], "")


def test_prompts_of_other_types() -> None:
    ids = Characters().tokenize("hello")
    prompts = [np.array(ids), torch.tensor(ids), tuple(np.int64(token) for token in ids), b"hello", {"a": 1}, [1, "a"]]
    *good, from_bytes, mapping, mixed = on_one(generate, prompts=prompts, params=SAMPLED)
    (expected,) = on_one(generate, prompts="hello", params=SAMPLED)
    assert [one.text for one in good] == [expected.text] * 3
    assert [one.prompt_ids for one in good] == [ids] * 3
    assert "type bytes" in from_bytes.error and "type dict" in mapping.error and "prompt is 'a'" in mixed.error


def test_numbers_at_their_limits_end_no_other_request() -> None:
    """Quotients that overflow are no numbers."""
    tiny = [
        SamplingSettings(temperature=1e-38), SamplingSettings(temperature=5e-324), SamplingSettings(temperature=1e-5),
        SamplingSettings(temperature=1e-38, top_k=5), SamplingSettings(temperature=1e-38, top_p=0.5),
        SamplingSettings(repetition_penalty=1e-38), SamplingSettings(temperature=1.0, repetition_penalty=1e-38),
        SamplingSettings(temperature=0.1, repetition_penalty=1e-38),
        SamplingSettings(temperature=0.1, repetition_penalty=1e38), SamplingSettings(temperature=1e38),
    ]  # fmt: skip
    modes = ("full", "self_speculative")
    params = [GenerationParams(max_tokens=6, mode=mode, sampling=settings) for settings in tiny for mode in modes]
    answers = on_one(generate, prompts=["hello"] * len(params), params=params, num_slots=len(params))
    (greedy,) = on_one(generate, prompts="hello", params=GenerationParams(max_tokens=6))
    assert [one.finish_reason for one in answers] == ["max_tokens"] * len(params)
    assert [one.text for one in answers[:10]] == [greedy.text] * 10


def fails_by_itself(cfg: RunConfig, mode: str) -> None:
    with layout(cfg):
        llm = make_llm(cfg)
        params = replace(SAMPLED, mode=mode, max_tokens=6)
        bad = replace(params, sampling=replace(SAMPLED.sampling, seed=666))
        expected = [one.text for one in llm.generate(["hello", "world"], params)]
        draw = HeadOutput.draw

        def fail(output: HeadOutput, draws: list[Draw]) -> list[tuple[int, float]]:
            if any(one.settings.seed == 666 and one.index == 2 for one in draws):
                raise MemoryError("no room")
            return draw(output, draws)

        with mock.patch.object(HeadOutput, "draw", fail):
            first, broken, last = llm.generate(["hello", "other", "world"], [params, bad, params])
        assert [first.text, last.text] == expected
        assert (broken.finish_reason, len(broken.tokens) <= 2) == ("error", True)
        assert "MemoryError: no room" in broken.error
        check_invariants(llm.engine)
        assert [one.text for one in llm.generate(["hello", "world"], params)] == expected


@pytest.mark.parametrize("mode", MODES)
def test_an_error_while_a_token_is_drawn_ends_that_request_alone(mode: str) -> None:
    on_one(fails_by_itself, mode=mode)


def text_fails_by_itself(cfg: RunConfig) -> None:
    with layout(cfg):
        llm = make_llm(cfg)
        expected = [one.text for one in llm.generate(["hello", "world"], SAMPLED)]
        add = StopStrings.add

        def fail(stops: StopStrings, piece: str, **settings: bool) -> None:
            if [search.stop for search in stops._searches] == ["bad"]:
                raise RuntimeError("no text")
            add(stops, piece, **settings)

        with mock.patch.object(StopStrings, "add", fail):
            settings = [SAMPLED, replace(SAMPLED, stop="bad"), SAMPLED]
            first, broken, last = llm.generate(["hello", "other", "world"], settings)
        assert [first.text, last.text] == expected
        assert (broken.finish_reason, broken.error) == ("error", "its text could not be made (RuntimeError: no text)")
        while llm.engine.has_work:
            llm.engine.step()
        assert not llm._outputs and not llm._scores
        check_invariants(llm.engine)
        with mock.patch.object(Characters, "encode_prompt", side_effect=TypeError("TextEncodeInput must be ...")):
            (refused,) = llm.generate("hello", SAMPLED)
        assert (refused.finish_reason, refused.error) == ("error", "TypeError: TextEncodeInput must be ...")


def test_an_error_of_the_tokenizer_ends_that_request_alone() -> None:
    on_one(text_fails_by_itself)


def load_two(folder: Path) -> list[list[int]]:
    """The answers of two models that are loaded side by side, and of a third in place of the first."""
    from megatron.core import parallel_state

    params = GenerationParams(max_tokens=5)
    one, two = LLM.load(folder), LLM.load(str(folder))
    answers = [model.generate([5, 6], params)[0].result.token_ids for model in (one, two, one)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match=r"but 2 processes were started \(WORLD_SIZE\)"):
            LLM.load(folder, tensor_parallel_size=2)
    assert not parallel_state.model_parallel_is_initialized()
    one = LLM.load(folder)
    return [*answers, one.generate([5, 6], params)[0].result.token_ids]


def test_several_models_in_one_process(tmp_path: Path) -> None:
    cfg = decoding_config()
    cfg = replace(cfg, data=replace(cfg.data, vocab_size=VOCAB_SIZE - 1))
    run_distributed(1, save, cfg=cfg, folder=tmp_path)
    (answers,) = run_distributed(1, load_two, folder=tmp_path)
    assert len(answers[0]) == 5 and answers == [answers[0]] * 4


def load_two_on_two_ranks_each(folder: Path) -> None:
    params = GenerationParams(max_tokens=8, mode="early_exit", exit_thresholds=(0.2,))
    sampled = GenerationParams(max_tokens=8, sampling=SamplingSettings(temperature=1.0, seed=3))
    alone = LLM.load(folder)
    pairs = [LLM.load(folder, tensor_parallel_size=2) for _ in range(2)]
    streams = [pair.stream([[5, 6], [7]], [params, sampled]) for pair in pairs]
    outputs = [[], []]
    for deltas in zip(*streams, strict=True):  # both at once
        for delta, of_pair in zip(deltas, outputs, strict=True):
            of_pair += [delta.output] if delta.is_finished else []
    expected = alone.generate([[5, 6], [7]], [params, sampled])
    for of_pair in outputs:
        of_pair.sort(key=lambda output: output.prompt_index)
        assert [one.result.token_ids for one in of_pair] == [one.result.token_ids for one in expected]
        assert [[t.exit_layer for t in one.tokens] for one in of_pair] == [
            [t.exit_layer for t in one.tokens] for one in expected
        ]
    pairs[0].close()
    assert [one.result.token_ids for one in pairs[1].generate([[5, 6]], params)] == [expected[0].result.token_ids]
    with pytest.raises(ValueError, match="heads"):
        LLM.load(folder, tensor_parallel_size=3)


def test_models_on_two_ranks_beside_each_other(tmp_path: Path) -> None:
    cfg = decoding_config()
    cfg = replace(cfg, data=replace(cfg.data, vocab_size=VOCAB_SIZE - 1))
    run_distributed(1, save, cfg=cfg, folder=tmp_path)
    run_distributed(1, load_two_on_two_ranks_each, folder=tmp_path)


def test_a_full_queue_refuses() -> None:
    answers = on_one(generate, prompts=["a"] * 9, params=SAMPLED, num_slots=2, max_waiting=3)
    assert [one.error is None for one in answers] == [True] * 5 + [False] * 4
    assert "all 2 slots are taken and 3 requests wait" in answers[5].error


def refused(cfg: RunConfig) -> None:
    with layout(cfg):
        llm = make_llm(cfg)
        with pytest.raises(ValueError, match="2 prompts but 1 settings"):
            llm.generate(["a", "b"], [SAMPLED])
        with pytest.raises(ValueError, match="no exit named 9"):
            llm.generate(["a"], replace(SAMPLED, mode="early_exit", exit_layers=(9,)))
        assert llm.generate([]) == []
        assert not llm.engine.has_work


def test_settings_that_do_not_fit_are_refused_before_anything_runs() -> None:
    on_one(refused)


def two_streams(cfg: RunConfig) -> None:
    with layout(cfg):
        llm = make_llm(cfg)
        expected = [one.text for one in llm.generate(["hello", "world"], SAMPLED)]
        texts = ["", ""]
        streams = [llm.stream("hello", SAMPLED), llm.stream("world", SAMPLED)]
        while streams:
            for index, stream in reversed(list(enumerate(streams))):
                delta = next(stream, None)
                if delta is None:
                    streams.pop(index)
                else:
                    texts["world".startswith(chr(33 + delta.output.prompt_ids[0]))] += delta.text
        assert texts == expected
        assert not llm.engine.has_work and not llm._outputs and not llm._scores


def test_two_streams_at_once() -> None:
    on_one(two_streams)


def score(cfg: RunConfig) -> None:
    with layout(cfg):
        llm = make_llm(cfg)
        (expected,) = llm.generate("hello", SAMPLED)
        stream = llm.stream("hello", SAMPLED)
        text = next(stream).text
        params = ScoreParams(exit_layers=(1, 3), top_log_probs=3, logits=True, score_from=1)
        first, *refused, second = llm.score(["world", "", "x" * 41, [1, 95], [5], [6, 7]], params)
        assert text + "".join(delta.text for delta in stream) == expected.text
        assert not llm.engine.has_work and not llm._outputs and not llm._scores
        check_invariants(llm.engine)
        for result, ids in ((first, Characters().tokenize("world")), (second, [6, 7])):
            _, logits = reference_over(cfg, ids)
            assert (result.error, [head.exit_layer for head in result.heads]) == (None, [1, 3, None])
            for head in result.heads:
                theirs = logits[head.exit_layer][1:, :94]
                assert np.abs(head.logits - theirs.numpy()).max() < 1e-5
                log_probs, best = theirs.log_softmax(-1), theirs.argmax(-1)
                assert list(head.tokens) == best.tolist()
                assert list(head.confidences) == pytest.approx(log_probs.max(-1).values.exp().tolist(), rel=1e-5)
                given = [log_probs[row, token].item() for row, token in enumerate(ids[2:])]
                assert list(head.log_probs) == pytest.approx(given, rel=1e-5)
                assert [[token for token, _ in top] for top in head.top_log_probs] == log_probs.topk(3).indices.tolist()
        errors = ("prompt is empty", "41 tokens", "vocabulary of 94: [95]", "score_from is 1")
        for result, words in zip(refused, errors, strict=True):
            assert words in result.error and result.heads == ()
        assert llm.score([], params) == []
        (one,) = llm.score([5, 6, 7])  # one prompt of ids
        assert [len(head.tokens) for head in one.heads] == [3] * 4
        with pytest.raises(ValueError, match="exit_layers names 9, but the model's exits are 1, 2, 3"):
            llm.score("world", ScoreParams(exit_layers=(9,)))
        with pytest.raises(ValueError, match="it must be ScoreParams"):
            llm.score("world", SAMPLED)
        with pytest.raises(ValueError, match="2 prompts but 1 settings"):
            llm.score([[5, 6], [7]], [params])
        each = [ScoreParams(exit_layers=()), ScoreParams(exit_layers=(2,), final=False, score_last=False)]
        final, second = llm.score([[5, 6, 7], [5, 6, 8]], each)
        assert [len(head.tokens) for head in (*final.heads, *second.heads)] == [3, 2]
        for ours, theirs in ((final.heads[0], one.heads[-1]), (second.heads[0], one.heads[1])):
            assert ours.log_probs[0] == pytest.approx(theirs.log_probs[0], rel=1e-5)


def many_scores(cfg: RunConfig) -> None:
    """More than are given to the engine at once come in their places, and leaving early cancels the others."""
    with layout(cfg):
        llm = make_llm(cfg)
        prompts, params = [[5, 6, number] for number in range(90)], ScoreParams(exit_layers=())
        most = 16 * llm.engine.description.num_slots
        assert most < len(prompts)
        step, loads = llm._step, []
        llm._step = lambda: (loads.append(llm.engine.num_waiting + llm.engine.num_running), step())
        results = llm.score(prompts, params)
        assert max(loads) == most
        for number in (0, 41, 89):
            (alone,) = llm.score([prompts[number]], params)
            assert results[number].heads[0].log_probs == pytest.approx(alone.heads[0].log_probs, rel=1e-5)
        scores = llm.stream_scores(prompts, params)
        assert len({index for index, _ in itertools.islice(scores, 5)}) == 5
        scores.close()
        assert not llm.engine.has_work and not llm._outputs and not llm._scores


def test_many_scores() -> None:
    on_one(many_scores)


def test_scores_of_given_tokens_while_a_stream_is_open() -> None:
    on_one(score)


def leave_early(cfg: RunConfig) -> None:
    with layout(cfg):
        llm = make_llm(cfg)
        expected = [one.text for one in llm.generate(["hello", "world"], SAMPLED)]
        other = llm.stream("world", SAMPLED)
        text = next(other).text
        for delta in llm.stream("hello", SAMPLED):
            if len(delta.output.tokens) >= 5:
                break
        text += "".join(delta.text for delta in other)
        assert text == expected[1]
        assert not llm.engine.num_running and not llm.engine.num_waiting
        check_invariants(llm.engine)
        assert [one.text for one in llm.generate(["hello", "world"], SAMPLED)] == expected


def test_leaving_a_stream_cancels_its_requests_alone() -> None:
    on_one(leave_early)


def fail(cfg: RunConfig) -> None:
    with layout(cfg):
        llm = make_llm(cfg)
        expected = llm.generate("hello", SAMPLED)[0].text
        other = llm.stream("world", SAMPLED)
        next(other)
        with mock.patch.object(decoder_of(llm.engine), "final_output", lambda hidden, **_: 1 / 0):
            (failed,) = llm.generate("hello", SAMPLED)
        *_, last = other
        for one in (failed, last.output):
            assert one.finish_reason == "error"
            assert "the step that it was part of failed (ZeroDivisionError" in one.error
        check_invariants(llm.engine)
        assert llm.generate("hello", SAMPLED)[0].text == expected


def test_after_a_failure_all_requests_have_ended_and_the_next_ones_run() -> None:
    on_one(fail)
