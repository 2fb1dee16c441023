"""The engine for asynchronous callers, over a real engine process and over one that misbehaves."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, PromptTooLong, SamplingSettings
from megatron.early_exit.inference.text_engine import OutputDelta, RequestOutput
from megatron.early_exit.server import async_engine, engine_link
from megatron.early_exit.server.async_engine import AsyncEngine, OpenAnswer
from megatron.early_exit.server.config import EngineConfig
from megatron.early_exit.server.errors import NotReady, Overloaded
from megatron.early_exit.server.mailbox import Answers

NUM_SLOTS, MAX_WAITING = 2, 3
PROMPTS = ["a small model", "reads lines", [5, 6, 7]]
LONG = GenerationParams(max_tokens=200, ignore_eod=True)


class Recorder:
    """An observer."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.opened: list[Answers] = []

    def on_answers(self, answers: Answers) -> None:
        self.opened.append(answers)

    def on_delta(self, delta: OutputDelta, answer: OpenAnswer) -> None:
        assert answer.answers in self.opened

    def on_cancel(self, params: GenerationParams) -> None:
        self.cancelled += 1


class Bench:
    """One engine process for the tests of a module, with the loop that it belongs to."""

    def __init__(self, checkpoint: Path) -> None:
        self.loop, self.observer = asyncio.new_event_loop(), Recorder()
        self.engine = AsyncEngine(
            EngineConfig(str(checkpoint), {"max_requests": NUM_SLOTS}), MAX_WAITING, self.observer
        )
        self.loop.run_until_complete(self.engine.start())
        self.running = self.loop.create_task(self.engine.run())

    def run(self, work: Awaitable) -> object:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    def close(self) -> None:
        self.run(self.engine.close())
        self.run(self.running)
        self.loop.close()


@pytest.fixture(scope="module")
def bench(checkpoint: Path) -> Iterator[Bench]:
    bench = Bench(checkpoint)
    yield bench
    bench.close()


async def outputs_of(answers: Answers) -> list[RequestOutput]:
    """Read to the end; what was streamed is what the outputs are."""
    outputs: dict[tuple[int, int], RequestOutput] = {}
    texts: dict[tuple[int, int], str] = {}
    async with answers:
        async for deltas in answers:
            for delta in deltas:
                key = delta.output.prompt_index, delta.output.sample_index
                outputs[key] = delta.output
                texts[key] = texts.get(key, "") + delta.text
    assert texts == {key: output.text for key, output in outputs.items()}
    return [outputs[key] for key in sorted(outputs)]


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("params", [
    GenerationParams(max_tokens=12),
    GenerationParams(max_tokens=12, mode="early_exit", exit_thresholds=(0.3,), top_log_probs=2, echo=True),
    GenerationParams(max_tokens=12, mode="self_speculative", draft_length=3),
    GenerationParams(max_tokens=30, stop=("e",), ignore_eod=True),
    GenerationParams(max_tokens=8, n=2, sampling=SamplingSettings(temperature=0.9, seed=5)),
])  # fmt: skip
def test_answers_are_those_of_an_engine_in_this_process(bench: Bench, offline: LLM, params: GenerationParams) -> None:
    prompts = PROMPTS[: 2 if params.n > 1 else None]
    ours = bench.run(answer(bench.engine, prompts, params))
    theirs = offline.generate(prompts, params)
    assert [(one.prompt_index, one.sample_index) for one in ours] == [
        (one.prompt_index, one.sample_index) for one in theirs
    ]
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.error is None
        assert (mine.prompt_ids, mine.pieces, mine.finish_reason) == (
            right.prompt_ids,
            right.pieces,
            right.finish_reason,
        )
        assert [(t.token, t.exit_layer, t.is_final) for t in mine.tokens] == [
            (t.token, t.exit_layer, t.is_final) for t in right.tokens
        ]
        assert [t.log_prob for t in mine.tokens] == pytest.approx([t.log_prob for t in right.tokens], abs=1e-4)
        assert mine.result.token_ids == right.result.token_ids
        assert len(mine.result.prompt) == len(right.result.prompt)


async def answer(engine: AsyncEngine, prompts: list, params: GenerationParams) -> list[RequestOutput]:
    return await outputs_of(await engine.answer(prompts, params))


