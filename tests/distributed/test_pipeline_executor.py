"""Pipeline stages in processes of their own: inputs go from rank to rank, answers to the engine, and whatever ends,
all end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts, merged_costs
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.executor import hidden_states
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.executor.channels import ConnectionInfo, MessageTooLarge
from megatron.early_exit.inference.executor.distributed import DistributedExecutor, join_torchrun, start_workers
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.executor.local import LocalExecutor
from megatron.early_exit.inference.executor.messages import (
    CostsMeasured,
    GiveCredit,
    InboxOpened,
    LinkOpened,
    MeasureCosts,
    NextInput,
    PeerMessage,
    Ping,
    Pong,
    RunPass,
    RunStep,
    Shutdown,
    WorkerFactory,
)
from megatron.early_exit.inference.executor.peer_channel import PeerChannel
from megatron.early_exit.inference.executor.stage_loop import StageLoop
from megatron.early_exit.inference.executor.worker_ranks import Limits
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.inference.protocol import (
    Admit,
    ExitThreshold,
    Free,
    Pass,
    Prediction,
    Rows,
    RowsOutput,
    StageInput,
    StageRows,
    Step,
)
from megatron.early_exit.inference.worker.placement import AlonePlacement
from tests.configs import VOCAB_SIZE
from tests.distributed import reference_workers, test_executor
from tests.distributed.engines import Request, check_against_reference, run_all
from tests.distributed.fake_workers import EXIT, FLOOD, HANG, KILL, RAISE, SUSPEND, FakeStage
from tests.distributed.test_executor import (
    IMPATIENT,
    QUICK,
    ROOT,
    SOON,
    is_alive,
    needs_proc,
    pids_in,
    pids_of,
    read_until,
    wait_until_gone,
)

TOKEN = b"t" * 32


@contextmanager
def stages(
    num_stages: int, size: int = 1, limits: Limits = QUICK, **arguments: object
) -> Iterator[DistributedExecutor]:
    """An executor over fake stages."""
    layout = Layout(size, num_stages)
    arguments = {"uses_collectives": size > 1, "num_stages": num_stages, **arguments}
    with test_executor.workers(layout, limits, **arguments) as executor:
        yield executor


def step(number: int, token: int = 5, slot: int = 0, exits: bool = False) -> Step:
    admit = Admit(1, slot, 1, 1, (), SamplingSettings(seed=number))
    thresholds = (ExitThreshold(0, 0.5),) if exits else ()
    return Step(number, (admit,), (Rows(number, slot, 1, 0, "decode", 3, (token,), thresholds, sample_from=3),))


def poll(executor: DistributedExecutor, count: int) -> list[RowsOutput]:
    outputs, deadline = [], time.monotonic() + SOON
    while len(outputs) < count:
        assert time.monotonic() < deadline, outputs
        outputs += executor.poll(1)
    return outputs


def tokens_of(outputs: list[RowsOutput]) -> list[int]:
    return [one.tokens[0].token for one in outputs]


# Layouts.


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_layout(num_stages: int, size: int) -> None:
    layout = Layout(size, num_stages)
    place = [(stage, rank) for stage in range(num_stages) for rank in range(size)]
    assert [(layout.stage_of(one), layout.tensor_parallel_rank_of(one)) for one in range(layout.num_ranks)] == place
    links = set()
    for one, (stage, rank) in enumerate(place):
        for other, (to_stage, to_rank) in enumerate(place):
            is_next = to_stage == stage + 1 and to_rank == rank
            tells_what_to_do = to_stage == stage and rank == 0 and to_rank > 0
            gives_credit = to_stage == stage - 1 and rank == to_rank == 0
            if is_next or tells_what_to_do or gives_credit:
                links.add((one, other))
    assert {(one, other) for one in range(layout.num_ranks) for other in layout.targets(one)} == links
    assert {(other, one) for one in range(layout.num_ranks) for other in layout.sources(one)} == links
    assert [layout.ranks_of(stage)[0] for stage in range(num_stages)] == list(layout.leaders)


def test_impossible_layouts() -> None:
    with pytest.raises(ValueError, match="pipeline_parallel_size is 0; it must be at least 1"):
        Layout(1, 0)


def test_costs_of_stages_together() -> None:
    zeros, n = (0.0,) * len(ROW_COUNTS), len(ROW_COUNTS)
    one = StepCosts((1.0,) * n, zeros, zeros, zeros, 0.1)
    two = StepCosts((4.0,) * n, (2.0,) * n, (3.0,) * n, zeros, 0.3, 0.01, 0.4, 0.8, has_approximate_heads=True)
    three = StepCosts(
        (2.0,) * n, (7.0,) * n, (8.0,) * n, (5.0,) * n, 0.2, 0.02, call_seconds=0.4,
        exit_saved_seconds=(1.0,) * n, final_saved_seconds=(4.0,) * n,
    )  # fmt: skip
    merged = merged_costs([one, two, three], (1, 2, 1))
    assert merged == StepCosts(
        (11 / 4,) * n, (2.0,) * n, (3.0,) * n, (5.0,) * n, 0.3, 0.02, 0.2, 0.5,
        has_approximate_heads=True, exit_saved_seconds=(1.0,) * n, final_saved_seconds=(4.0,) * n,
    )  # fmt: skip
    without_exits = merged_costs([one, one], (1, 1))
    assert without_exits == one


# Messages between ranks.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_arrive_bit_for_bit(dtype: torch.dtype) -> None:
    hidden = torch.randn(5, 7).to(dtype)
    for one in (hidden, hidden.t().contiguous().t(), hidden[1:3], torch.full((1, 3), float("nan"), dtype=dtype)):
        described, data = hidden_states.to_bytes(one)
        described = msgspec.msgpack.decode(msgspec.msgpack.encode(described), type=hidden_states.HiddenStates)
        arrived = hidden_states.from_bytes(described, bytes(data))
        assert arrived.dtype == dtype and torch.equal(arrived.view(torch.uint8), one.contiguous().view(torch.uint8))
    with pytest.raises(ValueError, match="2 rows of hidden states came with 5 bytes; they have"):
        hidden_states.from_bytes(hidden_states.to_bytes(hidden[1:3])[0], b"12345")


def test_messages_between_ranks_come_out_as_they_went_in() -> None:
    rows = Rows(2**40, 3, 7, 2, "speculate", 11, (1, 2), (ExitThreshold(0, 0.5),), 12)
    fill = StageRows(rows, 9, (8, 9, 1, 2), 0, (Prediction(1, 4, 0.9, True),), 12, 3)
    for one in (
        NextInput(StageInput((Free(1, 8),), (fill,)), hidden_states.HiddenStates(4, 8, "bfloat16")),
        NextInput(StageInput()), RunPass(Pass(3, (0, 2), 64)), GiveCredit(5), LinkOpened(2),
    ):  # fmt: skip
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=PeerMessage) == one


@contextmanager
def linked(kind: str) -> Iterator[tuple[PeerChannel, PeerChannel]]:
    """Rank 0, which has a link to rank 1, and rank 1."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, ExitStack() as stack:
        endpoint = f"ipc://{folder}/engine" if kind == "ipc" else "tcp://127.0.0.1:9"
        pair = [PeerChannel(ConnectionInfo(endpoint, TOKEN), rank) for rank in (0, 1)]
        for channel in pair:
            stack.callback(channel.close)
        pair[0].connect([channel.address for channel in pair], [1])
        assert receive(pair[1]) == (LinkOpened(0), None)
        yield tuple(pair)


