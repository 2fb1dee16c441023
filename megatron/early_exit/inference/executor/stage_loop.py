"""The loop of one rank of a pipeline: it takes in all that has come, has its stage run one pass, and so on.

The first rank of a stage, its leader, chooses what runs next, tells the others of the stage, and answers the engine;
the others do what it says, in that order, also about the end. Pings are answered between passes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import zmq

from megatron.early_exit.inference.executor import hidden_states
from megatron.early_exit.inference.executor.channels import MessageTooLarge, WorkerChannel
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.executor.messages import (
    CostsMeasured,
    GiveCredit,
    MeasureCosts,
    NextInput,
    PeerMessage,
    Ping,
    Pong,
    RowsAnswered,
    RunPass,
    RunStep,
    Shutdown,
    ToWorker,
)
from megatron.early_exit.inference.executor.peer_channel import PeerChannel
from megatron.early_exit.inference.executor.stage_meter import StageMeter
from megatron.early_exit.inference.protocol import Pass, RowsOutput, StageInput, Step

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.early_exit.inference.worker.stage import Stage

Order = RunPass | MeasureCosts | Shutdown
"""What the leader of a stage tells the others to do."""


class StageLoop:
    """Runs the stage of one rank until the engine says that it is over."""

    def __init__(self, stage: Stage, engine: WorkerChannel, peers: PeerChannel, layout: Layout) -> None:
        self._stage, self._engine, self._peers = stage, engine, peers
        self._leads, self._followers = layout.is_leader(peers.rank), layout.followers(peers.rank)
        self._next, self._before = layout.following(peers.rank), layout.leader_before(peers.rank)
        self._orders: deque[Order] = deque()
        """Of the engine to a leader, of a leader to the others."""
        self._inputs: deque[tuple[StageInput | Step, Tensor | None]] = deque()
        """That have come; a rank that follows takes in as many as a pass says."""
        self._is_over = False
        self._meter = StageMeter()
        self._poller = zmq.Poller()
        engine.register(self._poller)
        peers.register(self._poller)

    def run(self) -> None:
        """Raises what the stage raises, and ConnectionError if another rank is gone and the engine knows nothing."""
        while not self._is_over:
            self._take_in()
            has_run = self._lead() if self._leads else self._follow()
            if not has_run and not self._is_over:
                self._wait()

    def _wait(self) -> None:
        seconds = self._peers.seconds_until_failure()
        self._poller.poll(None if seconds is None else int(1000 * seconds) + 1)

    def _take_in(self) -> None:
        """All that has come."""
        while (message := self._engine.receive_if_any()) is not None:
            self._take_from_engine(message)
        while (received := self._peers.receive()) is not None:
            self._take_from_peer(*received)
        self._peers.check_links()

    def _take_from_engine(self, message: ToWorker) -> None:
        match message:
            case Ping():
                self._engine.send(Pong(self._meter.load(self._stage.num_waiting_rows)))
            case RunStep():
                self._inputs.append((message.step, None))
            case MeasureCosts() | Shutdown() if self._leads:
                self._orders.append(message)

    def _take_from_peer(self, message: PeerMessage, data: memoryview | None) -> None:
        match message:
            case NextInput():
                hidden = None if message.hidden is None else hidden_states.from_bytes(message.hidden, data)
                self._inputs.append((message.input, hidden))
            case RunPass() | MeasureCosts() | Shutdown():
                self._orders.append(message)
            case GiveCredit():
                self._stage.add_credit(message.rows)

    def _lead(self) -> bool:
        """Do what is next; whether there was something to do."""
        self._receive_until(None)
        if self._orders:
            order = self._orders.popleft()
        elif (chosen := self._stage.choose()) is not None:
            order = RunPass(chosen)
        else:
            return False
        self._peers.send(order, self._followers)
        self._obey(order)
        return True

    def _follow(self) -> bool:
        """Do what the leader has said, once its inputs are here; whether there was something to do."""
        if not self._orders:
            return False
        order = self._orders[0]
        if isinstance(order, RunPass):
            self._receive_until(order.chosen.num_inputs)
            if self._stage.num_inputs < order.chosen.num_inputs:
                return False
        self._obey(self._orders.popleft())
        return True

    def _receive_until(self, num_inputs: int | None) -> None:
        """Hand inputs to the stage until it has had so many in all (None: all), or no more are here."""
        while self._inputs and (num_inputs is None or self._stage.num_inputs < num_inputs):
            self._stage.receive(*self._inputs.popleft())

    def _obey(self, order: Order) -> None:
        match order:
            case RunPass():
                self._run_pass(order.chosen)
            case MeasureCosts():
                costs = self._stage.measure_costs()
                if self._leads:
                    self._engine.send(CostsMeasured(costs))
            case Shutdown():
                self._is_over = True

    def _run_pass(self, chosen: Pass) -> None:
        started = time.perf_counter()
        done = self._stage.run(chosen, self._answer)
        described, data = (None, None) if done.hidden is None else hidden_states.to_bytes(done.hidden)
        self._meter.add(started, done.num_rows)
        if done.following is not None:
            self._peers.send(NextInput(done.following, described), self._next, data)
        if done.credit:
            self._peers.send(GiveCredit(done.credit), self._before)

    def _answer(self, outputs: list[RowsOutput]) -> None:
        if self._leads:
            send_outputs(outputs, lambda those: self._engine.send(RowsAnswered(those)))


def send_outputs(outputs: list[RowsOutput], send: Callable[[list[RowsOutput]], object]) -> None:
    """Send outputs; where they are too large, send errors in their place."""
    try:
        send(outputs)
    except MessageTooLarge as error:
        send([_without_content(output, str(error)) for output in outputs])


def _without_content(one: RowsOutput, error: str) -> RowsOutput:
    return RowsOutput(one.request_id, one.slot, one.generation, one.epoch, one.stop, answers=one.answers, error=error)
