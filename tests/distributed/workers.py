"""Worker processes that stay alive between tests: importing core takes seconds a process, so one process imports it and
all ranks are its forks.

A pool per world size runs functions on all its ranks at once. A case that fails or hangs ends its pool, with the stacks
of all ranks in the error; the next case starts a new one.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import multiprocessing
import os
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import wait
from typing import Any
from unittest import mock

from tests.ports import free_port

COLLECTIVE_TIMEOUT_SECONDS = 60
_CASE_TIMEOUT_SECONDS = 480  # one case has a real model, and a machine may be busy
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


_NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Layouts are tested over gloo, also on a machine with a GPU."""


def _start_fork_server() -> None:
    """Start the process whose forks all ranks are, unless it runs. It imports what cases need, and ends with the tests.

    (Ranks have the same hash seed so, unlike those of a program: tests/integration/ starts programs.)"""
    forkserver.set_forkserver_preload(["megatron.early_exit.training.pretrain"])
    with mock.patch.dict(os.environ, _NO_GPU):
        forkserver.ensure_running()


def _end_with(tests: int) -> None:
    """End this process when that of the tests has ended, in whatever way. The fork server would wait for its forks."""
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(tests)], [], [])
    os._exit(1)


def _serve(rank: int, world_size: int, port: int, stack_file: str, tests: int, connection: Any) -> None:
    threading.Thread(target=_end_with, args=(tests,), daemon=True).start()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **_NO_GPU,
    }  # fmt: skip
    sys.path.insert(0, _ROOT)
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        import torch
        from megatron.core import parallel_state

        torch.set_num_threads(1)
        from megatron.early_exit.platform.distributed import initialize_distributed

        initialize_distributed(timeout_minutes=COLLECTIVE_TIMEOUT_SECONDS / 60)
        _share_groups()
        while True:
            try:
                module, name, kwargs = connection.recv()
            except EOFError:  # the tests have ended
                return
            try:
                function = getattr(importlib.import_module(module), name)
                gc.freeze()  # what libraries are made of, a million objects, no collection needs to look at
                result = function(**kwargs)
                connection.send((True, result))
            except BaseException:
                connection.send((False, f"rank {rank} failed:\n{traceback.format_exc()}"))
            # The next case finds a worker as new.
            result = None
            parallel_state.destroy_model_parallel()
            torch.set_num_threads(1)
            gc.collect()  # a model that stays alive keeps its process groups, and each of these has polling threads


def _share_groups() -> None:
    """Let all cases of this process share their process groups, one for each set of ranks.

    Each gloo group has polling threads, and core makes some twenty groups per layout: after a hundred cases they would
    take all the time. (The world itself is never shared: pipeline messages use it beside the pipeline's own group.)"""
    import torch

    create, groups = torch.distributed.new_group, {}

    def new_group(ranks: list[int] | None = None, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        key = (tuple(ranks or ()), backend)
        if key not in groups:
            groups[key] = create(ranks, *args, backend=backend, **kwargs)
        return groups[key]

    torch.distributed.new_group = new_group


class WorkerPool:
    """`world_size` processes in one gloo world."""

    def __init__(self, world_size: int) -> None:
        _start_fork_server()
        context = multiprocessing.get_context("forkserver")
        self.folder = tempfile.TemporaryDirectory()
        port = free_port()
        self.connections, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, port, self._stack_file(rank), os.getpid(), theirs)
            # Not daemons: loading data starts processes.
            process = context.Process(target=_serve, args=arguments)
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def _stack_file(self, rank: int) -> str:
        return os.path.join(self.folder.name, f"stack{rank}")

    def run(self, function: Callable, **kwargs: Any) -> list[Any]:
        """Call a module-level function on all ranks; returns what each returned. Raises with all ranks' errors."""
        for connection in self.connections:
            connection.send((function.__module__, function.__name__, kwargs))
        results: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + _CASE_TIMEOUT_SECONDS
        while len(results) < len(self.connections) and time.monotonic() < deadline:
            waiting = {c: r for r, c in enumerate(self.connections) if r not in results}
            for connection in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                try:
                    results[waiting[connection]] = connection.recv()
                except EOFError:
                    results[waiting[connection]] = (False, f"rank {waiting[connection]} died")
            if any(not ok for ok, _ in results.values()):
                # The others probably wait for the failed rank: give them a moment to fail by themselves.
                deadline = min(deadline, time.monotonic() + 2)
        errors = [text for ok, text in results.values() if not ok]
        if errors or len(results) < len(self.connections):
            if len(results) < len(self.connections):
                errors.append(self._stacks([r for r in range(len(self.connections)) if r not in results]))
            self.kill()
            raise AssertionError("\n".join(errors))
        return [results[rank][1] for rank in range(len(self.connections))]

    def _stacks(self, ranks: list[int]) -> str:
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return "\n".join(f"rank {rank} was still running:\n{open(self._stack_file(rank)).read()}" for rank in ranks)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        _pools.pop(len(self.processes), None)


_pools: dict[int, WorkerPool] = {}


def run_distributed(world_size: int, function: Callable, **kwargs: Any) -> list[Any]:
    """Run `function(**kwargs)` on every rank of a gloo world; returns the ranks' results in order."""
    if world_size not in _pools:
        _pools[world_size] = WorkerPool(world_size)
    return _pools[world_size].run(function, **kwargs)


@atexit.register
def _end_workers() -> None:
    for pool in list(_pools.values()):
        pool.kill()
