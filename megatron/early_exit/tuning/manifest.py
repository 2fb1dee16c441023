"""What is done in the folder of a recipe, and of what: a run that ended early goes on, other settings are noticed.

`recipe.json` holds for each step its signature (its settings, and the signatures of the steps whose results it reads)
and, when it is done, what later steps want to know of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.early_exit.platform.files import replaced

MANIFEST_FILE = "recipe.json"

_DIGEST = re.compile("[0-9a-f]{64}")
"""SHA-256 of files, which says nothing to a reader."""

Signature = dict[str, Any]
Facts = dict[str, Any]
State = Literal["to do", "begun", "done", "changed"]


@dataclass(frozen=True)
class Step:
    """One step of a recipe."""

    name: str
    title: str
    settings: Mapping[str, Any]
    """All that its result depends on, but for the results of the steps that it needs. JSON values."""
    run: Callable[[], Facts]
    """Does it, or what is left of it after an interruption."""
    needs: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    """What is there when it is done, and is removed before it is done anew."""
    is_collective: bool = False
    """Whether all ranks of a job run it; the others wait for the main one."""


class Manifest:
    """The file, read anew whenever it is asked: another rank may have written it."""

    def __init__(self, folder: Path, steps: Sequence[Step]) -> None:
        self.path = folder / MANIFEST_FILE
        self.steps = {step.name: step for step in steps}
        self.signatures: dict[str, Signature] = {}
        for step in steps:
            needs = {name: _digest(self.signatures[name]) for name in step.needs}
            # As JSON gives them back: tuples are lists there.
            self.signatures[step.name] = json.loads(json.dumps({"settings": dict(step.settings), "needs": needs}))

    def state(self, name: str) -> State:
        """Of a step; one whose outputs are gone is to be done. One that ended before it made anything is to be done,
        whatever settings it was begun with."""
        entry = self._read().get(name)
        if entry is None:
            return "to do"
        outputs = self.steps[name].outputs
        if entry["signature"] != self.signatures[name]:
            has_made = entry["is_done"] or any(path.exists() for path in outputs)
            return "changed" if has_made else "to do"
        is_there = all(path.exists() for path in outputs)
        return "done" if entry["is_done"] and is_there else "begun"

    def facts(self, name: str) -> Facts:
        """What a step that is done said."""
        return self._read()[name]["facts"]

    def seconds(self, name: str) -> float:
        """What a step that is done took, in its last run."""
        return self._read()[name]["seconds"]

    def differences(self, name: str) -> list[str]:
        """What of a changed step's own settings is another; empty if only what it needs is."""
        before, now = self._read()[name]["signature"]["settings"], self.signatures[name]["settings"]
        names = sorted(before.keys() | now.keys())
        return [_difference(key, before.get(key), now.get(key)) for key in names if before.get(key) != now.get(key)]

    def begin(self, name: str) -> None:
        """Note what a step is about to make, before it makes anything."""
        self._write(name, {"signature": self.signatures[name], "is_done": False})

    def finish(self, name: str, seconds: float, facts: Facts) -> None:
        entry = {"signature": self.signatures[name], "is_done": True, "seconds": round(seconds, 1), "facts": facts}
        self._write(name, entry)

    def forget(self, names: Sequence[str]) -> None:
        """Steps that are to be done anew."""
        entries = {name: entry for name, entry in self._read().items() if name not in names}
        self._save(entries)

    def _write(self, name: str, entry: dict[str, Any]) -> None:
        self._save(self._read() | {name: entry})

    def _save(self, entries: dict[str, Any]) -> None:
        with replaced(self.path) as partial:
            partial.write_text(json.dumps(entries, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(f"{self.path} cannot be read ({error}); remove it, or its folder") from error


def _digest(signature: Signature) -> str:
    return hashlib.sha256(json.dumps(signature, sort_keys=True).encode()).hexdigest()


def _difference(key: str, before: Any, now: Any) -> str:
    short = lambda value: "nothing" if value is None else str(value)[:40]
    if isinstance(before, list) and isinstance(now, list):
        gone, new = ([str(word) for word in one if word not in other] for one, other in ((before, now), (now, before)))
        if gone or new:
            return f"{key}: {' '.join(new) or 'nothing'} in place of {' '.join(gone) or 'nothing'}"
        # The same values in another order, or other numbers of them.
        return f"{key}: {' '.join(map(str, now))} in place of {' '.join(map(str, before))}"
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (before, now)):
        return f"{key}: other content than before"
    return f"{key}: {short(now)} in place of {short(before)}"
