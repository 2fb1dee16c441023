"""A lock on a folder, held by one process, that names its owner and ends with it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from megatron.early_exit.config.checkpoint_files import LOCK_FILE

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

log = logging.getLogger(__name__)


class FolderLock:
    """The right to write into a folder, from construction to `release` or the end of the process.

    A POSIX record lock: the kernel frees it when its process ends in whatever way, processes that it starts do not
    inherit it, and it works over NFS. Raises BlockingIOError that names the owner if another process holds it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._file: IO[str] | None = self._acquire()
        self._file.seek(0)
        self._file.truncate()
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}, self._file)
        self._file.flush()

    def release(self) -> None:
        """Let others write into the folder. May be called again."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _acquire(self) -> IO[str]:
        while True:
            file = self._path.open("a+", encoding="utf-8")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = _owner(file)
                file.close()
                if error.errno in _UNSUPPORTED and not _is_running_here(owner):
                    log.warning(
                        "%s cannot be locked on its file system (%s): make sure that no other run writes there",
                        self._path.parent, error.strerror,
                    )  # fmt: skip
                    return self._path.open("a+", encoding="utf-8")
                raise BlockingIOError(self._refusal(owner)) from error
            # An owner that ended in between has removed the file that was opened here.
            if self._path.exists() and os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                return file
            file.close()

    def _refusal(self, owner: dict) -> str:
        who = "another process"
        if owner:
            who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"
        return (
            f"{self._path.parent} is being written by {who}. Wait for its end, or end it, or choose another folder. "
            f"(If that machine is gone and its lock stays, remove {self._path}.)"
        )


def _owner(file: IO[str]) -> dict:
    """What the lock file says, as far as it can be read."""
    try:
        file.seek(0)
        owner = json.loads(file.read())
        return owner if isinstance(owner, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_running_here(owner: dict) -> bool:
    if owner.get("host") != socket.gethostname() or owner.get("pid") == os.getpid():
        return False
    try:
        os.kill(int(owner.get("pid", "")), 0)
    except (ValueError, TypeError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