def receive(channel: PeerChannel, seconds: float = SOON) -> tuple[PeerMessage, memoryview | None] | None:
    poller, deadline = zmq.Poller(), time.monotonic() + seconds
    channel.register(poller)
    while (received := channel.receive()) is None and time.monotonic() < deadline:
        poller.poll(50)
    return received


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_links_keep_the_order_and_never_wait(kind: str) -> None:
    with linked(kind) as (source, target):
        hidden = torch.arange(300_000, dtype=torch.float32).view(100, 3000)
        for number in range(3000):  # three times what a socket would queue by default
            source.send(GiveCredit(number), [1])
        described, data = hidden_states.to_bytes(hidden)
        source.send(NextInput(StageInput(), described), [1], data)
        assert [receive(target)[0].rows for _ in range(3000)] == list(range(3000))
        message, arrived = receive(target)
        assert torch.equal(hidden_states.from_bytes(message.hidden, arrived), hidden)


def test_an_inbox_drops_what_has_not_the_token() -> None:
    with linked("tcp") as (source, target), zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
        stranger.linger = 0
        stranger.connect(target.address)
        message = msgspec.msgpack.encode(GiveCredit(1000))
        for frames in ([b"x" * 32, message], [message], [TOKEN, message, b"", b""], [TOKEN[:-1], message, b""]):
            stranger.send_multipart(frames)
        assert receive(target, 0.5) is None and target.num_dropped == 4
        source.send(GiveCredit(7), [1])
        assert receive(target) == (GiveCredit(7), None)


