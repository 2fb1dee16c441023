"""The result of one part, written after every case, and read again when the part is resumed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks import common


class Record:
    """Rows of one part. A case is what is measured as a whole, and gives one row or several; the document is written
    anew after each row, so that a run that is cut keeps them."""

    def __init__(
        self, part: str, results: Path, settings: dict[str, Any], deadline: float, again: bool = False
    ) -> None:
        """results: folder. deadline: `time.time()` after which no case is begun. again: forget what is there."""
        self._deadline = deadline
        machine = common.machine_info()
        new = common.result_document(f"gpu_{part}", machine, settings, settings["seed"], {}, {})
        new["cases"] = {"done": [], "left_out": []}
        self.path = results / common.default_result_path(new).name
        old = None if again else _read(self.path)
        self.document = old if old is not None and _is_same_run(old, new) else new

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Measured rows by their names."""
        return self.document["results"]

    @property
    def left_out(self) -> list[str]:
        """Cases that there was no time for."""
        return self.document["cases"]["left_out"]

    def wants(self, case: str) -> bool:
        """Whether `case` is to be measured: not done yet, and there is time. What there is no time for is kept."""
        if case in self.document["cases"]["done"]:
            return False
        if time.time() < self._deadline:
            return True
        if case not in self.left_out:
            self.left_out.append(case)
            self._write()
        return False

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row, on disk at once."""
        self.rows[name] = row
        self._write()

    def finish(self, case: str) -> None:
        """`case` is done and will not be measured again."""
        self.document["cases"]["done"].append(case)
        if case in self.left_out:
            self.left_out.remove(case)
        self._write()

    def _write(self) -> None:
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        common.write_document(self.document, temporary)
        temporary.replace(self.path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _is_same_run(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether rows of `old` may stand beside those of `new`: the same code, settings, machine and libraries."""
    return all(old.get(key) == new[key] for key in ("commit", "settings", "versions")) and (
        old["machine"]["gpus"] == new["machine"]["gpus"] and old["machine"]["cpu"] == new["machine"]["cpu"]
    )


def table(document: dict[str, Any]) -> str:
    """Rows as a table: columns are what any row has, single numbers, words and truths only."""
    rows = document["results"]
    if not rows:
        return "nothing measured yet"
    columns: list[str] = []
    for row in rows.values():
        columns += [name for name, value in row.items() if name not in columns and not isinstance(value, list | dict)]
    cells = [[name, *(row.get(column) for column in columns)] for name, row in rows.items()]
    return common.format_table(["", *columns], cells)
