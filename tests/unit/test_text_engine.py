"""Text of requests over an engine whose tokens are written down: stop strings, stop tokens, what a delta covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.inference.engine.engine import Engine, Event, QueueFull
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, PromptTooLong, ScoreParams
from megatron.early_exit.inference.results import GeneratedToken, RequestResult, ScoreResult, Statistics
from megatron.early_exit.inference.text_engine import LocalTextEngine, OutputDelta
from tests.unit.fake_executor import EXITS, FakeExecutor

STATISTICS = Statistics(0, 0, 0, 0, 0, 0.0, 0.0, 0.0)


def generated(token: int) -> GeneratedToken:
    return GeneratedToken(token, 4, True, 0.5, -float(token))


@dataclass
class Script:
    """The tokens that a request will get, one list for each step."""

    steps: list[list[int]]
    params: GenerationParams
    tokens: list[GeneratedToken] = field(default_factory=list)


class ScriptedEngine:
    """Gives each request the tokens of the next script. Ends where an id is 0 (end of document) or a stop token."""

    def __init__(self, *scripts: list[list[int]], is_remote: bool = False, num_slots: int = 9) -> None:
        self.description = SimpleNamespace(num_positions=40, vocab_size=99)
        self.checks = self
        self.scripts = list(scripts)
        self.running: dict[int, Script] = {}
        self.stopped: list[tuple[int, int]] = []
        self.is_remote, self.num_slots = is_remote, num_slots
        self.later: list[Event] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.later)

    def check(self, params: GenerationParams) -> None:
        params.exit_policy(ExitConfig())
        params.drafting_exits(ExitConfig())

    def add(self, ids: Sequence[int], params: GenerationParams, *, seed_offset: int = 0) -> int:
        if len(self.running) == self.num_slots:
            raise QueueFull("full")
        request_id = 100 + len(self.scripts)
        self.running[request_id] = Script(self.scripts.pop(0), params)
        return request_id

    def add_scoring(self, ids: Sequence[int], params: ScoreParams) -> int:
        self.later.append(Event(50, [], ScoreResult(50, (), error=f"{len(ids)} ids")))
        return 50

    def step(self) -> list[Event]:
        events, self.later = self.later, []
        for request_id, script in list(self.running.items()):
            event = Event(request_id, [])
            for token in script.steps.pop(0):
                event.tokens.append(generated(token))
                script.tokens.append(event.tokens[-1])
                reason = "eod" if token == 0 else "stop" if token in script.params.stop_tokens else None
                if reason is not None:
                    event.result = self._end(request_id, reason)
                    break
            else:
                if not script.steps:
                    event.result = self._end(request_id, "max_tokens")
            events.append(event)
        return events

    def _end(self, request_id: int, reason: str, error: str | None = None) -> RequestResult:
        script = self.running.pop(request_id)
        statistics = Statistics(0, 4 * len(script.tokens), 0, 0, 0, 0.0, 0.0, 0.0)
        return RequestResult(request_id, tuple(script.tokens), reason, statistics, (), 4, error=error)

    def cancel(self, request_id: int) -> RequestResult | None:
        return self._end(request_id, "cancelled") if request_id in self.running else None

    def stop(self, request_id: int, num_tokens: int) -> RequestResult | None:
        self.stopped.append((request_id, num_tokens))
        if self.is_remote:
            # Its message arrives when one more step has been made.
            late = generated(1)
            script = self.running[request_id]
            script.tokens.append(late)
            self.later += [Event(request_id, [late]), Event(request_id, [], self._end(request_id, "stop"))]
            return None
        del self.running[request_id].tokens[num_tokens:]
        return self._end(request_id, "stop")

    def fail_all(self, error: str) -> list[Event]:
        return [Event(request_id, [], self._end(request_id, "error", error)) for request_id in list(self.running)]


class Words:
    """Id i is word i, as bytes."""

    cleans_up_spaces = False

    def __init__(self, *words: bytes) -> None:
        self.words = words

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [2] * len(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        if 98 in ids:
            raise RuntimeError("no word 98")
        return b"".join(self.words[token] for token in ids).decode(errors="replace")


EOD, A, B, C, AB, E2, REST, NONE = range(8)
WORDS = Words(b"<eod>", b"a", b"b", b"c", b"ab", b"\xe2", b"\x82\xac", b"")


def run(engine: ScriptedEngine, text_engine: LocalTextEngine, request_id: int) -> list[OutputDelta]:
    deltas: list[OutputDelta] = []
    while text_engine.has_work:
        deltas += [delta for delta in text_engine.step() if delta.output.request_id == request_id]
    return deltas


def deltas_of(steps: list[list[int]], is_remote: bool = False, **params: object) -> list[OutputDelta]:
    """Those of one request alone."""
    engine = ScriptedEngine(steps, is_remote=is_remote)
    text_engine = LocalTextEngine(engine, WORDS)
    deltas = run(engine, text_engine, text_engine.add([A], GenerationParams(**params)))
    assert not text_engine.has_work
    check(deltas)
    return deltas


def check(deltas: list[OutputDelta]) -> None:
    """Every delta covers whole tokens; together they are the output, and its result's tokens."""
    output = deltas[-1].output
    assert [delta.is_finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert all(delta.tokens for delta in deltas[:-1])
    for delta in deltas:
        assert len(delta.pieces) == len(delta.tokens) and "".join(delta.pieces) == delta.text
    assert [piece for delta in deltas for piece in delta.pieces] == output.pieces
    assert [token for delta in deltas for token in delta.tokens] == output.tokens == list(output.result.tokens)
    assert "".join(delta.text for delta in deltas) == output.text
    assert output.result.statistics.full_layer_passes == 4 * len(output.tokens)


def seen(deltas: list[OutputDelta]) -> list[tuple[str, list[int]]]:
    return [(delta.text, [token.token for token in delta.tokens]) for delta in deltas]


def test_nothing_of_a_stop_string_over_several_tokens_is_given_out() -> None:
    deltas = deltas_of([[C], [A], [B], [C], [A]], stop=("abca",))
    assert seen(deltas) == [("c", [C]), ("", [A, B, C, A])]
    assert deltas[-1].output.finish_reason == "stop"


def test_held_text_comes_when_it_is_no_stop_string_and_at_the_end() -> None:
    assert seen(deltas_of([[A], [B], [A], [C], [A], [B]], stop=("abc",))) == [
        ("ab", [A, B]), ("ac", [A, C]), ("ab", [A, B]),
    ]  # fmt: skip


def test_a_delta_covers_the_whole_text_of_its_tokens() -> None:
    """The first half of word `ab` is settled, its second may begin a stop string."""
    assert seen(deltas_of([[AB], [B], [A]], stop=("bc",))) == [("ab", [AB]), ("ba", [B, A])]
    assert seen(deltas_of([[C], [E2], [REST], [NONE]])) == [("c", [C]), ("\u20ac", [E2, REST]), ("", [NONE])]


@pytest.mark.parametrize(
    ("steps", "has_ended"),
    [([[A, B, C, A, B]], True), ([[A], [B], [C], [A], [B]], False), ([[A, B], [C, A, B]], True)],
)
def test_tokens_beyond_a_stop_string_are_dropped_and_not_counted(steps: list[list[int]], has_ended: bool) -> None:
    engine = ScriptedEngine(steps)
    text_engine = LocalTextEngine(engine, WORDS)
    request_id = text_engine.add([A], GenerationParams(stop=("bc",)))
    deltas = run(engine, text_engine, request_id)
    check(deltas)
    output = deltas[-1].output
    assert ([token.token for token in output.tokens], output.text) == ([A, B, C], "a")
    assert (output.finish_reason, output.pieces) == ("stop", ["a", "", ""])
    # A request that the step has ended anyway is not stopped.
    assert engine.stopped == ([] if has_ended else [(request_id, 3)])


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize(
    ("min_tokens", "text", "num_tokens"),
    [(0, "", 2), (1, "", 2), (3, "ab", 4), (4, "ababc", 7), (6, "ababc", 7), (7, "ababcabc", 8)],
)
def test_a_stop_string_within_the_first_tokens_does_not_count(
    min_tokens: int, text: str, num_tokens: int, is_remote: bool
) -> None:
    """One that ends behind them does, wherever it begins."""
    ids = [A, B, A, B, C, A, B, C]
    deltas = deltas_of([[token] for token in ids], is_remote=is_remote, stop=("ab",), min_tokens=min_tokens)
    output = deltas[-1].output
    assert (output.text, len(output.tokens)) == (text, num_tokens)
    assert output.finish_reason == ("stop" if num_tokens < 8 else "max_tokens")


def test_text_that_is_no_stop_string_any_more_is_given_out() -> None:
    assert seen(deltas_of([[A], [B], [C], [B]], stop=("ab", "bcx"), min_tokens=2)) == [
        ("a", [A]), ("bcb", [B, C, B]),
    ]  # fmt: skip


def test_a_result_that_comes_later_is_that_of_the_stop() -> None:
    deltas = deltas_of([[A], [B], [C], [A], [A]], is_remote=True, stop=("bc",))
    assert ("".join(delta.text for delta in deltas), deltas[-1].output.finish_reason) == ("a", "stop")
    assert [token.token for token in deltas[-1].output.tokens] == [A, B, C]


@pytest.mark.parametrize("steps", [[[A], [B], [AB], [C]], [[A, B, AB, C]], [[A], [B, AB]]])
def test_the_text_of_a_stop_token_is_not_given_out(steps: list[list[int]]) -> None:
    output = deltas_of(steps, stop_tokens=(AB,))[-1].output
    assert (output.text, output.finish_reason) == ("ab", "stop")
    assert [token.token for token in output.tokens] == [A, B, AB]


@pytest.mark.parametrize("steps", [[[A], [E2], [EOD]], [[A, E2, EOD, C]]])
def test_nor_is_that_of_an_end_and_what_is_held_comes_before_it(steps: list[list[int]]) -> None:
    output = deltas_of(steps, stop=("c",))[-1].output
    assert (output.pieces, output.finish_reason) == (["a", "\ufffd", ""], "eod")


def test_a_stop_string_before_a_stop_token_counts_alone() -> None:
    output = deltas_of([[A, B, C, EOD]], stop=("bc",))[-1].output
    assert (output.text, output.finish_reason, len(output.tokens)) == ("a", "stop", 3)
    output = deltas_of([[A, E2, EOD]], stop=("\ufffd",))[-1].output
    assert (output.text, output.finish_reason, len(output.tokens)) == ("a", "stop", 2)


def test_a_cancelled_request_gives_what_was_held() -> None:
    engine = ScriptedEngine([[A], [B], [C]], [[A], [B], [C]])
    text_engine = LocalTextEngine(engine, WORDS)
    first, other = (text_engine.add([A], GenerationParams(stop=("abc",))) for _ in range(2))
    assert text_engine.step() == []
    delta = text_engine.cancel(first)
    assert (delta.text, delta.is_finished, delta.output.finish_reason) == ("a", True, "cancelled")
    assert text_engine.cancel(first) is None and text_engine.cancel(-1) is None
    deltas = run(engine, text_engine, other)
    assert (deltas[-1].output.text, deltas[-1].output.finish_reason) == ("", "stop")


def test_a_request_whose_text_cannot_be_made_can_be_cancelled() -> None:
    class Broken(Words):
        def detokenize(self, ids: Sequence[int]) -> str:
            if self.is_broken:
                raise RuntimeError("broken")
            return super().detokenize(ids)

    words = Broken(*WORDS.words)
    words.is_broken = False
    engine = ScriptedEngine([[E2], [REST]])
    text_engine = LocalTextEngine(engine, words)
    request_id = text_engine.add([A], GenerationParams())
    text_engine.step()
    words.is_broken = True
    delta = text_engine.cancel(request_id)
    assert (delta.is_finished, delta.output.error) == (True, "its text could not be made (RuntimeError: broken)")
    assert not text_engine.has_work and text_engine.cancel(request_id) is None


def test_all_fail_with_what_they_have() -> None:
    engine = ScriptedEngine([[A], [B]], [[C], [B]])
    text_engine = LocalTextEngine(engine, WORDS)
    for sample_index in range(2):
        text_engine.add([A], GenerationParams(stop=("ab",)), sample_index, prompt_index=5)
    text_engine.step()
    deltas = text_engine.fail_all("lost")
    assert [(delta.text, delta.output.text) for delta in deltas] == [("a", "a"), ("", "c")]
    assert [delta.output.error for delta in deltas] == ["lost"] * 2
    assert [(delta.output.prompt_index, delta.output.sample_index) for delta in deltas] == [(5, 0), (5, 1)]
    assert not text_engine.has_work and text_engine.fail_all("again") == []


def test_text_that_cannot_be_made_ends_that_request_alone() -> None:
    engine = ScriptedEngine([[A], [98], [A]], [[A], [B], [98]], [[A], [B], [C]])
    text_engine = LocalTextEngine(engine, WORDS)
    ids = [text_engine.add([A], GenerationParams()) for _ in range(3)]
    deltas = [delta for _ in range(3) for delta in text_engine.step() if delta.is_finished]
    outputs = {delta.output.request_id: delta.output for delta in deltas}
    errors = [outputs[request_id].error for request_id in ids]
    assert errors == ["its text could not be made (RuntimeError: no word 98)"] * 2 + [None]
    assert [outputs[request_id].finish_reason for request_id in ids] == ["error", "error", "max_tokens"]
    assert not engine.running


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("x" * (40 * 256 + 1), {}, "the prompt has 10241 characters; at most 40 tokens fit"),
        ([], {}, "the prompt is empty"),
        ([A] * 41, {}, "the prompt has 41 tokens; at most 40 fit"),
        (b"a", {}, "a prompt is of the type bytes"),
        ([1, "a"], {}, "an id of the prompt is 'a'"),
        ("a", {"mode": "early_exit"}, "the model has no exits"),
        ("a", {"mode": "self_speculative"}, "the model has none"),
    ],
)
def test_prompts_are_refused_before_the_engine_sees_them(prompt: object, params: dict, message: str) -> None:
    engine = ScriptedEngine([[A]])
    text_engine = LocalTextEngine(engine, WORDS)
    with pytest.raises(ValueError, match=message) as caught:
        text_engine.add(prompt, GenerationParams(**params))
    assert isinstance(caught.value, PromptTooLong) == ("at most" in message)
    assert len(engine.scripts) == 1
    text_engine.add("x" * 40 * 256, GenerationParams())
    with pytest.raises(QueueFull):
        LocalTextEngine(ScriptedEngine(num_slots=0), WORDS).add("a", GenerationParams())