def test_oversized_hidden_states_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.early_exit.inference.executor.peer_channel.LARGEST_MESSAGE", 1000)
    with linked("tcp") as (source, target):
        with pytest.raises(MessageTooLarge, match="hidden states of 1001 bytes"):
            source.send(NextInput(StageInput()), [1], bytes(1001))
        source.send(NextInput(StageInput()), [1], bytes(1000))
        assert len(receive(target)[1]) == 1000


def test_a_broken_link_is_an_error_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may have been told to end first. Sending does not wait for ever meanwhile."""
    monkeypatch.setattr("megatron.early_exit.inference.executor.peer_channel._SECONDS_UNTIL_FAILURE", 0.5)
    with linked("tcp") as (source, target):
        assert source.seconds_until_failure() is None
        target.close()
        deadline = time.monotonic() + SOON
        while source.seconds_until_failure() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        source.check_links()
        source.send(GiveCredit(1), [1])
        time.sleep(0.6)
        with pytest.raises(ConnectionError, match=f"worker rank 1 at {target.address} is broken"):
            source.check_links()


# The loop of a rank.


class Wire:
    """Stands for a channel of a rank: everything has come already; keeps what is sent."""

    def __init__(self, *came: object, rank: int = 0) -> None:
        self.rank, self._came, self.sent = rank, list(came), []

    def receive(self) -> object | None:
        return self._came.pop(0) if self._came else None

    receive_if_any = receive

    def send(self, message: object, ranks: Collection[int] | None = None, hidden: object = None) -> None:
        if ranks is None or ranks:
            self.sent.append((message, ranks and list(ranks)))

    def register(self, poller: zmq.Poller) -> None:
        pass

    def check_links(self) -> None:
        pass


class RecordingStage(FakeStage):
    """Keeps what it was told to do."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 0, 2, lambda value: value, None)
        self.done: list[object] = []

    def run(self, chosen: Pass, answer: Callable[[list[RowsOutput]], None]) -> object:
        self.done.append((chosen.rows, self.num_inputs))
        return super().run(chosen, answer)

    def measure_costs(self) -> StepCosts:
        self.done.append("measure")
        return super().measure_costs()


def test_a_rank_that_follows_does_what_its_leader_says() -> None:
    """Although more inputs, and words of the engine, have come already."""
    stage = RecordingStage(rank=1)
    engine = Wire(RunStep(step(1, exits=True)), RunStep(step(2)), MeasureCosts(), Shutdown(), Ping())
    orders = [RunPass(Pass(1, (0,), 64)), MeasureCosts(), RunPass(Pass(2, (1,), 64)), Shutdown()]
    peers = Wire(*((order, None) for order in orders), rank=1)
    StageLoop(stage, engine, peers, Layout(2, 2)).run()
    assert stage.done == [((0,), 1), "measure", ((1,), 2)]
    assert engine.sent == [(Pong(), None)]  # its leader answers
    assert [(type(message), ranks) for message, ranks in peers.sent] == [(NextInput, [3])] * 2


def test_a_leader_hands_the_words_of_the_engine_on() -> None:
    stage, layout = RecordingStage(rank=0), Layout(3, 2)
    engine, peers = Wire(RunStep(step(1)), MeasureCosts()), Wire((GiveCredit(4), None))
    loop = StageLoop(stage, engine, peers, layout)
    loop._take_in()
    while loop._lead():
        pass
    assert peers.sent[0] == (MeasureCosts(), [1, 2]) and peers.sent[1] == (RunPass(Pass(1, (0,), 64)), [1, 2])
    assert [(type(message), ranks) for message, ranks in peers.sent[2:]] == [(NextInput, [3])]
    assert stage.credit == 4
    engine._came.append(Shutdown())
    loop.run()
    assert peers.sent[-1] == (Shutdown(), [1, 2])
    assert [type(message) for message, _ in engine.sent] == [CostsMeasured]


