"""What another person needs to repeat the numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from megatron.early_exit.evaluation.report.document import AnyDocument
from megatron.early_exit.evaluation.report.markup import Content, Markup, element
from megatron.early_exit.evaluation.report.numbers import UNKNOWN
from megatron.early_exit.evaluation.report.tables import facts

ANCHOR, TITLE = "reproducibility", "How to repeat this"
READING = (
    "All numbers come from result documents, which also keep what was measured prompt by prompt. The same command on "
    "the same commit, checkpoint, data and seeds gives the same tokens on the same kind of machine; times differ with "
    "the machine and its load."
)


def reproducibility(documents: Sequence[AnyDocument]) -> list[Markup]:
    """What all documents share in one table, and a table for each with the rest."""
    described = [_facts(document) for document in documents]
    common = {
        name: value
        for name, value in described[0].items()
        if len(documents) > 1 and all(other.get(name) == value for other in described)
    }
    tables = [facts("Common to all documents", _cells(common))] if common else []
    for document, own in zip(documents, described):
        rest = {name: value for name, value in own.items() if name not in common}
        tables.append(facts(f"Document {document.path.name} ({document.kind})", _cells(rest)))
    return tables


def _facts(document: AnyDocument) -> dict[str, str]:
    model, machine = document.model, document.machine
    found: dict[str, Any] = {
        "Command": document.command,
        "Date": document.date,
        "Commit": document.commit,
        "Checkpoint": model.checkpoint,
        "Iteration": model.iteration,
        "Fingerprint of the checkpoint": model.fingerprint,
        "Fingerprint of the tokenizer": model.tokenizer,
        "Layers": model.num_layers,
        "Exits after layers": ", ".join(map(str, model.exit_layers)) or "none",
        "Number type": model.dtype,
        "Quantisation": model.quantize or "none",
        "Tensor-parallel size": model.tensor_parallel_size or 1,
        "Pipeline-parallel size": model.pipeline_parallel_size or 1,
        "Slots": model.num_slots,
        "Threads": model.threads,
        "Processor": machine.cpu,
        "Cores": machine.cpu_cores,
        "Memory": _gibibytes(machine.memory_bytes),
        "GPUs": ", ".join(machine.gpus) or "none",
        "System": machine.system,
        "Load before the run (1 minute)": machine.load_average_1min,
        **{f"Version of {name}": version for name, version in document.versions.items()},
        **{f"Setting {name}": value for name, value in document.settings.items()},
        **{f"SHA-256 of {name}": digest for name, digest in document.data.items()},
        "SHA-256 of this document": hashlib.sha256(document.path.read_bytes()).hexdigest(),
    }
    return {name: _in_words(value) for name, value in found.items()}


def _gibibytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**30:.1f} GiB"


def _in_words(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cells(facts_: dict[str, str]) -> list[tuple[Content, Content]]:
    return [(name, element("code", value)) for name, value in facts_.items()]
