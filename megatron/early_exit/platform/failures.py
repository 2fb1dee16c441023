"""Failures in words: other ranks and processes that are gone or do not answer, and what the operating system refuses.

Imports neither torch nor core, so that it serves where these fail.
"""

from __future__ import annotations

import errno
from types import TracebackType

# What gloo, NCCL and the rendezvous store write when the other side is gone, and when it does not answer in time.
_LOST = (
    "connection closed by peer", "connection reset", "connection refused", "connection was", "broken pipe",
    "socket closed", "socket timeout", "remote process exited", "communicator was aborted", "failed to recv",
    "failed to send",
)  # fmt: skip
_TIMED_OUT = ("timed out", "timeout")
_SOURCES = ("gloo", "nccl", "store", "socket", "process group", "clients joined", "collective")

_ADVICE = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "free some of your quota, or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its permissions, or choose another",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def lost_peer(error: BaseException, rank: int, timeout_minutes: float) -> str | None:
    """A sentence for an error of communication: what this rank waited for and what to do; None for other errors.

    timeout_minutes: of collectives (--distributed-timeout-minutes)."""
    text = str(error).lower()
    is_remote = isinstance(error, RuntimeError) and any(source in text for source in _SOURCES)
    if not is_remote and type(error).__name__ not in ("DistNetworkError", "DistStoreError", "DistBackendError"):
        return None
    where = _waiting_place(error.__traceback__)
    if any(part in text for part in _TIMED_OUT):
        return (
            f"rank {rank} waited longer than --distributed-timeout-minutes {timeout_minutes:g} {where}: another rank "
            "has ended, hangs or is much slower. Look at what the other ranks say; if all were at work, raise the flag."
        )
    if any(part in text for part in _LOST):
        return (
            f"rank {rank} lost the connection to another rank {where}: that one has ended. Its own message, if it had "
            "the time for one, stands elsewhere in this output; a process that was killed (out of memory, by the "
            "scheduler) leaves none. Resume from the last checkpoint with --load."
        )
    return None


def lost_loader(error: BaseException) -> str | None:
    """A sentence for the end of a process that loads data, and what to do; None for other errors."""
    if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker"):
        return None
    return (
        f"a process that loads data has ended ({str(error).strip().rstrip('.')}). Mostly the system has killed it for "
        "want of memory: fewer --num-workers need less (0 loads in the training process itself). Resume from the last "
        "checkpoint with --load."
    )


def _waiting_place(trace: TracebackType | None) -> str:
    """The call that failed, and the function of ours that made it: "in all_reduce (collect_losses)"."""
    inner = ours = None
    while trace is not None:
        code, module = trace.tb_frame.f_code, trace.tb_frame.f_globals.get("__name__", "")
        if module.startswith("megatron.early_exit"):
            ours, inner = code.co_name, None
        elif not code.co_name.startswith(("_", "wrapper", "<")) or inner is None:
            inner = code.co_name
        trace = trace.tb_next
    return "in " + (f"{inner} ({ours})" if inner and ours else inner or ours or "an unknown place")


def in_words(error: Exception) -> str:
    """The message of an error for whoever runs a program."""
    return os_error_in_words(error) if isinstance(error, OSError) else str(error)


def os_error_in_words(error: OSError) -> str:
    """An OSError without its number, with the file and what to do where that is known."""
    if error.errno is None or error.strerror is None:
        return str(error)
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    advice = f"; {_ADVICE[error.errno]}" if error.errno in _ADVICE else ""
    return f"{files + ': ' if files else ''}{error.strerror[0].lower()}{error.strerror[1:]}{advice}"
