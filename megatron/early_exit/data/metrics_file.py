"""`metrics.jsonl`: a record of numbers a line, appended by a run, read while it goes on and after it was killed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.early_exit.data.text_files import parse_json, split_lines

_BEGINNING = b'{"kind": '
"""How each line begins: a last line that does not, or whose end is missing, was cut while it was written."""

_TAIL_BYTES = 1 << 20


class MetricsFile:
    """Appends records to a file, after what it holds."""

    def __init__(self, path: Path) -> None:
        """Raises OSError naming the file if it cannot be written, ValueError if it holds something else."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
            _repair(path)
        except OSError as error:
            raise self._failure(error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. Raises OSError naming the file."""
        line = memoryview((json.dumps(record) + "\n").encode())
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        self._file.close()

    def _failure(self, error: OSError) -> OSError:
        advice = "free some space" if error.errno == errno.ENOSPC else "give another --metrics-file"
        return OSError(f"metrics cannot be written to {self.path} ({error.strerror}): {advice}")


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """Records of a file, but for a last one that is not whole.

    Raises ValueError with FILE:LINE for a line that is no record, OSError if the file cannot be read."""
    with Path(path).open("rb") as file:
        for line in split_lines(file, path):
            if line.is_blank:
                continue
            try:
                record = parse_json(line.content, line.location)
            except ValueError:
                if not line.raw.endswith(b"\n"):
                    return
                raise
            if not isinstance(record, dict) or not {"kind", "iteration"} <= record.keys():
                raise ValueError(f"{line.location}: no record of metrics: {line.content[:80].decode(errors='replace')}")
            yield record


def _repair(path: Path) -> None:
    """Remove a last line that a killed run began to write, so that the next one does not stand behind it.

    Raises ValueError if the file holds something else than metrics."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL_BYTES, 0))
        *whole_lines, last_line = file.read().split(b"\n")
        written = last_line.rstrip(b"\0")  # a power failure leaves zeros where nothing had been written
        ending = written or (whole_lines[-1] if whole_lines else b"")
        if not (ending.startswith(_BEGINNING) or _BEGINNING.startswith(ending)):
            raise ValueError(
                f"--metrics-file {path} does not hold metrics: it ends in {ending[:40]!r}. Give another file."
            )
        if not last_line:
            return
        try:
            json.loads(last_line)
        except ValueError:
            file.truncate(size - len(last_line))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
