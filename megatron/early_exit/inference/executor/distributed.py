"""Workers in processes of their own, one a rank; this process, which has the engine, drives them over ZMQ.

The engine holds no weights and takes part in no collective, so that it outlives a worker that is killed, and may be
idle for as long as it likes. Under torchrun the engine is in the process of rank 0, and the worker of rank 0 is a child
of that process, for the same reason.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from megatron.early_exit import __version__
from megatron.early_exit.inference.costs import StepCosts, merged_costs
from megatron.early_exit.inference.executor import worker_process
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.executor.channels import ConnectionTorn, EngineChannel, RankUnreachable, tcp_address
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.executor.messages import (
    Agreed,
    CostsMeasured,
    Failed,
    FromWorker,
    Goodbye,
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
    Shutdown,
    StepDone,
    StoreOpened,
    ToWorker,
    WorkerFactory,
)
from megatron.early_exit.inference.protocol import RowsOutput, StageLoad, Step, WorkerDescription
from megatron.early_exit.platform.processes import LastingThread, die_with_torchrun
from megatron.early_exit.platform.world import world_size

log = logging.getLogger(__name__)

_SECONDS_FOR_OTHERS = 0.5
_KILLED = "was ended by"

_LONGEST_SOCKET_PATH = 100
"""Characters; the system allows 107."""


@dataclass(frozen=True)
class Limits:
    """How long workers may take, in seconds."""

    hello: float = 300.0
    """Until every rank has said hello: torchrun may start them one after another. Loading may take any time."""
    link: float = 30.0
    """Until the ranks of a pipeline have connected to each other."""
    hang: float = 60.0
    """Without progress while there is something to do. A worker that takes longer counts as dead."""
    ping: float = 1.0
    """Between the questions whether a rank makes progress."""
    look: float = 0.25
    """Between looks at the processes."""
    end: float = 5.0
    """To end when told to; then they are killed."""

    def __post_init__(self) -> None:
        if not self.hang > 0:
            raise ValueError(f"worker_timeout is {self.hang}; it must be a positive number of seconds")


DEFAULT_LIMITS = Limits()


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


class WorkerRanks:
    """The processes of the ranks, as far as they are ours, and the connections to all ranks."""

    def __init__(self, channel: EngineChannel, num_ranks: int, limits: Limits, folder: Path | None = None) -> None:
        """folder: to be removed at the end."""
        self.channel, self.num_ranks, self._limits, self._folder = channel, num_ranks, limits, folder
        self.processes: dict[int, subprocess.Popen] = {}
        self.store: object = None
        """Where the others find the engine: it may live in this process."""
        self._starter = LastingThread()
        self._owner = os.getpid()
        self._is_open = True

    @classmethod
    def on_this_machine(cls, num_ranks: int, limits: Limits) -> WorkerRanks:
        """All of them processes that this one starts."""
        folder = _private_folder()
        try:
            ranks = cls(EngineChannel(f"ipc://{folder}/engine", num_ranks), num_ranks, limits, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with ranks.closed_on_error():
            for rank in range(num_ranks):
                ranks._start(rank, _environment_of(rank, num_ranks))
        return ranks

    @classmethod
    def of_torchrun(cls, host: str, limits: Limits) -> WorkerRanks:
        """Those of a torchrun job; the process of rank 0's worker is one that this process starts."""
        store, rank, num_ranks = worker_process.torchrun_store()
        if rank != 0:
            raise ValueError(f"this is rank {rank} of a torchrun job; the engine is in rank 0")
        ranks = cls(EngineChannel(tcp_address(host), num_ranks), num_ranks, limits)
        with ranks.closed_on_error():
            ranks.store = store
            ranks._start(0, dict(os.environ))
            store.set(worker_process.TORCHRUN_KEY, msgspec.msgpack.encode(ranks.channel.info))
        return ranks

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Leave nothing behind if what is done fails or is interrupted."""
        try:
            yield
        except BaseException:
            self.close(gracefully=False)
            raise

    def _start(self, rank: int, environment: dict[str, str]) -> None:
        settings = worker_process.ProcessSettings(
            self.channel.info, rank, os.getpid(), logging.getLogger().isEnabledFor(logging.INFO)
        )
        # What this process can import, the worker can.
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        process = self._starter.call(
            lambda: subprocess.Popen(
                [sys.executable, "-P", "-m", worker_process.__name__],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=2,  # standard output is the program's
                process_group=0,  # Ctrl-C is for this process alone
            )
        )
        self.processes[rank] = process
        with suppress(OSError), process.stdin:  # `ended` tells of one that has ended already
            process.stdin.write(msgspec.msgpack.encode(settings))

    def ended(self) -> dict[int, str]:
        """What became of the processes that have ended, by rank."""
        return {
            rank: _ending(process.returncode) for rank, process in self.processes.items() if process.poll() is not None
        }

    @property
    def is_owner(self) -> bool:
        """Whether this is the process that started them, not a fork of it."""
        return os.getpid() == self._owner

    def forget_address(self) -> None:
        """Let nobody else connect. Nothing is left on the disk then, however this process ends."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self, gracefully: bool = True) -> None:
        """End the processes. May be called twice."""
        if not self._is_open or not self.is_owner:  # a fork of the engine's process that ends
            return
        self._is_open = False
        try:
            if gracefully and not self.channel.is_torn:
                self._say_goodbye()
        finally:
            for process in self.processes.values():
                process.kill()
            for process in self.processes.values():
                process.wait()
            self._starter.close()
            self.channel.close()
            self.forget_address()

    def _say_goodbye(self) -> None:
        """Tell all ranks to end, and wait for them."""
        remote = set(self.channel.known_ranks) - set(self.processes)
        for rank in list(self.channel.known_ranks):
            try:
                self.channel.send(Shutdown(), [rank])
            except RankUnreachable:
                remote.discard(rank)
        deadline = time.monotonic() + self._limits.end
        while (remote or len(self.ended()) < len(self.processes)) and time.monotonic() < deadline:
            self.channel.wait(0.02)
            while (received := self.channel.receive()) is not None:
                if isinstance(received[1], Goodbye | Failed):
                    remote.discard(received[0])


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
                if isinstance(received[1], Failed):
                    self._failures.setdefault(*received)
            self._lost |= self._unreachable() | self._ranks.ended()  # how a process ended says more
        self._fail(error or self._likely_cause())

    def _clear_cause(self) -> Exception | str | None:
        if not self._is_loaded:
            for failure in self._failures.values():
                if failure.kind != "other":
                    return (ValueError if failure.kind == "ValueError" else OSError)(failure.error)
        killed = [rank for rank, how in self._lost.items() if how.startswith(_KILLED)]
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


def _ending(status: int) -> str:
    """What became of a process. status: as of `Popen.returncode`"""
    if status >= 0:
        return f"has ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
    advice = " (was there too little memory?)" if -status == signal.SIGKILL else ""
    return f"{_KILLED} {name}{advice}"


def _environment_of(rank: int, num_ranks: int) -> dict[str, str]:
    """The environment of a rank that shares this machine with all others of its job."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    environment |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)
    }  # fmt: skip
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else can reach it, whatever becomes of the network
    return environment


def _private_folder() -> Path:
    """A new folder that other users cannot enter, with a path that is short enough for sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="early_exit_"))
    if len(f"{folder}/engine") > _LONGEST_SOCKET_PATH:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="early_exit_", dir="/tmp"))
    return folder


def _ip_of(host: str) -> str:
    """Raises OSError if the name is not known."""
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