# Steps.


@pytest.mark.parametrize(("num_stages", "size", "dtype"), [
    (2, 1, None), (4, 1, None), (2, 1, "bfloat16"), (2, 2, "float32"),
])  # fmt: skip
def test_steps_are_in_flight_together_and_keep_their_order(num_stages: int, size: int, dtype: str | None) -> None:
    count = 300
    with stages(num_stages, size, dtype=dtype) as executor:
        for number in range(count):
            assert executor.can_submit
            executor.submit(step(number, token=number % 100))
        outputs = poll(executor, count)
        assert [one.request_id for one in outputs] == list(range(count))
        assert tokens_of(outputs) == [number % 100 + 2 * num_stages for number in range(count)]
        assert {one.layer_passes for one in outputs} == {2 * num_stages}
        assert executor.poll(0.05) == []


def test_the_stage_that_exits_answers_itself() -> None:
    with stages(3) as executor:
        executor.submit(step(1, exits=True))
        early, late = poll(executor, 2)
        assert (early.answers, tokens_of([early]), early.layer_passes, early.complete_to) == (1, [6], 2, 0)
        assert (late.answers, late.tokens, late.layer_passes, late.complete_to) == (0, (), 6, 4)
        deadline = time.monotonic() + SOON
        while early.layer_runs == 0:  # until the next stage's credit for the rows that it has taken has come
            assert time.monotonic() < deadline
            executor.submit(step(2, exits=True))
            early = poll(executor, 2)[0]


def test_what_stages_say_of_themselves_together() -> None:
    with stages(2, 2, agrees=True) as executor:
        description = executor.description
        assert (description.num_slots, description.num_layers, description.num_stages) == (10, 4, 2)
        assert (description.bytes_per_token, description.has_approximate_heads) == (11, True)
        for number in range(50):
            executor.submit(step(number))
        costs = executor.measure_costs()  # each rank in its turn: passes and measurements are collectives
        assert costs == StepCosts((1.5,) * 6, (2.0,) * 6, (3.0,) * 6, (4.0,) * 6, 0.2)
        assert len(poll(executor, 50)) == 50


def test_an_output_that_is_too_large_is_an_error_of_its_request() -> None:
    with stages(2) as executor:
        executor.submit(step(1, FLOOD))
        (output,) = poll(executor, 1)
        assert output.request_id == 1 and "bytes" in output.error and output.tokens == () and output.answers == 1
        executor.submit(step(2))
        assert tokens_of(poll(executor, 1)) == [9]


def test_an_idle_engine_outlives_the_time_limits() -> None:
    with stages(2, 2, limits=IMPATIENT, uses_collectives=False) as executor:
        executor.submit(step(1))
        poll(executor, 1)
        time.sleep(2 * IMPATIENT.hang)
        executor.submit(step(2))
        assert tokens_of(poll(executor, 1)) == [9]


def test_rows_that_are_lost_are_noticed() -> None:
    with stages(2, limits=IMPATIENT) as executor:
        assert executor.poll(timeout=0.2) == []
        started = time.monotonic()
        with pytest.raises(ExecutorError, match="no answer came for 4 seconds, though all ranks are alive"):
            executor.poll()  # nothing was submitted, so nothing will come
        assert 4 <= time.monotonic() - started < SOON


def test_two_executors_beside_each_other() -> None:
    with stages(2) as one, stages(2) as other:
        one.submit(step(1))
        other.submit(step(1, token=7))
        assert tokens_of(poll(one, 1) + poll(other, 1)) == [9, 11]


# Stages of a model.


@pytest.fixture(scope="module")
def real() -> Iterator[DistributedExecutor]:
    """Two stages of one and three layers, of two ranks each, over the reference's parameters."""
    factory = reference_workers.factory("block", "llama", layers_per_stage=(1, 3))
    executor = start_workers(factory, Layout(2, 2), Limits(ping=0.2, look=0.1))
    yield executor
    executor.close()


