"""What the scores of exits depend on: records of them, and certificates, hold for nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import msgspec

from megatron.early_exit.inference.params import ExitScore

_WORDS = {
    "weights": "another checkpoint, or one that was written again",
    "exit_layers": "other exits",
    "dtype": "another dtype",
    "quantize": "another quantize",
    "shortlist": "another shortlist",
    "tokenizer": "another tokenizer",
    "ends": "other ids that end an answer",
    "probes": "other probes",
}

_DIGESTS = ("weights", "tokenizer", "shortlist", "probes")
"""Which say nothing to people."""


@dataclass(frozen=True)
class ExitFingerprint:
    """A model as it is loaded. Layouts are not part of it: they change rounding alone."""

    weights: str
    """`checkpoint.read_model.fingerprint`."""
    exit_layers: tuple[int, ...]
    dtype: str
    """fp32 or bf16"""
    quantize: str | None
    """all, or None; of earlier records and certificates also exits."""
    shortlist: str | None
    """`Shortlist.digest` of the one that exits are evaluated with first."""
    tokenizer: str
    ends: tuple[int, ...]
    """Ids that end an answer, ascending."""
    probes: str | None = None
    """`ExitProbes.digest` of those whose output is the score; None: the score is the heads' largest probability."""

    @property
    def score(self) -> ExitScore:
        """What thresholds are compared with."""
        return "head" if self.probes is None else "probe"

    def differences(self, other: ExitFingerprint) -> list[str]:
        """What the model that is loaded now, `other`, has otherwise than this one, in words."""
        found = []
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if mine == theirs:
                continue
            if (one.name, mine) == ("quantize", "exits"):
                found.append("exits in int8 (quantize 'exits'), which there are no more: calibrate again")
                continue
            words = _WORDS[one.name]
            if one.name in _DIGESTS:
                mine, theirs = (value and "one" for value in (mine, theirs))
            found.append(words if mine == theirs else f"{words} ({_text(mine)}; the loaded model has {_text(theirs)})")
        return found

    @property
    def digest(self) -> str:
        """Hexadecimal digits that differ if anything does."""
        values = msgspec.to_builtins(self)
        if self.probes is None:  # as before there were probes: folders of records are named by it
            del values["probes"]
        return hashlib.sha256(msgspec.json.encode(values)).hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a chat template, for instance."""
    return hashlib.sha256(text.encode()).hexdigest()


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
