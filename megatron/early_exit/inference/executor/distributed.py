"""Workers in processes of their own, one a rank; this process, which has the engine, drives them over ZMQ.

The engine holds no weights and takes part in no collective, so that it outlives a worker that is killed, and may be
idle for as long as it likes. Under torchrun the engine is in the process of rank 0, and the worker of rank 0 is a child
of that process, for the same reason.
"""

from __future__ import annotations

import os
import socket
import time
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from typing import NoReturn

import msgspec

from megatron.early_exit import __version__
from megatron.early_exit.inference.costs import StepCosts, merged_costs
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.executor.channels import ConnectionTorn, RankUnreachable
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.executor.messages import (
    Agreed,
    CostsMeasured,
    Failed,
    FromWorker,
    Hello,
    InboxOpened,
    LinksOpened,
    Load,
    MeasureCosts,
    OpenInbox,
    OpenLinks,
    Ping,
    Pong,
    Proposal,
    Ready,
    RowsAnswered,
    RunStep,
    StepDone,
    StoreOpened,
    ToWorker,
    WorkerFactory,
)
from megatron.early_exit.inference.executor.worker_ranks import DEFAULT_LIMITS, KILLED, Limits, WorkerRanks
from megatron.early_exit.inference.protocol import RowsOutput, StageLoad, Step, WorkerDescription
from megatron.early_exit.platform.processes import die_with_torchrun
from megatron.early_exit.platform.world import world_size

_SECONDS_FOR_OTHERS = 0.5


def start_workers(factory: WorkerFactory, layout: Layout, limits: Limits = DEFAULT_LIMITS) -> DistributedExecutor:
    """Start a process for each rank on this machine, which end with this one, and load their workers.

    Each computes with its share of the cores unless OMP_NUM_THREADS is set. Raises ValueError or OSError if a worker
    says that the user can mend it, ExecutorError if one fails otherwise."""
    ranks = WorkerRanks.on_this_machine(layout.num_ranks, limits)
    return DistributedExecutor(ranks, factory, layout, limits)


def join_torchrun(factory: WorkerFactory, layout: Layout, limits: Limits = DEFAULT_LIMITS) -> DistributedExecutor:
    """Load workers on all ranks of the torchrun job whose rank 0 this process is; the others call
    `serve_torchrun_rank`. A job has one executor.

    Raises as `start_workers`, ValueError if the job has another number of ranks than the layout, and OSError if
    MASTER_ADDR is no address of this machine."""
    die_with_torchrun()
    if layout.num_ranks != world_size():
        raise ValueError(
            f"tensor_parallel_size {layout.tensor_parallel_size} and pipeline_parallel_size "
            f"{layout.pipeline_parallel_size} need {layout.num_ranks} processes, but torchrun "
            f"has started {world_size()}"
        )
    ranks = WorkerRanks.of_torchrun(_ip_of(os.environ["MASTER_ADDR"]), limits)
    return DistributedExecutor(ranks, factory, layout, limits)


