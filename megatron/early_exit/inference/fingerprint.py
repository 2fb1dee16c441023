"""What the scores of exits depend on: records of them, and certificates, hold for nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import msgspec

_WORDS = {
    "weights": "another checkpoint, or one that was written again",
    "exit_layers": "other exits",
    "dtype": "another dtype",
    "quantize": "another quantize",
    "shortlist": "another shortlist",
    "tokenizer": "another tokenizer",
    "ends": "other ids that end an answer",
}


@dataclass(frozen=True)
class ExitFingerprint:
    """A model as it is loaded. Layouts are not part of it: they change rounding alone."""

    weights: str
    """`checkpoint.read_model.fingerprint`."""
    exit_layers: tuple[int, ...]
    dtype: str
    """fp32 or bf16"""
    quantize: str | None
    shortlist: str | None
    """`Shortlist.digest` of the one that exits are probed with."""
    tokenizer: str
    ends: tuple[int, ...]
    """Ids that end an answer, ascending."""

    def differences(self, other: ExitFingerprint) -> list[str]:
        """What `other` has that this one has not, in words."""
        found = []
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if mine != theirs:
                is_digest = one.name in ("weights", "tokenizer", "shortlist") and mine and theirs
                found.append(
                    _WORDS[one.name] if is_digest else f"{_WORDS[one.name]} ({_text(theirs)}, not {_text(mine)})"
                )
        return found

    @property
    def digest(self) -> str:
        """Hexadecimal digits that differ if anything does."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a chat template, for instance."""
    return hashlib.sha256(text.encode()).hexdigest()


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    text = "none" if value is None else str(value)
    return f"{text[:12]}..." if len(text) > 16 else text