def requests() -> list[Request]:
    sampling = SamplingSettings(temperature=1.0, top_p=0.9, seed=5)
    modes = [{}, {"mode": "early_exit", "exit_thresholds": (0.0138, 1.0, 0.0147)}, {"mode": "self_speculative"}]
    return [
        ([7, 3, 9, 1, 4][:length], GenerationParams(max_tokens=12, sampling=one, **mode))
        for mode in modes for one in (SamplingSettings(), sampling) for length in (1, 5)
    ]  # fmt: skip


def test_stages_of_a_model_answer_what_one_process_answers(real: DistributedExecutor) -> None:
    cfg = reference_workers.config_of("block", "llama")
    local = LocalExecutor(reference_workers.make_worker(AlonePlacement(), "block", "llama")[0])
    answers = []
    for executor in (local, real):
        engine = Engine(executor, cfg.exits, prefill_chunk=3)
        for prompt, params in requests():
            engine.prepare(params)
            engine.add(prompt, params)
        results = run_all(engine)
        answers.append([results[one] for one in sorted(results)])
    for (prompt, params), mine, theirs in zip(requests(), *answers, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert [(t.exit_layer, t.is_final) for t in mine.tokens] == [(t.exit_layer, t.is_final) for t in theirs.tokens]
        check_against_reference(cfg, prompt, params, theirs, VOCAB_SIZE)
    assert {t.exit_layer for result in answers[1] for t in result.tokens} == {1, 3, 4}


@needs_proc
def test_all_requests_end_with_an_error_when_a_rank_of_a_stage_is_killed(real: DistributedExecutor) -> None:
    """The last test of these workers."""
    engine = Engine(real, reference_workers.config_of("block", "llama").exits)
    for prompt, params in requests():
        engine.add(prompt, replace(params, max_tokens=30))
    for _ in range(8):
        engine.step()
    pids, started = pids_of(real), time.monotonic()
    os.kill(pids[2], signal.SIGKILL)
    results = run_all(engine)
    assert time.monotonic() - started < SOON
    assert {one.error for one in results.values()} == {
        "worker rank 2 was ended by SIGKILL (was there too little memory?)"
    }
    assert len(results) >= len(requests()) - 2
    assert not any(map(is_alive, pids))


# What goes wrong.

KILLED = [*((stages, 1, rank) for stages in (2, 4) for rank in range(stages)), (2, 2, 1), (2, 2, 2)]
"""(stages, ranks of each, the rank that is killed). With collectives, for which ranks import torch: a follower, and a
leader that is not the first."""


@needs_proc
@pytest.mark.parametrize(("num_stages", "size", "rank"), KILLED)
def test_a_rank_that_is_killed_in_the_midst_of_a_request(num_stages: int, size: int, rank: int) -> None:
    with stages(num_stages, size) as executor:
        executor.submit(step(1))
        poll(executor, 1)
        pids, started = pids_of(executor), time.monotonic()
        with pytest.raises(ExecutorError, match=f"^worker rank {rank} was ended by SIGKILL"):
            for number in range(2, 10**6):
                executor.submit(step(number, KILL if number == 2 else 5, slot=rank))
                executor.poll(0.05)
        assert time.monotonic() - started < SOON
        assert not any(map(is_alive, pids))


@needs_proc
@pytest.mark.parametrize(("num_stages", "size", "rank"), [(2, 1, 0), (2, 1, 1), (4, 1, 2), (2, 2, 3)])
def test_a_rank_that_is_killed_while_all_are_idle(num_stages: int, size: int, rank: int) -> None:
    with stages(num_stages, size) as executor:
        executor.submit(step(1))
        poll(executor, 1)
        pids, started = pids_of(executor), time.monotonic()
        os.kill(pids[rank], signal.SIGKILL)
        with pytest.raises(ExecutorError, match=f"^worker rank {rank} was ended by SIGKILL"):
            while True:
                executor.poll(0.5)
        assert time.monotonic() - started < SOON
        assert not any(map(is_alive, pids))


@needs_proc
@pytest.mark.parametrize("misdeed", [RAISE, EXIT, HANG, SUSPEND])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_pass_that_a_stage_does_not_survive(misdeed: int, rank: int) -> None:
    with stages(2, limits=test_executor.limits_of(misdeed)) as executor:
        pids, started = pids_of(executor), time.monotonic()
        executor.submit(step(1, misdeed, slot=rank))
        with pytest.raises(ExecutorError, match=f"^worker rank {rank} {test_executor.MISDEEDS[misdeed]}$"):
            executor.poll()
        assert time.monotonic() - started < SOON
        assert not any(map(is_alive, pids))


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(("fails", "error", "text"), [
    ("value", ValueError, "rank {} is unwell"),
    ("killed", ExecutorError, "worker rank {} was ended by SIGKILL .* while the model was loaded"),
])  # fmt: skip
def test_a_stage_that_cannot_be_made(fails: str, error: type, text: str, rank: int) -> None:
    with pytest.raises(error, match=f"^{text.format(rank)}$"), stages(3, fails=fails, failing_rank=rank, agrees=True):
        pass


def test_stages_that_read_different_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="^the checkpoint changed between ranks"), stages(2, ranks_differ=True):
        pass


