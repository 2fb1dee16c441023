"""The processes of worker ranks: how they are started, told to end, and killed."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from megatron.early_exit.inference.executor import worker_process
from megatron.early_exit.inference.executor.channels import EngineChannel, RankUnreachable, tcp_address
from megatron.early_exit.inference.executor.messages import Failed, Goodbye, Shutdown
from megatron.early_exit.platform.processes import LastingThread

KILLED = "was ended by"
"""How the words for the end of a process begin that a signal has ended."""

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


class WorkerRanks:
    """The processes of the ranks, as far as they are ours, and the connections to all ranks."""

    def __init__(self, channel: EngineChannel, num_ranks: int, limits: Limits, folder: Path | None = None) -> None:
        """folder: to be removed at the end."""
        self.channel, self.num_ranks, self._limits, self._folder = channel, num_ranks, limits, folder
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
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
            info = msgspec.msgpack.encode(ranks.channel.info)
            store.set(worker_process.TORCHRUN_KEY, info)  # type: ignore[arg-type]  # torch's stub knows text alone
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
        assert process.stdin is not None, "it is a pipe"
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


def _ending(status: int) -> str:
    """What became of a process. status: as of `Popen.returncode`"""
    if status >= 0:
        return f"has ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
    advice = " (was there too little memory?)" if -status == signal.SIGKILL else ""
    return f"{KILLED} {name}{advice}"


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