@pytest.mark.parametrize("mode", ["full", "self_speculative"])
def test_workers_that_have_ended_are_an_error_of_each_prompt(mode: str) -> None:
    """Also where costs would be measured first."""
    executor = FakeExecutor()
    llm = LLM(Engine(executor, EXITS), WORDS, EXITS)
    executor.close()
    for _ in range(2):
        outputs = llm.generate([[1], [2]], GenerationParams(mode=mode))
        assert [(output.finish_reason, output.error) for output in outputs] == 2 * [("error", "rank 1 has ended")]


def test_scores_come_beside_text() -> None:
    text_engine = LocalTextEngine(ScriptedEngine([[A], [B]]), WORDS)
    outputs, scores = text_engine.add([A], GenerationParams()), text_engine.add_scoring("xyz", ScoreParams())
    assert [one.request_id for one in text_engine.step()] == [scores, outputs]
    assert [one.request_id for one in text_engine.step()] == [outputs]
    with pytest.raises(ValueError, match="tokens could not be scored: 4 ids"):
        ScoreResult(scores, (), error="4 ids").check()
    assert text_engine.add_scoring([A, B], ScoreParams()) == scores and text_engine.cancel(scores) is None
    assert text_engine.step() == []  # nobody waits for it
    with pytest.raises(PromptTooLong):
        text_engine.add_scoring([A] * 41, ScoreParams())