def test_all_or_nothing_is_admitted(bench: Bench) -> None:
    async def run() -> None:
        engine = bench.engine
        async with await engine.answer(PROMPTS[:2], LONG):
            async with await engine.answer(PROMPTS[:2], LONG):
                with pytest.raises(Overloaded, match="4 answers run or wait, and 2 more are too many") as refusal:
                    await engine.answer(PROMPTS[:2], LONG)
                assert 1 <= int(refusal.value.headers["Retry-After"]) <= 60
                async with await engine.answer(PROMPTS[:1], LONG):
                    assert engine.num_admitted == 5
            with pytest.raises(ValueError, match="asks for 6 answers; at most 5"):
                await engine.answer(PROMPTS * 2, LONG)
        assert engine.num_admitted == 0

    bench.run(run())


def test_leaving_cancels_what_runs_and_what_waits(bench: Bench) -> None:
    async def run() -> None:
        engine, before = bench.engine, bench.observer.cancelled
        async with await engine.answer(PROMPTS, LONG) as answers:
            await anext(answers)  # something has come, so that both slots are taken
            await until(lambda: (engine.load.num_running, engine.load.num_waiting) == (2, 1))
            assert engine.load.kv_cache_usage > 0
        await until(lambda: engine.load.num_running == 0)
        assert (engine.load.num_waiting, engine.load.kv_cache_usage, engine.num_admitted) == (0, 0.0, 0)
        assert bench.observer.cancelled == before + 3

    bench.run(run())


def test_a_request_that_is_cancelled_while_it_is_tokenized_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(prompt: object, add_special_tokens: bool = True) -> list[int]:
        time.sleep(0.3)
        return [1]

    async def run() -> None:
        monkeypatch.setattr(bench.engine.model.text_engine, "encode", slow)
        task = asyncio.create_task(bench.engine.answer(["a"], LONG))
        await until(lambda: bench.engine.num_admitted == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert bench.engine.num_admitted == 0

    bench.run(run())


def test_a_request_of_which_one_answer_cannot_be_added_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_engine = bench.engine.model.text_engine
    add = text_engine.add_checked

    def add_or_fail(ids: list[int], params: GenerationParams, sample_index: int, prompt_index: int) -> int:
        if prompt_index == 1:
            raise LookupError("no such id")
        return add(ids, params, sample_index, prompt_index)

    async def run() -> None:
        monkeypatch.setattr(text_engine, "add_checked", add_or_fail)
        with pytest.raises(LookupError):
            await bench.engine.answer(PROMPTS, LONG)
        assert (bench.engine.num_admitted, bench.engine.model.client.has_work) == (0, False)

    bench.run(run())


@pytest.mark.parametrize("prompts, params, error, words", [
    (["a" * 100_000], LONG, PromptTooLong, "at most 256 tokens fit"),
    (["a ", ""], LONG, None, None),
    ([[]], LONG, ValueError, "the prompt is empty"),
    ([[5], [10**6]], LONG, ValueError, "outside of the vocabulary"),
    (["a"], GenerationParams(mode="early_exit", exit_layers=(3,)), ValueError, "3"),
    (["a"], GenerationParams(stop_tokens=(10**6,)), ValueError, "stop_tokens"),
    (["a"], GenerationParams(mode="early_exit", plan_exits=True), ValueError, "calibration"),
])  # fmt: skip
def test_bad_requests_take_no_place(
    bench: Bench, prompts: list, params: GenerationParams, error: type[Exception] | None, words: str | None
) -> None:
    async def run() -> None:
        if error is None:  # the begin of text alone is a prompt
            (await bench.engine.answer(prompts, params)).close()
        else:
            with pytest.raises(error, match=words):
                await bench.engine.answer(prompts, params)
        assert bench.engine.num_admitted == 0

    bench.run(run())


def test_this_process_needs_no_torch() -> None:
    """Until it reads a tokenizer of transformers, which imports it."""
    script = "import sys, megatron.early_exit.server.run; sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", script]) == 0