def test_a_rank_that_cannot_be_reached_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inbox is somewhere else than it says."""
    take = DistributedExecutor._take
    lost = socket.create_server(("127.0.0.1", 0))  # accepts, and never says a word

    def take_wrong_address(self: DistributedExecutor, rank: int, message: object) -> None:
        if isinstance(message, InboxOpened) and rank == 1:
            message = InboxOpened(f"tcp://127.0.0.1:{lost.getsockname()[1]}")
        take(self, rank, message)

    monkeypatch.setattr(DistributedExecutor, "_take", take_wrong_address)
    limits, started = replace(QUICK, link=3), time.monotonic()
    with (
        lost,
        pytest.raises(OSError, match=r"^worker rank 0 could not reach worker rank 1 at \S+/engine_1 within 3 sec"),
        stages(2, limits=limits),
    ):
        pass
    assert time.monotonic() - started < SOON


@needs_proc
@pytest.mark.parametrize(("code", "number", "status"), [
    ("time.sleep(60)", signal.SIGKILL, -9),
    ("executor.submit(step(1, HANG)); executor.poll()", signal.SIGKILL, -9),
    ("executor.submit(step(1, HANG)); executor.poll()", signal.SIGINT, -2),
    ("executor.submit(step(1)); print(executor.poll()[0].tokens[0].token)", None, 0),
])  # fmt: skip
def test_stages_end_with_the_engine(code: str, number: int | None, status: int, tmp_path: Path) -> None:
    process, pids = test_executor.start_engine(code, tmp_path, 'Layout(1, 2), {"num_stages": 2}')
    assert len(pids) == 2
    if number is not None:
        time.sleep(0.5)
        os.killpg(process.pid, number)
    output, errors = process.stdout.read(), process.stderr.read()
    assert process.wait(timeout=SOON) == status, errors
    assert wait_until_gone(pids) == [] and list(tmp_path.iterdir()) == []
    assert "worker_process" not in errors, errors
    if status == 0:
        assert (output, errors) == ("9\n", "")


# Under torchrun.

GO_ON = "import time\nwhile True: executor.submit(step(1)); executor.poll(); time.sleep(0.01)"


@needs_proc
def test_torchrun_over_stages_and_ranks() -> None:
    code = "print([answer(executor, step(n))[0].tokens[0].token for n in range(4)])"
    (process,) = test_executor.start_torchrun(code, layout=Layout(2, 2))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("[9, 9, 9, 9]") == 1
    assert len(pids_in(output)) == 5 and wait_until_gone(pids_in(output)) == []


@needs_proc
@pytest.mark.parametrize("victim", [0, 2])
def test_stages_of_several_machines_notice_each_others_end(victim: int) -> None:
    """Without torchrun, which would end the others by itself. The worker of rank 0 is a child of rank 0."""
    ranks = test_executor.start_torchrun(GO_ON, with_agent=False, layout=Layout(1, 3))
    workers = [*pids_in(read_until(ranks[0], "worker is"))[-1:], ranks[1].pid, ranks[2].pid]
    time.sleep(0.5)
    assert all(map(is_alive, workers))
    started = time.monotonic()
    os.kill(workers[victim], signal.SIGKILL)
    assert wait_until_gone([*workers, ranks[0].pid]) == []
    assert time.monotonic() - started < SOON
    outputs = [rank.communicate(timeout=SOON)[0] for rank in ranks]
    how = "was ended by SIGKILL" if victim == 0 else "has closed its connection"
    assert f"error: worker rank {victim} {how}" in outputs[0], outputs
    assert [rank.returncode for rank in ranks] == [-9 if 0 < rank == victim else 1 for rank in range(3)]


def test_a_torchrun_job_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="need 4 processes, but torchrun has started 3"):
        join_torchrun(WorkerFactory(test_executor.FACTORY), Layout(2, 2), QUICK)


# Several machines: network namespaces, each with a cable to the first, which hands on nothing between them.


@contextmanager
def machines(count: int) -> Iterator[list[str]]:
    """Names of network namespaces; the first has the address 10.123.N.1 on the cable to number N, which has
    10.123.N.2."""
    names = [f"early_exit_{os.getpid()}_{number}" for number in range(count)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            for number, name in enumerate(names[1:], start=1):
                here, there = f"ee{os.getpid() % 10**6}a{number}", f"ee{os.getpid() % 10**6}b{number}"
                ip("link", "add", here, "netns", names[0], "type", "veth", "peer", "name", there, "netns", name)
                for namespace, cable, last in ((names[0], here, 1), (name, there, 2)):
                    ip("-n", namespace, "addr", "add", f"10.123.{number}.{last}/24", "dev", cable)
                    ip("-n", namespace, "link", "set", cable, "up")
                ip("-n", name, "route", "add", "default", "via", f"10.123.{number}.1")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here ({getattr(error, 'stderr', '') or error})")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start_on(machine: str, words: list[str], environment: dict[str, str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        ["ip", "netns", "exec", machine, sys.executable, *words], env=environment, cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start_ranks(names: list[str], code: str) -> list[subprocess.Popen]:
    """A rank on each machine, a stage each, without torchrun."""
    words = ["-m", "tests.distributed.torchrun_engine", code, str(len(names)), "1"]
    each = {"MASTER_ADDR": "10.123.1.1", "MASTER_PORT": "29400", "WORLD_SIZE": str(len(names)), "LOCAL_RANK": "0"}
    return [start_on(name, words, each | {"RANK": str(rank)}) for rank, name in enumerate(names)]


def test_torchrun_on_two_machines() -> None:
    code = "print([answer(executor, step(n))[0].tokens[0].token for n in range(4)])"
    program = ["-m", "tests.distributed.torchrun_engine", code, "2", "1"]
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "10.123.1.1"]
    with machines(2) as names:
        nodes = [
            start_on(name, [*launcher, "--master-port", "29400", "--node-rank", str(rank), *program], {})
            for rank, name in enumerate(names)
        ]
        outputs = [node.communicate(timeout=120) for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], outputs
        assert outputs[0][0].count("[9, 9, 9, 9]") == 1, outputs


def test_a_machine_that_another_cannot_reach_is_one_error() -> None:
    """The first machine reaches both others, which do not reach each other."""
    with machines(3) as names:
        ranks = start_ranks(names, "")
        outputs = [rank.communicate(timeout=120) for rank in ranks]
        errors = re.findall(r"worker rank (\d) could not reach worker rank (\d) at tcp://10.123.(\d).2:", outputs[0][0])
        assert errors in ([("1", "2", "2")], [("2", "1", "1")]), outputs
        assert [rank.returncode for rank in ranks] == [1, 1, 1], outputs


def test_a_machine_that_is_cut_off_is_lost() -> None:
    with machines(2) as names:
        ranks = start_ranks(names, GO_ON)
        read_until(ranks[0], "worker is")
        time.sleep(1)
        started = time.monotonic()
        subprocess.run(["ip", "-n", names[1], "link", "set", f"ee{os.getpid() % 10**6}b1", "down"], check=True)
        outputs = [rank.communicate(timeout=SOON) for rank in ranks]
        assert time.monotonic() - started < SOON  # a heartbeat each second, four without an answer
        assert "error: worker rank 1 has closed its connection" in outputs[0][0], outputs
        assert [rank.returncode for rank in ranks] == [1, 1]