def test_ids_of_prompts() -> None:
    text_engine = LocalTextEngine(ScriptedEngine([[A]], [[A]]), WORDS)
    assert text_engine.encode("xy") == [1, 2, 2]
    text_engine.add("xy", GenerationParams(add_special_tokens=False))
    (delta,) = text_engine.step()
    assert delta.output.prompt_ids == [2, 2]


TOKENS = st.sampled_from([A, B, C, AB, NONE])


@given(
    st.lists(st.lists(TOKENS, max_size=4), min_size=1, max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_deltas_by_definition(steps: list[list[int]], stops: list[str]) -> None:
    """A token is given out as soon as no stop string can begin in its text or before."""
    engine = ScriptedEngine([list(step) for step in steps])
    text_engine = LocalTextEngine(engine, WORDS)
    text_engine.add([A], GenerationParams(stop=stops))
    ids: list[int] = []
    deltas: list[OutputDelta] = []
    for step in steps:
        deltas += text_engine.step()
        given_out = sum(len(delta.tokens) for delta in deltas)
        for token in step:
            ids.append(token)
            if any(stop in WORDS.detokenize(ids) for stop in stops):
                break
        text = WORDS.detokenize(ids)
        ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
        if ends:
            begin = ends[0] - max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))
            assert (deltas[-1].output.text, deltas[-1].output.finish_reason) == (text[:begin], "stop")
            assert given_out == len(ids)
            break
        beginnings = [stop[:size] for stop in stops for size in range(len(stop))] + [""]
        num_sure = len(text) - max(len(one) for one in beginnings if text.endswith(one))
        if not (deltas and deltas[-1].is_finished):
            assert given_out == max(
                count for count in range(len(ids) + 1) if len(WORDS.detokenize(ids[:count])) <= num_sure
            )
    else:
        assert (deltas[-1].output.text, deltas[-1].output.finish_reason) == (text, "max_tokens")
    check(deltas)


ANY_TOKENS = st.sampled_from([A, B, E2, REST])
ANY_STOPS = st.lists(st.text("ab\u20ac\ufffd", min_size=1, max_size=3), max_size=3)


@given(st.lists(st.lists(ANY_TOKENS, max_size=4), min_size=1, max_size=12), ANY_STOPS, st.booleans())
def test_any_bytes_with_any_stop_strings(steps: list[list[int]], stops: list[str], is_remote: bool) -> None:
    """The text is that of all tokens up to the first stop string, however the bytes of a character come."""
    deltas = deltas_of([list(step) for step in steps], is_remote=is_remote, stop=stops)
    whole = WORDS.detokenize([token for step in steps for token in step])
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    if ends:
        whole = whole[: ends[0] - max(len(stop) for stop in stops if whole[: ends[0]].endswith(stop))]
    output = deltas[-1].output
    assert (output.text, output.finish_reason) == (whole, "stop" if ends else "max_tokens")
