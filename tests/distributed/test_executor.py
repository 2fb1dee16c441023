"""Workers in processes of their own: messages arrive whole and in order, and whatever ends, all end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import msgspec
import pytest
import zmq

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.executor import channels
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.executor.channels import (
    ConnectionInfo,
    ConnectionTorn,
    EngineChannel,
    MessageTooLarge,
    RankUnreachable,
    WorkerChannel,
)
from megatron.early_exit.inference.executor.distributed import DistributedExecutor, start_workers
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.executor.messages import (
    FromWorker,
    Goodbye,
    Hello,
    Ping,
    Pong,
    RunStep,
    StepDone,
    ToWorker,
    WorkerFactory,
)
from megatron.early_exit.inference.executor.worker_ranks import Limits, _environment_of
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.inference.protocol import (
    Admit,
    CopyPrefix,
    DrawnToken,
    ExitThreshold,
    Free,
    Gather,
    HeadScores,
    Prediction,
    Rows,
    RowsOutput,
    Step,
)
from megatron.early_exit.inference.results import RequestResult
from tests.distributed import fake_workers
from tests.distributed.fake_workers import CRASH, EXIT, FLOOD, HANG, KILL, RAISE, SUSPEND
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
SOON = 30.0
"""Seconds. What ends in a fraction of one takes ten or more where many programs share few cores."""
QUICK = Limits(link=10, ping=0.2, look=0.1, hang=2 * SOON, end=2 * SOON)
"""Looks often. What only a limit ends does not end soon."""
IMPATIENT = replace(QUICK, hang=2)
"""For ranks that hang."""
TWO_RANKS = Layout(tensor_parallel_size=2)
FACTORY = "tests.distributed.fake_workers:make_fake"

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at /proc")


@contextmanager
def workers(size: int | Layout = 2, limits: Limits = QUICK, **arguments: object) -> Iterator[DistributedExecutor]:
    """An executor over fake workers; afterwards nothing is left of it."""
    layout = size if isinstance(size, Layout) else Layout(size)
    executor = start_workers(WorkerFactory(FACTORY, arguments), layout, limits)
    pids = pids_of(executor)
    try:
        yield executor
    finally:
        executor.close()
        assert not any(map(is_alive, pids))
        assert not executor._ranks._folder.exists()


def pids_of(executor: DistributedExecutor) -> list[int]:
    return [process.pid for process in executor._ranks.processes.values()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int], seconds: float = SOON) -> list[int]:
    """Those that are still there."""
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if is_alive(pid)]


def step(number: int, token: int = 5, slot: int = 0, seed: int | None = None) -> Step:
    admit = Admit(1, slot, 1, 1, (), SamplingSettings(seed=seed or 0))
    rows = Rows(number, slot, 1, 0, "decode", 3, (token,), sample_from=3)
    return Step(number, () if seed is None else (admit,), (rows,))


def answer(executor: DistributedExecutor, one: Step) -> list[RowsOutput]:
    executor.submit(one)
    return executor.poll(SOON)


# Messages.


SAMPLING = SamplingSettings(
    temperature=0.7, top_k=40, top_p=0.9, top_p_decay=0.99, top_p_bound=0.5, min_p=0.1, repetition_penalty=1.2,
    frequency_penalty=0.3, presence_penalty=-0.3, logit_bias={7: 1.5, 3: -100}, seed=2**63 - 1,
)  # fmt: skip


def test_messages_come_out_as_they_went_in() -> None:
    admit = Admit(2**40, 3, 7, 5, (1, 2), SAMPLING, (0, 1), 32, 20, False, 6, (0, 9))
    rows = Rows(
        2**40, 3, 7, 2, "score", 11, (1, 2), (ExitThreshold(0, 0.5),), 12, (0, -1), 11, (4, 5), 3, score_logits=True
    )
    one = RunStep(Step(9, (Free(1, 7), admit, CopyPrefix(1, 2, 30), Gather((2, 2), 8)), (rows,)))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=ToWorker) == one
    token = DrawnToken(4, -0.1, 0.9, 1, (Prediction(1, 4, 0.9, True),), ((4, -0.1), (5, float("-inf"))), True)
    scores = HeadScores(-1, [1], [0.5], [-1.0], [[(1, -1.0)]], b"\x00\xff")
    done = StepDone(9, [RowsOutput(2**40, 3, 7, 2, 13, (token,), (scores,), 4, 2, 11, 0, "an error")])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(done), type=FromWorker) == done


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineChannel]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # paths of sockets are short
        channel = EngineChannel(f"ipc://{folder}/engine", 2)
        yield channel
        channel.close()


def receive(channel: EngineChannel, seconds: float = SOON) -> tuple[int, FromWorker] | None:
    deadline = time.monotonic() + seconds
    while (received := channel.receive()) is None and time.monotonic() < deadline:
        channel.wait(0.05)
    return received


def stranger(engine: EngineChannel) -> zmq.Socket:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(engine.info.endpoint)
    return socket


def test_messages_without_the_token_are_dropped(engine: EngineChannel) -> None:
    hello = msgspec.msgpack.encode(Hello(0, "1"))
    with stranger(engine) as socket:
        for frames in ([bytes(32), hello], [b"", hello], [hello], [engine.info.token[:-1], hello]):
            socket.send_multipart(frames)
        socket.send_multipart([engine.info.token, hello, b"more"])
        assert receive(engine, 0.5) is None
        assert engine.num_dropped == 5 and not engine.known_ranks
        # A token alone makes nobody a rank; who says hello first is one.
        socket.send_multipart([engine.info.token, msgspec.msgpack.encode(Pong())])
        assert receive(engine, 0.5) is None
        socket.send_multipart([engine.info.token, hello])
        assert receive(engine) == (0, Hello(0, "1"))
    with stranger(engine) as second:
        second.send_multipart([engine.info.token, hello])
        assert receive(engine, 0.5) is None


def test_a_worker_drops_what_has_not_the_token() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        channel = WorkerChannel(ConnectionInfo(f"tcp://127.0.0.1:{port}", b"t" * 32), on_lost=lambda: None)
        channel.send(Hello(0, "1"))
        routing_id, token, _ = router.recv_multipart()
        assert token == b"t" * 32
        for good_token, message in ((b"x" * 32, RunStep(Step(1))), (token, Ping())):
            router.send_multipart([routing_id, good_token, msgspec.msgpack.encode(message)])
        assert channel.receive() == Ping()
        channel.close(Goodbye())


def test_oversized_messages_are_refused(engine: EngineChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(channels, "LARGEST_MESSAGE", 1000)
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            small = EngineChannel(f"ipc://{folder}/engine", 1)
            with pytest.raises(MessageTooLarge, match="more than the 1000"):
                small.send(RunStep(Step(1, (), (Rows(1, 0, 1, 0, "prefill", 0, (1,) * 1000),))), [0])
            worker = WorkerChannel(small.info, lost.set)
            worker.send(Hello(0, "1"))
            assert receive(small) == (0, Hello(0, "1"))
            patch.undo()  # a sender that knows no limit
            worker.send(Hello(0, "x" * 2000))
            assert receive(small, 0.5) is None
            assert lost.wait(5)
            with pytest.raises(RankUnreachable):
                small.send(Ping(), [0])
            small.close()
            worker.close(Goodbye(), linger_seconds=0)


def test_after_an_interrupted_message_nothing_more_is_sent(engine: EngineChannel) -> None:
    with pytest.raises(KeyboardInterrupt), engine._whole():
        raise KeyboardInterrupt
    with pytest.raises(ConnectionTorn):
        engine.receive()
    with pytest.raises(ConnectionTorn):
        engine.send(Ping(), [])


def test_a_rank_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert _environment_of(1, 2)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("WORLD_SIZE", "64")
    environment = _environment_of(1, 2)
    wanted = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "5"}
    assert wanted.items() <= environment.items()


# Steps.


def test_steps_keep_their_order_under_load() -> None:
    count = 3000
    with workers() as executor:
        for number in range(count):
            executor.submit(step(number, token=number % 800, seed=number))
        outputs = []
        while len(outputs) < count:
            new = executor.poll(SOON)
            assert new
            outputs += new
        assert [one.request_id for one in outputs] == list(range(count))
        assert [one.tokens[0].token for one in outputs] == [number % 800 + 1 for number in range(count)]
        # The worker counts steps, and knows the settings of the last admission.
        assert [one.layer_passes for one in outputs] == list(range(1, count + 1))
        assert [one.layer_runs for one in outputs] == list(range(count))
        assert executor.can_submit


def test_polling_waits_for_a_pending_step_alone() -> None:
    with workers(1, replace(QUICK, end=1)) as executor:
        started = time.monotonic()
        assert executor.poll() == []
        executor.submit(Step(1))  # no rows, no outputs
        assert not executor.can_submit
        assert executor.poll(2 * SOON) == []
        assert executor.can_submit
        assert executor.measure_costs() == fake_workers.COSTS
        assert executor.description == fake_workers.DESCRIPTION
        executor.submit(step(2, HANG))
        assert executor.poll(0.3) == []
        assert time.monotonic() - started < SOON


def test_two_executors_beside_each_other_and_collectives() -> None:
    with workers(uses_collectives=True) as one, workers(uses_collectives=True) as other:
        for number in range(5):
            one.submit(step(number))
            other.submit(step(number, token=7))
            assert one.poll(SOON)[0].layer_passes == 2 * (number + 1)  # summed over two ranks
            assert other.poll(SOON)[0].tokens[0].token == 8


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_agree_on_the_smallest(size: int) -> None:
    with workers(size, agrees=True) as executor:
        described = executor.description  # each gives 10 + its rank, then 64 - its rank
        assert (described.num_slots, described.num_positions) == (10, 65 - size)


def test_a_rank_that_fails_ends_the_wait_for_the_smallest() -> None:
    with pytest.raises(ValueError, match="^rank 1 is unwell$"), workers(3, agrees=True, fails="value", failing_rank=1):
        pass


def test_an_output_that_is_too_large_is_an_error_of_its_request() -> None:
    with workers(1) as executor:
        (output,) = answer(executor, step(1, FLOOD))
        assert output.request_id == 1 and "bytes" in output.error and output.tokens == ()
        assert answer(executor, step(2))[0].tokens[0].token == 6


def test_an_idle_engine_outlives_the_time_limits() -> None:
    with workers(uses_collectives=True, limits=IMPATIENT) as executor:
        answer(executor, step(1))
        time.sleep(2 * IMPATIENT.hang)
        assert answer(executor, step(2))[0].tokens[0].token == 6


def test_the_thread_that_starts_workers_may_end() -> None:
    started: list[DistributedExecutor] = []
    thread = threading.Thread(target=lambda: started.append(start_workers(WorkerFactory(FACTORY), Layout(), QUICK)))
    thread.start()
    thread.join()
    time.sleep(0.3)
    try:
        assert answer(started[0], step(1))[0].tokens[0].token == 6
    finally:
        started[0].close()


def test_an_engine_goes_on_after_an_interrupted_step() -> None:
    """The outputs of a step whose requests have ended are taken in, by whoever comes next."""
    with workers() as executor:
        engine = Engine(executor, ExitConfig(exit_layer_nums=(2,)))
        engine.add([5], GenerationParams(max_tokens=3))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(executor, "poll", mock.Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        assert [event.result.error for event in engine.fail_all("interrupted")] == ["interrupted"]
        engine.add([7], GenerationParams(max_tokens=3))
        (result,) = results_of(engine)
        assert result.token_ids == [8, 9, 10]


def results_of(engine: Engine) -> list[RequestResult]:
    deadline, results = time.monotonic() + SOON, []
    while engine.has_work:
        assert time.monotonic() < deadline
        results += [event.result for event in engine.step() if event.result is not None]
    return results


# What goes wrong.


@needs_proc
def test_all_requests_end_with_an_error_when_a_rank_is_killed() -> None:
    with workers() as executor:
        engine = Engine(executor, ExitConfig(exit_layer_nums=(2,)))
        for prompt in ([5], [KILL], [6], [7], [8], [9]):  # the second runs in slot 1; two wait for a slot
            engine.add(prompt, GenerationParams(max_tokens=20))
        started = time.monotonic()
        results = results_of(engine)
        assert time.monotonic() - started < SOON
        assert len(results) == 6
        assert {one.error for one in results} == {"worker rank 1 was ended by SIGKILL (was there too little memory?)"}
        with pytest.raises(ExecutorError, match="worker rank 1 was ended"):
            engine.add([5], GenerationParams())


MISDEEDS = {
    RAISE: "failed: RuntimeError: the fake worker broke",
    EXIT: "has ended with status 7",
    HANG: "made no progress for 2 seconds; if a step takes that long here, raise worker_timeout or lower prefill_chunk",
    CRASH: "was ended by SIGSEGV",
    KILL: r"was ended by SIGKILL \(was there too little memory\?\)",
    SUSPEND: "made no progress for 2 seconds; .*",
}


def limits_of(misdeed: int) -> Limits:
    return IMPATIENT if misdeed in (HANG, SUSPEND) else QUICK


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_step_that_a_rank_does_not_survive(misdeed: int, rank: int) -> None:
    with workers(limits=limits_of(misdeed)) as executor:
        answer(executor, step(1))
        pids, started = pids_of(executor), time.monotonic()
        with pytest.raises(ExecutorError, match=f"^worker rank {rank} {MISDEEDS[misdeed]}$") as caught:
            for number in range(2, 10**6):  # rank 0 may go on for a while
                answer(executor, step(number, misdeed if number == 2 else 5, slot=rank))
        assert time.monotonic() - started < SOON
        assert not any(map(is_alive, pids))
        for again in (lambda: executor.submit(step(9)), executor.poll, executor.measure_costs):
            with pytest.raises(ExecutorError) as second:
                again()
            assert second.value is caught.value


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_although_another_complains(rank: int) -> None:
    with workers(uses_collectives=True) as executor:
        answer(executor, step(1))
        with pytest.raises(ExecutorError, match=f"^worker rank {rank} was ended by SIGKILL"):
            answer(executor, step(2, KILL, slot=rank))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("fails", "error", "text"), [
    ("value", ValueError, "rank {} is unwell"),
    ("file", OSError, "rank {} is unwell"),
    ("runtime", ExecutorError, "worker rank {} failed: RuntimeError: rank {} is unwell while the model was loaded"),
    ("killed", ExecutorError, "worker rank {} was ended by SIGKILL .* while the model was loaded"),
])  # fmt: skip
def test_workers_that_cannot_be_made(fails: str, error: type, text: str, size: int) -> None:
    rank = size - 1
    with pytest.raises(error, match=f"^{text.format(rank, rank)}$"), workers(size, fails=fails, failing_rank=rank):
        pass
    assert not [child for child in children_of(os.getpid()) if "worker_process" in child]


def test_a_worker_that_is_not_there_is_named() -> None:
    with pytest.raises(ExecutorError, match="ModuleNotFoundError: No module named 'nothing'"):
        start_workers(WorkerFactory("nothing:at_all"), Layout(), QUICK)


def test_ranks_that_read_different_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="^the checkpoint changed between ranks"), workers(ranks_differ=True):
        pass


def test_closing_twice_and_using_what_is_closed() -> None:
    with workers(1) as executor:
        executor.close()
        executor.close()
        with pytest.raises(ExecutorError, match="closed"):
            executor.submit(step(1))


def children_of(parent: int) -> list[str]:
    """Command lines of a process's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, ppid = (path / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if int(ppid) == parent and state != "Z":
                found.append((path / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


# The engine's process ends.

ENGINE = """
import sys, time
from megatron.early_exit.inference.executor.distributed import start_workers
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.executor.messages import WorkerFactory
from tests.distributed.test_executor import FACTORY, HANG, QUICK, pids_of, step
from tests.distributed.fake_workers import FREEZE
layout, arguments = {layout}
executor = start_workers(WorkerFactory(FACTORY, arguments), layout)
print(*pids_of(executor), flush=True)
"""


def start_engine(code: str, folder: Path, layout: str = "Layout(2), {}") -> tuple[subprocess.Popen, list[int]]:
    """A process with an engine's executor, in a group of its own, and its workers."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    program = ENGINE.replace("{layout}", layout) + code
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    return process, [int(pid) for pid in process.stdout.readline().split()]


@needs_proc
@pytest.mark.parametrize(("code", "number", "status"), [
    ("time.sleep(60)", signal.SIGKILL, -9),
    ("executor.submit(step(1, HANG)); executor.poll()", signal.SIGKILL, -9),
    ("executor.submit(step(1, FREEZE)); executor.poll()", signal.SIGKILL, -9),
    ("executor.submit(step(1, HANG)); executor.poll()", signal.SIGINT, -2),
    ("executor.submit(step(1)); print(executor.poll()[0].tokens[0].token)", None, 0),
    ("executor.submit(step(1, HANG)); sys.exit(3)", None, 3),
])  # fmt: skip
def test_workers_end_with_the_engine(code: str, number: int | None, status: int, tmp_path: Path) -> None:
    process, pids = start_engine(code, tmp_path)
    assert (len(pids) == 2 and all(map(is_alive, pids))) or number is None
    if number is not None:
        time.sleep(0.5)
        os.killpg(process.pid, number)  # as a terminal sends Ctrl-C: to the whole group
    output, errors = process.stdout.read(), process.stderr.read()
    assert process.wait(timeout=SOON) == status, errors
    assert wait_until_gone(pids) == []
    assert list(tmp_path.iterdir()) == []  # however it ended
    assert "worker_process" not in errors, errors  # no traceback of a worker
    if status == 0:
        assert (output, errors) == ("6\n", "")


def test_a_fork_is_refused_and_harms_nobody() -> None:
    with workers() as executor:
        child = os.fork()
        if child == 0:
            try:
                executor.submit(step(1))
            except ExecutorError as error:
                os._exit(7 if "this one is a fork" in str(error) else 8)
            finally:
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert answer(executor, step(2))[0].error is None


# Under torchrun.


def start_torchrun(code: str, with_agent: bool = True, layout: Layout = TWO_RANKS) -> list[subprocess.Popen]:
    """torchrun over the ranks of a layout, or the ranks without it."""
    sizes = [str(layout.pipeline_parallel_size), str(layout.tensor_parallel_size)]
    program, count = ["-m", "tests.distributed.torchrun_engine", code, *sizes], layout.num_ranks
    port = str(free_port())
    each = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    start = lambda words, environment: subprocess.Popen(
        [sys.executable, *words], env=os.environ | environment, cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if with_agent:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-addr", "127.0.0.1"]
        return [start([*launcher, "--master-port", port, *program], {"PYTHONPATH": str(ROOT)})]
    return [start(program, each | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


def pids_in(output: str) -> list[int]:
    return [int(number) for line in output.splitlines() if " is " in line for number in line.split(" is ")[1].split()]


def read_until(process: subprocess.Popen, start: str) -> str:
    """The output up to a line that starts so."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(start):
            return "".join(lines)
    raise AssertionError(f"no {start}: {''.join(lines)} {process.stderr.read()}")


@needs_proc
def test_torchrun_has_the_engine_in_rank_0() -> None:
    (process,) = start_torchrun("print([answer(executor, step(n))[0].layer_passes for n in range(4)])")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("[2, 4, 6, 8]") == 1
    assert len(pids_in(output)) == 3 and wait_until_gone(pids_in(output)) == []


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_a_torchrun_job(rank: int) -> None:
    (process,) = start_torchrun(f"answer(executor, step(1)); answer(executor, step(2, {KILL}, slot={rank}))")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert len(pids_in(output)) == 3 and wait_until_gone(pids_in(output)) == []


@needs_proc
@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_without_torchrun_notice_each_others_end(victim: int) -> None:
    """torchrun would end the others, maybe before they notice; on another machine it is late."""
    ranks = start_torchrun("import time\nwhile True: answer(executor, step(1)); time.sleep(0.01)", with_agent=False)
    pids = pids_in(read_until(ranks[0], "worker is")) + [ranks[1].pid]
    time.sleep(0.5)
    assert all(map(is_alive, pids))
    ranks[victim].kill()
    assert wait_until_gone(pids) == []
    outputs = [rank.communicate(timeout=SOON) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [-9 if rank == victim else 1 for rank in (0, 1)]
    assert victim == 0 or "error: worker rank 1 has closed its connection" in outputs[0][0], outputs
