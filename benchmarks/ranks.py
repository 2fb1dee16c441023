"""Runs one function on all ranks of a world on this machine and brings its result back; what ranks do together."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import socket
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import multiprocessing

from benchmarks.batches import Batch
from benchmarks.timing import now, seconds_of
from megatron.early_exit.platform.processes import die_with_parent

T = TypeVar("T")


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, threads_per_rank: int = 1) -> Any:
    """Spawn `world_size` processes in one world and return what rank 0's `function(*arguments)` returned.

    function: of a module that can be imported, called on every rank with the world initialised. If a rank fails, the
    others are ended and its traceback is raised. The program needs `if __name__ == "__main__":`."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        multiprocessing.start_processes(
            _run_rank,
            args=(world_size, _free_port(), threads_per_rank, os.getpid(), str(result), function, arguments),
            nprocs=world_size,
            start_method="spawn",
        )
        return pickle.loads(result.read_bytes())


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def timed(action: Callable[[list[Batch]], object], batches: list[Batch]) -> tuple[float, float]:
    """(wall seconds, CPU seconds) on this rank of one `action` that all ranks start together."""
    now()
    torch.distributed.barrier()
    return seconds_of(action, batches)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run_rank(
    rank: int, world_size: int, port: int, threads: int, parent: int, result: str, function: Callable, arguments: tuple
) -> None:
    die_with_parent(parent)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    faulthandler.register(signal.SIGUSR1)  # `kill -USR1` shows where a rank is
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", module=r"megatron\.core")  # what core misses (Apex, TE) on every rank
    from megatron.early_exit.platform.distributed import destroy_distributed, initialize_distributed

    initialize_distributed()
    returned = function(*arguments)
    if rank == 0:
        Path(result).write_bytes(pickle.dumps(returned))
    destroy_distributed()