def test_the_death_of_the_engine_ends_requests_and_a_new_one_serves(checkpoint: Path) -> None:
    async def run() -> None:
        engine = AsyncEngine(EngineConfig(str(checkpoint), {"max_requests": 1}, restart=True), MAX_WAITING)
        model = await engine.start()
        running = asyncio.create_task(engine.run())
        answers = await engine.answer(PROMPTS[:2], LONG)
        await anext(answers)
        os.kill(engine.process_id, signal.SIGKILL)
        started = time.monotonic()
        errors = [one.error for one in await outputs_of_rest(answers)]
        assert time.monotonic() - started < 5
        assert errors == ["the engine's process was ended by signal 9 (was there too little memory?)"] * 2
        with pytest.raises(NotReady, match="signal 9|being loaded"):
            await engine.answer(PROMPTS[:1], LONG)
        await until(lambda: engine.is_ready, 60)
        assert engine.model is not model
        assert [one.error for one in await answer(engine, PROMPTS[:1], GenerationParams(max_tokens=3))] == [None]
        await engine.close()
        await running

    asyncio.run(run())


async def outputs_of_rest(answers: Answers) -> list[RequestOutput]:
    outputs = {}
    async for deltas in answers:
        outputs |= {one.output.prompt_index: one.output for one in deltas}
    return [outputs[key] for key in sorted(outputs)]


MISBEHAVING = """
    import sys, time, msgspec, zmq
    from megatron.early_exit.server.engine_messages import *
    from megatron.early_exit.config.exits import ExitConfig
    from megatron.early_exit.config.data import TokenizerConfig
    from megatron.early_exit.inference.protocol import WorkerDescription
    settings = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ProcessSettings)
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(settings.endpoint)
    send = lambda message: socket.send(msgspec.msgpack.encode(message))
    def wait_for_request():  # pings come before it
        while not isinstance(msgspec.msgpack.decode(socket.recv(), type=ToEngine), Add):
            pass
    def end():  # what was sent arrives
        socket.close(linger=5000)
        context.term()
        sys.exit(1)
    ready = Ready(WorkerDescription(2, 8, 257, (), 2, 64), ExitConfig(), (), TokenizerConfig("ByteLevelTokenizer"),
                  (), "folder", 0, "none", "one")
"""


def misbehaving(monkeypatch: pytest.MonkeyPatch, folder: Path, what: str) -> None:
    (folder / "misbehaving_engine.py").write_text(textwrap.dedent(MISBEHAVING) + textwrap.dedent(what))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(engine_link, "_ENGINE_PROCESS", "misbehaving_engine")


@pytest.mark.parametrize("what, kind, words", [
    ("send(Failed('no such folder', 'ValueError')); time.sleep(30)", ValueError, "^no such folder$"),
    ("send(Failed('it broke')); end()", ExecutorError, "^it broke$"),
    ("sys.exit(3)", ExecutorError, "has ended with status 3"),
])  # fmt: skip
def test_what_a_failing_start_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, kind: type[Exception], words: str
) -> None:
    async def run() -> None:
        engine = AsyncEngine(EngineConfig("folder"), 0)
        with pytest.raises(kind, match=words):
            await engine.start()
        await engine.close()

    monkeypatch.setattr(engine_link, "_SECONDS_TO_END", 0.5)
    misbehaving(monkeypatch, tmp_path, what)
    asyncio.run(run())


def test_a_silent_engine_counts_as_dead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def run() -> None:
        engine = AsyncEngine(EngineConfig("folder", worker_timeout=0.5), 0)
        await engine.start()
        running = asyncio.create_task(engine.run())
        answers = await engine.answer([[1, 2]], LONG)
        (output,) = await outputs_of(answers)
        assert output.error == "the engine made no progress for 2 seconds"
        with pytest.raises(ExecutorError, match="no progress"):
            await running
        assert not engine.is_ready
        await engine.close()

    monkeypatch.setattr(engine_link, "_SECONDS_BETWEEN_PINGS", 0.2)
    monkeypatch.setattr(async_engine, "_SECONDS_FOR_WORKERS", 1.0)
    misbehaving(monkeypatch, tmp_path, "send(ready); time.sleep(60)")
    asyncio.run(run())


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, folders: Path) -> None:
    """Neither a process, when the engine does not listen, nor a folder, however the HTTP process ends."""

    async def run() -> None:
        engine = AsyncEngine(EngineConfig("folder"), 0)
        starting = asyncio.create_task(engine.start())
        await until(lambda: len(list(folders.glob("early_exit_*"))) == 1)
        await starting
        assert not list(folders.glob("early_exit_*"))
        process = engine.process_id
        await engine.close()
        assert has_ended(process)

    monkeypatch.setattr(engine_link, "_SECONDS_TO_END", 0.3)
    misbehaving(monkeypatch, folders, "send(ready); time.sleep(60)")
    asyncio.run(run())


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_an_engine_that_loads_is_ended_at_once(monkeypatch: pytest.MonkeyPatch, folders: Path, how: str) -> None:
    async def run() -> None:
        engine = AsyncEngine(EngineConfig("folder"), 0)
        starting = asyncio.create_task(engine.start())
        await until(lambda: engine.process_id is not None)
        process, started = engine.process_id, time.monotonic()
        if how == "closed":
            await engine.close()
        else:
            starting.cancel()
        (error,) = await asyncio.gather(starting, return_exceptions=True)
        assert isinstance(error, ExecutorError if how == "closed" else asyncio.CancelledError)
        assert time.monotonic() - started < 4
        assert has_ended(process)

    misbehaving(monkeypatch, folders, "send(Pong()); time.sleep(60)")
    asyncio.run(run())
    assert not list(folders.glob("early_exit_*"))


