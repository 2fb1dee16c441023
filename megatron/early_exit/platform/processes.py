"""Ties the life of a process to that of its parent, so that a killed run leaves none behind."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SECONDS_BETWEEN_LOOKS = 1.0


def die_with_parent(parent: int | None = None) -> None:
    """Have this process killed when its parent ends, however that ends; where the parent has ended already, now.

    parent: the process id of the parent, which notices one that ended before this call. To be called by the process
    itself as early as it can, for instance as the initializer of a pool: `initializer=die_with_parent,
    initargs=(os.getpid(),)`. The parent must have started it by itself (not through a fork server), from a thread that
    lives as long as it does (`LastingThread`): on Linux, the end of that thread counts.
    """
    if parent is None:
        parent = os.getppid()
    if not _ask_linux():
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        _end()


def die_with_torchrun() -> None:
    """`die_with_parent` for a rank that torchrun started; nothing for a process that a shell started, which may end."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


class LastingThread:
    """A thread to start processes from that `die_with_parent`, whichever thread wants them: it lives until `close`."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable, Future] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def call(self, function: Callable[[], T]) -> T:
        """Call `function` in the thread; returns or raises what it does."""
        future: Future = Future()
        self._calls.put((function, future))
        return future.result()

    def close(self) -> None:
        """End the thread, and on Linux with it the processes that it has started."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, future = call
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


def _ask_linux() -> bool:
    """Whether the kernel will send the signal."""
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
