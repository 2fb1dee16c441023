"""The process of one worker rank: it makes its worker and runs the steps that the engine sends, in their order.

It runs by itself (`python -m`, its settings on standard input) for an engine that starts its own ranks, or in a process
of torchrun (`serve_torchrun_rank`). It ends with the engine: status 0 if it was told to, else 1.
"""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

import msgspec
import zmq

from megatron.early_exit import __version__
from megatron.early_exit.inference.executor.channels import ConnectionInfo, WorkerChannel, own_host
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.executor.messages import (
    Agreed,
    CostsMeasured,
    ErrorKind,
    Failed,
    Goodbye,
    Hello,
    InboxOpened,
    LinkOpened,
    LinksOpened,
    Load,
    MeasureCosts,
    OpenInbox,
    OpenLinks,
    Ping,
    Pong,
    Proposal,
    Ready,
    RunStep,
    Shutdown,
    StepDone,
    StoreOpened,
    ToWorker,
)
from megatron.early_exit.inference.executor.peer_channel import PeerChannel, PeerUnreachable
from megatron.early_exit.inference.executor.stage_loop import StageLoop, send_outputs
from megatron.early_exit.inference.executor.stage_meter import StageMeter
from megatron.early_exit.inference.protocol import RowsOutput
from megatron.early_exit.platform.command_line import configure_output
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.platform.processes import die_with_parent, die_with_torchrun

if TYPE_CHECKING:
    import torch

    from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel
    from megatron.early_exit.inference.worker.worker import Worker

log = logging.getLogger(__name__)

T = TypeVar("T")

TORCHRUN_KEY = "early_exit_engine"
"""Under which rank 0 of a torchrun job tells the others where its engine is."""

# The engine notices ranks that hang long before, and ends them; this must not end a rank that loads slowly.
_COLLECTIVE_TIMEOUT = timedelta(hours=1)


class ProcessSettings(msgspec.Struct, frozen=True):
    """What an engine tells a process that it starts."""

    connection: ConnectionInfo
    rank: int
    parent: int
    """Process id of the engine."""
    is_verbose: bool


def main() -> NoReturn:
    """Run a rank with the settings on standard input."""
    settings = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ProcessSettings)
    die_with_parent(settings.parent)
    configure_output(is_verbose=settings.is_verbose)
    status = serve(settings.connection, settings.rank)
    sys.stderr.flush()
    os._exit(status)  # the engine waits for the end, and libraries take a second to be taken down


def serve_torchrun_rank() -> int:
    """Run this process of torchrun, whose rank is not 0, for the engine in rank 0. Returns the exit status.

    Raises RuntimeError if rank 0 ends before it has an engine."""
    die_with_torchrun()
    store, rank, _ = torchrun_store()
    return serve(msgspec.msgpack.decode(store.get(TORCHRUN_KEY), type=ConnectionInfo), rank)


def torchrun_store() -> tuple[torch.distributed.Store, int, int]:
    """(the store that the processes of a torchrun job share, rank, number of ranks)"""
    import torch

    found: tuple[torch.distributed.Store, int, int]
    found = next(torch.distributed.rendezvous("env://", timeout=_COLLECTIVE_TIMEOUT))
    return found


def serve(connection: ConnectionInfo, rank: int) -> int:
    """Make the worker that the engine asks for, and run its steps until it says that they end. Returns the status."""
    # Ctrl-C and SIGTERM, which torchrun and service managers send to all processes, are for the engine: it may have
    # requests to finish, and tells the ranks to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if not faulthandler.is_enabled():
        faulthandler.enable()
    rank_process = _RankProcess(WorkerChannel(connection, on_lost=_end_without_engine), rank)
    try:
        rank_process.run()
    except Exception as error:
        log.info("worker rank %d failed", rank, exc_info=True)
        rank_process.channel.close(Failed(_text(error), _kind(error)))
        return 1
    rank_process.channel.close(Goodbye())
    return 0


def _end_without_engine() -> None:
    """The main thread may be in a computation, or in a collective that never ends."""
    os._exit(1)