def test_an_engine_that_is_closed_while_its_process_starts_is_ended(
    monkeypatch: pytest.MonkeyPatch, folders: Path
) -> None:
    async def run() -> None:
        engine = AsyncEngine(EngineConfig("folder"), 0)
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(ExecutorError):
            await starting
        assert (engine.process_id, engine.is_ready) == (None, False)

    misbehaving(monkeypatch, folders, "send(Pong()); time.sleep(60)")
    asyncio.run(run())
    assert not list(folders.glob("early_exit_*"))


def test_sigterm_to_all_processes_of_a_service_lets_requests_finish(bench: Bench) -> None:
    """The HTTP process alone decides when the engine ends."""

    async def run() -> None:
        async with await bench.engine.answer(PROMPTS[:1], LONG) as answers:
            await anext(answers)
            os.kill(bench.engine.process_id, signal.SIGTERM)
            assert [one.finish_reason for one in await outputs_of_rest(answers)] == ["max_tokens"]

    bench.run(run())


def test_nobody_waits_for_an_engine_that_is_not_listened_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Broken(Recorder):
        def on_delta(self, delta: OutputDelta, answer: OpenAnswer) -> None:
            if not delta.is_finished:
                raise LookupError("no such gauge")

    async def run() -> None:
        engine = AsyncEngine(EngineConfig("folder"), 0, Broken())
        await engine.start()
        process, running = engine.process_id, asyncio.create_task(engine.run())
        (output,) = await outputs_of(await engine.answer([[1, 2]], LONG))
        assert "LookupError: no such gauge" in output.error
        with pytest.raises(ExecutorError, match="no such gauge"):
            await running
        assert has_ended(process)
        await engine.close()

    monkeypatch.setattr(engine_link, "_SECONDS_TO_END", 0.3)
    token = "RequestEvent(0, [GeneratedToken(65, 2, True, 0.5, -0.5)])"
    step = f"send(StepEvents([{token}], EngineLoad())); time.sleep(60)"
    misbehaving(monkeypatch, tmp_path, f"send(ready); wait_for_request(); {step}")
    asyncio.run(run())


def test_an_engine_that_cannot_be_loaded_again_ends_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the status of a failure, not that of a wrong setting."""

    async def run() -> None:
        engine = AsyncEngine(EngineConfig("folder", restart=True), 0)
        await engine.start()
        with pytest.raises(ExecutorError, match="it is gone; so it went 3 times"):
            await engine.run()
        await engine.close()

    first = tmp_path / "first"
    what = f"""
        import pathlib
        if pathlib.Path({str(first)!r}).exists():
            send(Failed("it is gone", "OSError")); time.sleep(60)
        pathlib.Path({str(first)!r}).touch()
        send(ready); end()
    """
    misbehaving(monkeypatch, tmp_path, textwrap.dedent(what))
    monkeypatch.setattr(engine_link, "_SECONDS_TO_END", 0.3)
    asyncio.run(run())


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr(engine_link, "_short_temporary_folder", lambda: str(tmp_path))
    return tmp_path


def has_ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_engines_that_end_time_after_time_are_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def run() -> None:
        engine = AsyncEngine(EngineConfig("folder", restart=True), 0)
        await engine.start()
        with pytest.raises(ExecutorError, match="with status 3; so it went 3 times"):
            await engine.run()
        assert not engine.is_ready
        await engine.close()

    misbehaving(monkeypatch, tmp_path, "send(ready); time.sleep(0.3); sys.exit(3)")
    asyncio.run(run())
