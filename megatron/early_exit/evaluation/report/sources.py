"""Which documents a report is made of, and of which model each is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.checkpoint_files import RESULTS_FOLDER
from megatron.early_exit.evaluation.report.document import (
    KINDS,
    AnyDocument,
    Document,
    Model,
    Results,
    load_document,
)
from megatron.early_exit.evaluation.report.schema import Calibration, Speed


@dataclass(frozen=True)
class Evaluated:
    """A model with all documents that are of it, in the order of the commands."""

    name: str
    documents: tuple[AnyDocument, ...]

    def of_kind(self, *kinds: str) -> list[AnyDocument]:
        return [document for document in self.documents if document.kind in kinds]

    def with_results(self, results: type[Results]) -> list[Document[Results]]:
        return [document for document in self.documents if isinstance(document.results, results)]

    @property
    def model(self) -> Model:
        return self.documents[0].model


def evaluated_models(loads: Sequence[str], results: Sequence[str]) -> list[Evaluated]:
    """The models of all documents, in the order in which they are first named.

    loads: folders of checkpoints; results: documents, or folders of them; each may be NAME=PATH. Raises ValueError if
    documents are broken, if there are none, if models are mixed without names or a name stands for several, OSError if
    a file cannot be read."""
    places = [
        *((*split_name(word), _files_of_checkpoint) for word in loads),
        *((*split_name(word), _files) for word in results),
    ]
    groups: dict[str | None, list[AnyDocument]] = {}
    for name, place, files_of in places:
        groups.setdefault(name, []).extend(load_document(path) for path in files_of(Path(place)))
    for name, documents in groups.items():
        _check_one_model(name, documents)
    by_kind = list(KINDS).index
    return [
        Evaluated(name or _name_of(documents[0].model), tuple(sorted(documents, key=lambda one: by_kind(one.kind))))
        for name, documents in groups.items()
    ]


def split_name(word: str) -> tuple[str | None, str]:
    """Name and path of `NAME=PATH`; a path that holds the sign and exists is a path."""
    name, sign, path = word.partition("=")
    is_named = sign and name and path and "/" not in name and not Path(word).exists()
    return (name, path) if is_named else (None, word)


def results_folder(load: str) -> Path:
    """Where the results of the last checkpoint in `load` lie. Raises ValueError if there is no checkpoint."""
    return checkpoint_folder(load) / RESULTS_FOLDER


def _files_of_checkpoint(load: Path) -> list[Path]:
    folder = results_folder(str(load))
    if not folder.is_dir():
        raise ValueError(f"{load} has no results yet: there is no {folder}; run evaluate.py exits --load {load} first")
    return _files(folder)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.json"))
    if not files:
        raise ValueError(f"{path} holds no result documents (*.json); see evaluate.py --help for the commands")
    return files


def _name_of(model: Model) -> str:
    """The last part of the checkpoint's path that says something."""
    parts = [part for part in Path(model.checkpoint).parts if part not in ("checkpoints", "tuned", "/", "..")]
    return parts[-1] if parts else model.checkpoint


def _check_one_model(name: str | None, documents: Sequence[AnyDocument]) -> None:
    first = documents[0]
    for other in documents[1:]:
        if _is_same_model(first.model, other.model):
            continue
        found = f"{first.path} is of {_in_words(first.model)}, {other.path} of {_in_words(other.model)}"
        advice = "give each model a name, NAME=PATH" if name is None else f"but both are named {name!r}"
        raise ValueError(f"documents of different models: {found}; {advice}")


def _is_same_model(one: Model, other: Model) -> bool:
    """The same weights, or another iteration of the same training (about which the page warns)."""
    if one.fingerprint and one.fingerprint == other.fingerprint:
        return True
    facts = lambda model: (model.checkpoint, model.num_layers, model.exit_layers, model.tokenizer)
    return bool(facts(one) == facts(other))


def _in_words(model: Model) -> str:
    exits = ", ".join(map(str, model.exit_layers)) or "none"
    fingerprint = f", fingerprint {model.fingerprint[:12]}" if model.fingerprint else ""
    return f"{model.checkpoint} ({model.num_layers} layers, exits {exits}{fingerprint})"


def warnings(model: Evaluated) -> list[str]:
    """What makes the documents of a model hard to compare with each other, one sentence each."""
    documents = model.documents
    return [
        *_differences(documents), *_changed_code(documents), *_busy_machine(documents), *_other_certificates(model)
    ]  # fmt: skip


_MUST_BE_EQUAL: dict[str, Callable[[AnyDocument], Any]] = {
    "commits of the code": lambda one: one.commit and one.commit[:12],
    "iterations of the checkpoint": lambda one: one.model.iteration,
    "weights or settings of the checkpoint (fingerprints)": lambda one: (
        one.model.fingerprint and one.model.fingerprint[:12]
    ),
    "tokenizers": lambda one: one.model.tokenizer and one.model.tokenizer[:12],
    "number types": lambda one: one.model.dtype,
    "quantisations": lambda one: one.model.quantize or "none",
    "numbers of threads": lambda one: one.model.threads,
    "processors": lambda one: one.machine.cpu,
    "GPUs": lambda one: ", ".join(one.machine.gpus) or "none",
}


def _differences(documents: Iterable[AnyDocument]) -> list[str]:
    found = []
    for what, of in _MUST_BE_EQUAL.items():
        names: dict[str, list[str]] = {}
        for document in documents:
            names.setdefault(str(of(document) or "unknown"), []).append(document.path.name)
        if len(names) > 1:
            said = "; ".join(f"{value}: {', '.join(files)}" for value, files in names.items())
            found.append(f"The documents come from different {what} ({said}).")
    return found


def _changed_code(documents: Iterable[AnyDocument]) -> list[str]:
    files = [document.path.name for document in documents if (document.commit or "").endswith("+changes")]
    return [f"The code had changes that are in no commit: {', '.join(files)}."] if files else []


def _busy_machine(documents: Iterable[AnyDocument]) -> list[str]:
    """Speeds are suspect if others computed as well."""
    return [
        f"The machine was busy when {document.path.name} was begun: a load of "
        f"{document.machine.load_average_1min:.1f} on {document.machine.cpu_cores} cores. Its speeds may be off."
        for document in documents
        if document.kind in ("sweep", "benchmark")
        and (document.machine.load_average_1min or 0) > 0.5 * (document.machine.cpu_cores or 1)
    ]


def _other_certificates(model: Evaluated) -> list[str]:
    """Certified ways whose thresholds are not those of the cards."""
    cards = [card for document in model.with_results(Calibration) for card in document.results.certificates]
    thresholds = {card.level: card.thresholds for card in cards if card.status == "certified"}
    if not cards:
        return []
    found = []
    for document in model.with_results(Speed):
        rows = document.results.rows
        others = {one.name for one in rows if one.level is not None and one.thresholds != thresholds.get(one.level)}
        if others:
            found.append(
                f"{', '.join(sorted(others))} in {document.path.name}: measured with other thresholds than the "
                "certificates have here. Run it again."
            )
    return found
