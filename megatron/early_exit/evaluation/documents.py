"""Result documents: what the commands write and the report reads, with what another person needs to repeat them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron.early_exit.checkpoint.read_model import fingerprint
from megatron.early_exit.config.checkpoint_files import iteration_of
from megatron.early_exit.inference.engine_loading import LoadedEngine
from megatron.early_exit.platform.files import replaced
from megatron.early_exit.platform.machine import commit, machine_info, versions


def result_document(
    kind: str,
    loaded: LoadedEngine,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    data: Mapping[str, str] | None = None,
    machine: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON document of one command. kind: its name. settings: of the command, seeds among them. data: name of each
    file or set -> SHA-256 of its content. machine: `machine_info()` from before the run."""
    return {
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "machine": machine or machine_info(),
        "model": model_facts(loaded),
        "settings": dict(settings),
        "data": dict(data or {}),
        "results": dict(results),
    }


def model_facts(loaded: LoadedEngine) -> dict[str, Any]:
    """What a result depends on: which model, and how it was loaded."""
    checkpoint, config = loaded.checkpoint, loaded.checkpoint.config
    return {
        "checkpoint": config.path,
        "iteration": iteration_of(checkpoint.folder),
        "fingerprint": fingerprint(checkpoint.folder),
        "tokenizer": loaded.tokenizer.fingerprint,
        "num_layers": loaded.engine.description.num_layers,
        "exit_layers": list(checkpoint.description.exits.exit_layer_nums),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "quantize": config.quantize,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "num_slots": loaded.engine.description.num_slots,
        "threads": torch.get_num_threads(),
    }


def write_document(document: Mapping[str, Any], path: Path) -> None:
    """At once or not at all. Raises ValueError for NaN and infinity, which are not JSON: unknown values are None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_document(path: Path) -> dict[str, Any]:
    """Raises ValueError if it is no result document, OSError if it cannot be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"{path} is no result document: {error}") from None
    if not isinstance(document, dict) or not {"kind", "model", "results"} <= document.keys():
        raise ValueError(f"{path} is no result document of evaluate.py: it has no kind, model and results")
    return document


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def content_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