class _RankProcess:
    def __init__(self, channel: WorkerChannel, rank: int) -> None:
        self.channel, self.rank = channel, rank
        self._peers: PeerChannel | None = None
        self._meter = StageMeter()

    def run(self) -> None:
        """Until the engine says that it is over. Raises what the worker raises."""
        self.channel.send(Hello(self.rank, __version__))
        while not isinstance(message := self._receive(), Shutdown | Load):
            if isinstance(message, OpenInbox):
                self._peers = PeerChannel(self.channel.info, self.rank)
                self.channel.send(InboxOpened(self._peers.address))
            elif isinstance(message, OpenLinks):
                assert self._peers is not None, "links are opened behind inboxes"
                self._open_links(self._peers, message)
                self.channel.send(LinksOpened())
        if isinstance(message, Load):
            self._serve(message)
        if self._peers is not None:
            self._peers.close()

    def _serve(self, load: Load) -> None:
        module, _, name = load.factory.function.partition(":")
        make = getattr(importlib.import_module(module), name)
        placement = _Placement(self, load.layout)
        worker, fingerprint = make(placement, **load.factory.arguments)
        self.channel.send(Ready(worker.description, fingerprint))
        if self._peers is None:
            self._run_steps(worker)
        else:
            StageLoop(worker, self.channel, self._peers, load.layout).run()
        placement.leave()

    def _open_links(self, peers: PeerChannel, message: OpenLinks) -> None:
        """Connect to others, and wait until those that send to this rank have said hello."""
        layout, deadline = message.layout, time.monotonic() + message.seconds
        peers.connect(message.addresses, layout.targets(self.rank))
        poller, missing = zmq.Poller(), set(layout.sources(self.rank))
        self.channel.register(poller)
        peers.register(poller)
        while missing:
            poller.poll(int(1000 * max(0.0, min(deadline - time.monotonic(), 1.0))))
            while (received := peers.receive()) is not None:
                hello, _ = received
                assert isinstance(hello, LinkOpened), hello
                missing.discard(hello.rank)
            while (other := self.channel.receive_if_any()) is not None:
                self._answer_or_end(other)
            if missing and time.monotonic() >= deadline:
                raise PeerUnreachable(min(missing), self.rank, peers.address, message.seconds)

    def _answer_or_end(self, message: ToWorker) -> None:
        if isinstance(message, Shutdown):
            raise RuntimeError("the engine ended while ranks connected to each other")
        self.channel.send(Pong())

    def _run_steps(self, worker: Worker) -> None:
        """Of a model that is not spread over pipeline stages."""
        while not isinstance(message := self._receive(), Shutdown):
            if isinstance(message, RunStep):
                started = time.perf_counter()
                outputs = worker.execute(message.step)
                self._meter.add(started, message.step.num_rows)
                if self.rank == 0:
                    self._answer(message.step.number, outputs)
            elif isinstance(message, MeasureCosts):
                costs = worker.measure_costs()
                if self.rank == 0:
                    self.channel.send(CostsMeasured(costs))

    def _answer(self, number: int, outputs: list[RowsOutput]) -> None:
        send_outputs(outputs, lambda those: self.channel.send(StepDone(number, those)))

    def _receive(self) -> ToWorker:
        while isinstance(message := self.channel.receive(), Ping):
            self.channel.send(Pong(self._meter.load()))
        return message

    def expect(self, kind: type[T]) -> T:
        """The next message, which is of this kind. Raises RuntimeError if the engine ends instead."""
        message = self._receive()
        if isinstance(message, Shutdown):
            raise RuntimeError("the engine ended while the worker was loaded")
        assert isinstance(message, kind), message
        return message


class _Placement:
    """`Placement` of a rank that the engine has told to load."""

    def __init__(self, process: _RankProcess, layout: Layout) -> None:
        self._process, self._layout = process, layout
        self.stage = layout.stage_of(process.rank)
        self._has_joined = False

    def join(self) -> TensorParallel:
        """Join the ranks that share the weights of the stage."""
        from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel

        size, channel = self._layout.tensor_parallel_size, self._process.channel
        if size == 1:
            return TensorParallel()
        if self._layout.is_leader(self._process.rank):
            host = own_host(channel.info.endpoint)
            store = _open_store(host, lambda port: channel.send(StoreOpened(host, port)))
        else:
            opened = self._process.expect(StoreOpened)
            store = _connect_to_store(opened.host, opened.port)
        _join_world(store, self._layout.tensor_parallel_rank_of(self._process.rank), size)
        self._has_joined = True
        import torch

        return TensorParallel(torch.distributed.group.WORLD)

    def leave(self) -> None:
        """Leave the group of `join`, if there is one."""
        if self._has_joined:
            import torch

            torch.distributed.destroy_process_group()

    def smallest(self, value: int) -> int:
        """The smallest of what all ranks give; the engine finds it, and a rank that fails ends the wait."""
        if self._layout.num_ranks == 1:
            return value
        self._process.channel.send(Proposal(value))
        return self._process.expect(Agreed).smallest


def _open_store(host: str, on_opened: Callable[[int], object]) -> torch.distributed.Store:
    """The store that the ranks find each other in, at a free port of the interface `host` alone.

    on_opened: called with the port."""
    import torch

    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, 0), family=family, backlog=1024)
    port = listener.getsockname()[1]
    store = torch.distributed.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(),
        timeout=_COLLECTIVE_TIMEOUT,
    )  # fmt: skip
    on_opened(port)
    return store


def _connect_to_store(host: str, port: int) -> torch.distributed.Store:
    import torch

    return torch.distributed.TCPStore(host, port, is_master=False, timeout=_COLLECTIVE_TIMEOUT)


def _join_world(store: torch.distributed.Store, rank: int, size: int) -> None:
    import torch

    from megatron.early_exit.platform import device as device_module

    device_module.claim_device()
    torch.distributed.init_process_group(
        device_module.backend(), store=store, rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT
    )


def _kind(error: Exception) -> ErrorKind:
    if isinstance(error, ValueError):
        return "ValueError"
    return "OSError" if isinstance(error, OSError) else "other"


def _text(error: Exception) -> str:
    return in_words(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
