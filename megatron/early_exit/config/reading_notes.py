"""What is found while flags and YAML files are read, until all of it is said together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.early_exit.config.flag_notes import REFUSED_VALUES, is_harmless, note_of


class Notes:
    """What was found while reading flags: problems, warnings, and refusals that depend on another setting."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.has_bad_values = False
        self._conditional: list[tuple[str, str, tuple[str, str]]] = []

    def bad_value(self, message: str) -> None:
        """A value that cannot be used, so that the settings are incomplete."""
        self.problems.append(message)
        self.has_bad_values = True

    def note(self, flag: str, values: Sequence[str]) -> bool:
        """Record the note on `flag`; False if there is none, that is, if the flag is unknown or ours."""
        note = note_of(flag)
        if note is None:
            return False
        if not note.refused:
            self.warnings.append(f"{flag} is ignored: {note.reason}")
        elif note.harmless_with is not None:
            self._conditional.append((flag, note.reason, note.harmless_with))
        elif not is_harmless(note, values):
            self.problems.append(f"{' '.join([flag, *values])} is refused: {note.reason}")
        return True

    def resolve_conditions(self, settings: Mapping[str, Any]) -> None:
        """Decide the refusals that depend on a setting, now that all are known."""
        for flag, reason, (field, value) in self._conditional:
            if settings.get(field) == value:
                self.warnings.append(f"{flag} is ignored: {reason}")
            else:
                self.problems.append(f"{flag} is refused: {reason}")


def hint_for(field_name: str, value: Any) -> str:
    hint = REFUSED_VALUES.get((field_name, value)) if isinstance(value, str) else None
    return f"; {hint}" if hint else ""