class DistributedExecutor:
    """`Executor` over worker processes. For one thread."""

    description: WorkerDescription

    def __init__(self, ranks: WorkerRanks, factory: WorkerFactory, layout: Layout, limits: Limits) -> None:
        """Raises as `start_workers`."""
        self._ranks, self._channel, self._layout, self._limits = ranks, ranks.channel, layout, limits
        # Also when the interpreter ends, or nobody has the executor any more.
        self._finalizer = weakref.finalize(self, ranks.close)
        self._error: Exception | None = None
        self._pending: deque[int] = deque()
        self._outputs: list[RowsOutput] = []
        self._costs: dict[int, StepCosts] = {}
        """By rank."""
        self._loads: dict[int, StageLoad] = {}
        """By rank."""
        self._ready: dict[int, Ready] = {}
        self._inboxes: dict[int, str] = {}
        """Addresses by rank."""
        self._linked: set[int] = set()
        self._proposals: dict[int, int] = {}
        self._failures: dict[int, Failed] = {}
        self._lost: dict[int, str] = {}
        """Ranks whose process or connection has ended, and how."""
        self._silent_seconds = dict.fromkeys(range(ranks.num_ranks), 0.0)
        """Since the last answer to a ping."""
        self._last_look = self._last_ping = time.monotonic()
        with ranks.closed_on_error():
            self._load(factory)
        self.description = _merged([self._ready[rank].description for rank in layout.leaders])

    def _load(self, factory: WorkerFactory) -> None:
        started, everyone = time.monotonic(), range(self._ranks.num_ranks)
        while missing := sorted(set(everyone) - set(self._channel.known_ranks)):
            if time.monotonic() - started > self._limits.hello:
                raise ExecutorError(f"{_name(missing)} did not start within {self._limits.hello:g} seconds")
            self._wait(self._limits.look)
        if self._is_pipeline:
            self._open_links()
        self._ranks.forget_address()
        self._send(Load(factory, self._layout))
        while not self._is_loaded:
            self._wait(self._limits.look)
        if len({ready.fingerprint for ready in self._ready.values()}) > 1:
            raise ValueError(
                "the checkpoint changed between ranks: they have read different files. Load it again when nobody "
                "writes to it, and on several machines see that all have the same files."
            )
        for stage in range(self._layout.pipeline_parallel_size):
            if (
                len({msgspec.msgpack.encode(self._ready[rank].description) for rank in self._layout.ranks_of(stage)})
                > 1
            ):
                raise ExecutorError("the worker ranks have loaded different models")
        self._silent_seconds = dict.fromkeys(everyone, 0.0)

    def _open_links(self) -> None:
        """Have the ranks connect to each other, before anything is read."""
        self._send(OpenInbox())
        while len(self._inboxes) < self._ranks.num_ranks:
            self._wait(self._limits.look)
        addresses = [self._inboxes[rank] for rank in range(self._ranks.num_ranks)]
        self._send(OpenLinks(self._layout, addresses, self._limits.link))
        while len(self._linked) < self._ranks.num_ranks:
            self._wait(self._limits.look)

    @property
    def _is_pipeline(self) -> bool:
        return self._layout.pipeline_parallel_size > 1

    @property
    def _is_loaded(self) -> bool:
        return len(self._ready) == self._ranks.num_ranks

    # The executor's interface.

    @property
    def can_submit(self) -> bool:
        """One step at a time, since what comes next depends on its tokens; over a pipeline the engine bounds what is in
        flight."""
        return self._is_pipeline or not self._pending

    def submit(self, step: Step) -> None:
        """Have all ranks of the first stage run a step. Raises ExecutorError."""
        self._look_if_due()
        self._send(RunStep(step), self._layout.ranks_of(0))
        if not self._is_pipeline:
            self._pending.append(step.number)

    def poll(self, timeout: float | None = None) -> list[RowsOutput]:
        """Outputs that have come; waits for them while a step is pending, over a pipeline in any case, for at most
        `timeout` seconds. Raises ExecutorError."""
        deadline, waited = None if timeout is None else time.monotonic() + timeout, 0.0
        self._look_if_due()
        self._receive()
        while (self._is_pipeline or self._pending) and not self._outputs:
            remaining = self._limits.look if deadline is None else deadline - time.monotonic()
            if remaining <= 0:
                break
            started = time.monotonic()
            self._wait(min(remaining, self._limits.look))
            # As in `_look_if_due`; each stage may take `hang` seconds for what it runs.
            waited += min(time.monotonic() - started, 2 * self._limits.look)
            if self._is_pipeline and waited > self._limits.hang * self._layout.pipeline_parallel_size:
                self._fail(f"no answer came for {waited:.0f} seconds, though all ranks are alive: rows were lost")
        outputs, self._outputs = self._outputs, []
        return outputs

    def measure_costs(self) -> StepCosts:
        """Time layers and heads; no request may be running. Raises ExecutorError."""
        self._costs = {}
        # A leader hands it on to the others of its stage, in the order of its passes.
        self._send(MeasureCosts(), self._layout.leaders if self._is_pipeline else None)
        while len(self._costs) < self._layout.pipeline_parallel_size:
            self._wait(self._limits.look)
        costs = [self._costs[rank] for rank in self._layout.leaders]
        return merged_costs(costs, self.description.layers_per_stage) if self._is_pipeline else costs[0]

    def stage_loads(self) -> tuple[StageLoad, ...]:
        """What each stage has done, as of its last answer to a ping. Raises ExecutorError."""
        self._look_if_due()
        self._receive()
        return tuple(self._loads.get(rank, StageLoad()) for rank in self._layout.leaders)

    def close(self) -> None:
        """End the workers."""
        self._error = self._error or ExecutorError("the executor is closed")
        self._finalizer()

    # Messages.

    def _send(self, message: ToWorker, ranks: Collection[int] | None = None) -> None:
        """ranks: default all."""
        self._check()
        try:
            self._channel.send(message, range(self._ranks.num_ranks) if ranks is None else ranks)
        except RankUnreachable as error:
            self._lost[error.rank] = "has closed its connection"
            self._fail_for_what_came_first()
        except ConnectionTorn as error:
            self._fail(f"{error}; load the model again")

    def _wait(self, seconds: float) -> None:
        """Take in what comes within `seconds`; returns when something has."""
        self._check()
        self._channel.wait(seconds)
        self._receive()
        self._look_if_due()

    def _receive(self) -> None:
        """Take in all messages that have come."""
        self._check()
        try:
            while (received := self._channel.receive()) is not None:
                self._take(*received)
        except ConnectionTorn as error:
            self._fail(f"{error}; load the model again")
        except msgspec.DecodeError as error:
            self._fail(f"a message of a worker cannot be read ({error})")
        if self._failures:
            self._fail_for_what_came_first()

    def _check(self) -> None:
        if not self._ranks.is_owner:
            raise ExecutorError(
                "the worker processes belong to the process that started them, and this one is a fork of it; load the "
                "model in the process that uses it"
            )
        if self._error is not None:
            raise self._error

    def _take(self, rank: int, message: FromWorker) -> None:
        match message:
            case StepDone():
                if self._pending and self._pending[0] == message.number:
                    self._pending.popleft()  # else of a step whose `submit` was interrupted
                self._outputs += message.outputs
            case Pong():
                self._silent_seconds[rank] = 0.0
                self._loads[rank] = message.load
            case CostsMeasured():
                self._costs[rank] = message.costs
            case RowsAnswered():
                self._outputs += message.outputs
            case InboxOpened():
                self._inboxes[rank] = message.address
            case LinksOpened():
                self._linked.add(rank)
            case Failed():
                self._failures.setdefault(rank, message)
            case Ready():
                self._ready[rank] = message
            case StoreOpened():
                stage = self._layout.ranks_of(self._layout.stage_of(rank))
                self._send(message, [other for other in stage if other != rank])
            case Proposal():
                self._proposals[rank] = message.value
                if len(self._proposals) == self._ranks.num_ranks:
                    self._send(Agreed(min(self._proposals.values())))
                    self._proposals.clear()
            case Hello() if message.version != __version__:
                raise ValueError(
                    f"worker rank {rank} runs version {message.version} of this package and the engine "
                    f"{__version__}; install one version on all machines"
                )

    # Is everybody alive?

    def _look_if_due(self) -> None:
        now = time.monotonic()
        if now - self._last_look < self._limits.look:
            return
        # What has come counts first. While this process was suspended, or did something else, nobody was silent.
        elapsed, self._last_look = min(now - self._last_look, 2 * self._limits.look), now
        self._receive()
        self._lost |= self._ranks.ended()
        if self._lost:
            self._fail_for_what_came_first()
        if self._is_loaded:  # loading may take any time
            for rank in self._silent_seconds:
                self._silent_seconds[rank] += elapsed
            silent = [rank for rank, seconds in self._silent_seconds.items() if seconds > self._limits.hang]
            if silent:
                self._fail(
                    f"{_name(silent)} made no progress for {self._limits.hang:g} seconds; if a step takes that long "
                    "here, raise worker_timeout or lower prefill_chunk"
                )
        if now - self._last_ping >= self._limits.ping:
            self._last_ping = now
            self._send(Ping(), self._channel.known_ranks)

    def _fail_for_what_came_first(self) -> NoReturn:
        """Raise for the rank that ended by itself: the others, which complain of its end, may be heard before it."""
        until = time.monotonic() + _SECONDS_FOR_OTHERS
        while (error := self._clear_cause()) is None and time.monotonic() < until:
            self._channel.wait(0.05)
            while (received := self._channel.receive()) is not None:
                rank, message = received
                if isinstance(message, Failed):
                    self._failures.setdefault(rank, message)
            self._lost |= self._unreachable() | self._ranks.ended()  # how a process ended says more
        self._fail(error or self._likely_cause())

    def _clear_cause(self) -> Exception | str | None:
        if not self._is_loaded:
            for failure in self._failures.values():
                if failure.kind != "other":
                    return (ValueError if failure.kind == "ValueError" else OSError)(failure.error)
        killed = [rank for rank, how in self._lost.items() if how.startswith(KILLED)]
        return f"{_name(killed)} {self._lost[killed[0]]}" if killed else None

    def _likely_cause(self) -> str:
        silent = [rank for rank in self._lost if rank not in self._failures]
        if silent:
            return f"{_name(silent)} {self._lost[silent[0]]}"
        rank, failure = next(iter(self._failures.items()))
        return f"{_name([rank])} failed: {failure.error}"

    def _unreachable(self) -> dict[int, str]:
        found = {}
        for rank in self._channel.known_ranks:
            try:
                self._channel.send(Ping(), [rank])
            except RankUnreachable:
                found[rank] = "has closed its connection"
        return found

    def _fail(self, error: Exception | str) -> NoReturn:
        """Kill the workers and raise `error` (a text: as ExecutorError), now and whenever something is wanted."""
        if isinstance(error, str):
            advice = "" if self._is_loaded else " while the model was loaded"
            error = ExecutorError(error + advice)
        self._error = error
        self._ranks.close(gracefully=False)
        raise error


def _merged(leaders: Sequence[WorkerDescription]) -> WorkerDescription:
    """What the leaders of all stages say together. Raises ExecutorError if they do not have the same model."""
    token_bytes = max(one.bytes_per_token for one in leaders)
    has_approximate_heads = any(one.has_approximate_heads for one in leaders)
    merged = {
        msgspec.structs.replace(one, bytes_per_token=token_bytes, has_approximate_heads=has_approximate_heads)
        for one in leaders
    }
    if len(merged) > 1:
        raise ExecutorError("the worker ranks have loaded different models")
    return merged.pop()


def _name(ranks: Sequence[int]) -> str:
    return f"worker rank {ranks[0]}" if len(ranks) == 1 else f"worker ranks {', '.join(map(str, ranks))}"


def _ip_of(host: str) -> str:
    """Raises OSError if the name is not known."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
