"""A result document: facts of how it came about, and its results, whose type follows from its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from megatron.early_exit.evaluation.documents import read_document
from megatron.early_exit.evaluation.report.schema import (
    Calibration,
    Correctness,
    Exits,
    Number,
    Probes,
    Speed,
    Tasks,
)

Results = TypeVar("Results", Exits, Probes, Calibration, Speed, Correctness, Tasks)


class Model(msgspec.Struct):
    """Which model was measured, and how it was loaded."""

    checkpoint: str
    num_layers: int
    exit_layers: list[int]
    fingerprint: str | None = None
    tokenizer: str | None = None
    iteration: int | None = None
    dtype: str | None = None
    quantize: str | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    num_slots: int | None = None
    threads: int | None = None


class Machine(msgspec.Struct):
    """Where it was measured."""

    cpu: str | None = None
    cpu_cores: int | None = None
    memory_bytes: int | None = None
    gpus: list[str] = []
    system: str | None = None
    load_average_1min: Number = None
    """Before the run."""


class Document(msgspec.Struct, Generic[Results]):
    """A document and its file."""

    kind: str
    path: Path
    model: Model
    results: Results
    date: str | None = None
    command: str | None = None
    commit: str | None = None
    versions: dict[str, str | None] = {}
    machine: Machine = msgspec.field(default_factory=Machine)
    settings: dict[str, Any] = {}
    data: dict[str, str | None] = {}


AnyDocument = Document[Any]

KINDS: dict[str, type[AnyDocument]] = {
    "exits": Document[Exits], "probes": Document[Probes], "calibrate": Document[Calibration],
    "sweep": Document[Speed], "correctness": Document[Correctness], "benchmark": Document[Speed],
    "tasks": Document[Tasks],
}  # fmt: skip
"""Types of documents by kind, in the order of the commands."""


def load_document(path: Path) -> AnyDocument:
    """Raises ValueError if it is broken or of no known kind, OSError if it cannot be read."""
    content = read_document(path)
    kind = content["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{path} is of kind {kind!r}, which the report does not know; known are {', '.join(KINDS)}")
    try:
        return msgspec.convert(content | {"path": path}, KINDS[kind])
    except msgspec.ValidationError as error:
        place = "" if "`$" in str(error) else " - at `$`"
        raise ValueError(f"{path} is a broken result document: {error}{place}") from None
