"""What a section of the page is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from megatron.early_exit.evaluation.report.document import Document, Results
from megatron.early_exit.evaluation.report.markup import Content
from megatron.early_exit.evaluation.report.plots.base import Plot

Parts = Sequence[Content | Plot]


@dataclass(frozen=True)
class Section(Generic[Results]):
    """One question that a report answers from documents of some kinds."""

    anchor: str
    title: str
    kinds: tuple[str, ...]
    """Of the documents; each is also the name of the command that makes it."""
    reading: str
    """How to read it: what is good, and what is a trap."""
    parts: Callable[[Document[Results]], Parts]
    """Tables and plots of one document; nothing if it has none of this."""
    lacking: str = ""
    """What to do if a document has none of this."""


AnySection = Section[Any]
