"""Models of `transformers` in a local folder: read tensor by tensor, and written as any such model is.

A folder holds `config.json`, `model.safetensors` or its shards with an index, and the tokenizer; or one GGUF file,
which `transformers` reads as a whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megatron.early_exit.checkpoint.accounting import (
    check_settings,
    check_tensors,
    resolve_tied_output,
    with_base_prefix,
)
from megatron.early_exit.checkpoint.exits_in_transformers import exits_for_transformers, read_exits, write_exit_class
from megatron.early_exit.checkpoint.families import family_of, standard_model_type
from megatron.early_exit.checkpoint.family import Family
from megatron.early_exit.checkpoint.gguf import complete_gguf_config, read_gguf
from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors, with_rows, without_exits
from megatron.early_exit.checkpoint.vocabulary import pad_vocabulary, vocabulary_rows
from megatron.early_exit.checkpoint.weight_files import INDEX, WEIGHTS, read_json, read_weight_files
from megatron.early_exit.checkpoint.writing import Progress
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.data.tokenizer_files import present_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_MAX_SHARD_BYTES = 5 * 10**9


class Source(NamedTuple):
    """A model of transformers, and what is to be said of it."""

    model: ModelConfig
    exits: ExitConfig
    """Those that `write_hugging_face` wrote there; else none."""
    tensors: Tensors
    """Our parameters, vocabulary not padded."""
    config: PretrainedConfig
    """Theirs, as the weights bear it out."""
    theirs: Tensors
    """Their parameters of the plain model."""
    notes: list[str]
    """What is in the folder and has no effect here."""
    folder: Path
    gguf_file: str | None
    """Name of the file in the folder, if it is one."""


def read_hugging_face(path: Path, max_position_embeddings: int | None = None) -> Source:
    """The model in a folder of transformers or in a GGUF file. Every tensor and every setting is accounted for.

    max_position_embeddings: shorter sequences than the model takes. Raises ValueError or OSError with what is wrong."""
    path, gguf_file = _split_gguf(path)
    raw = {} if gguf_file else _raw_config(path)
    config = _read_config(path, gguf_file)
    family = family_of(config.model_type)
    if gguf_file:
        complete_gguf_config(path / gguf_file, config)
        theirs, notes = read_gguf(path / gguf_file, config), []
    else:
        notes = check_settings(raw, config, family)
        theirs, more = read_weight_files(path)
        notes += more
    theirs, more = resolve_tied_output(with_base_prefix(theirs, family), config, family)
    notes += more + check_tensors(theirs, config, family)
    length = _shorter(max_position_embeddings, config.max_position_embeddings)
    shapes = family.shapes(config)
    of_positions = [name for name, shape in shapes.items() if shape[0] == "n_positions"]
    theirs |= {name: with_rows(theirs[name], length) for name in of_positions}
    model = family.model_config(config, length)
    ours = family.ours(theirs, model)
    exits = ExitConfig()
    if raw.get("early_exits"):
        exits, of_exits = read_exits(path, raw["early_exits"], theirs, ours, model, family)
        ours |= of_exits
    dtypes = {tensor.dtype for tensor in ours.values()}
    if len(dtypes) > 1:
        ours = {name: tensor.to(torch.float32) for name, tensor in ours.items()}
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        notes.append(f"the weights have several types ({names}), and become fp32 without --dtype")
    plain = {name: theirs[name] for name in shapes}
    return Source(model, exits, ours, config, plain, notes, path, gguf_file)


def from_transformers(theirs: PreTrainedModel, vocab_rows: int) -> tuple[ModelConfig, Tensors]:
    """(our settings, our parameters) of a model that is in memory already. vocab_rows: of the embedding, padded."""
    config, family = theirs.config, family_of(theirs.config.model_type)
    tensors = {name: LazyTensor.of(tensor) for name, tensor in theirs.state_dict().items()}
    tensors, _ = resolve_tied_output(tensors, config, family)
    check_tensors(tensors, config, family)
    model = family.model_config(config, config.max_position_embeddings)
    ours = family.ours(tensors, model)
    return replace(model, padded_vocab_size=vocab_rows), pad_vocabulary(ours, vocab_rows)


def _shorter(wanted: int | None, limit: int) -> int:
    if wanted is not None and not 1 <= wanted <= limit:
        raise ValueError(f"--max-position-embeddings {wanted}: the model takes sequences of 1 to {limit} tokens")
    return wanted or limit


def _split_gguf(path: Path) -> tuple[Path, str | None]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder with config.json, or a GGUF file")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is neither a folder nor a GGUF file")
        return path.parent, path.name
    if not (path / "config.json").is_file():
        candidates = sorted(path.glob("*.gguf"))
        if len(candidates) == 1:
            return path, candidates[0].name
        raise FileNotFoundError(f"{path} holds no config.json" + (", and several GGUF files" if candidates else ""))
    return path, None


def _raw_config(path: Path) -> dict[str, Any]:
    raw = read_json(path / "config.json")
    family_of(str(raw.get("model_type")))  # names what is supported, before transformers says that it does not know it
    return raw


def _read_config(path: Path, gguf_file: str | None) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, **({"gguf_file": gguf_file} if gguf_file else {}))
    except Exception as error:  # of many kinds, KeyError among them
        words = " ".join(str(error).split())
        raise ValueError(f"transformers cannot read the settings of the model in {path}: {words}") from error


def write_hugging_face(
    output: Path,
    model: ModelConfig,
    tensors: Tensors,
    *,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    special_ids: dict[str, int | None] | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    exits: ExitConfig | None = None,
    check: Callable[[Path], None] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> str:
    """Write a model as a standard one of `transformers`; returns its model type.

    tensors: ours. tokenizer: folder with a tokenizer, and with the config.json that the model came with, if it did: its
    model type and special ids are kept. vocab_size: ids of the model; default: that of this config.json, else all rows.
    special_ids: eos_token_id and so on, of a model that did not come from there.
    exits: write them as well, with a class that generates with them (`remote_code/`).
    check: raises what is wrong with the folder that it is given, before that gets its name.
    Raises ValueError if no architecture of `transformers` is like this, FileExistsError if `output` holds something."""
    if output.exists() and any(output.iterdir()) and not force:
        raise FileExistsError(f"{output} is not empty; choose another folder, or --force to replace it")
    source = {**(special_ids or {}), **_source_config(tokenizer)}
    if exits is not None:
        _check_exits(exits)
    family, model_type = _target_family(model, source)
    rows = vocab_size or source.get("vocab_size") or vocabulary_rows(tensors)
    tensors = pad_vocabulary(tensors, rows)
    theirs = family.theirs(without_exits(tensors), model)
    if exits is not None:
        theirs |= exits_for_transformers(tensors, model, exits, family)
    with _partial(output) as partial:
        dtype = next(iter(theirs.values())).dtype
        _write_config(partial, family, model_type, model, source, rows, dtype)
        _write_safetensors(partial, theirs, max_shard_bytes, progress)
        if exits is not None:
            write_exit_class(partial, exits, family)
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, partial)
        if check is not None:
            check(partial)
    return model_type


@contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """A folder that gets the name `output` when all is written."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)


def _copy_tokenizer(tokenizer: Path, target: Path) -> None:
    """With what says how it generates, but without the model's config.json."""
    for file in present_files(tokenizer):
        if file.name != "config.json":
            copied = target / file.relative_to(tokenizer)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copied)


def _source_config(tokenizer: Path | None) -> dict[str, Any]:
    file = None if tokenizer is None else tokenizer / "config.json"
    return {} if file is None or not file.is_file() else json.loads(file.read_text(encoding="utf-8"))


def _target_family(model: ModelConfig, source: dict[str, Any]) -> tuple[Family, str]:
    standard, name = standard_model_type(model), source.get("model_type")
    if name is not None and {standard, name} <= {"llama", "mistral"}:  # they have one architecture
        return family_of(name), name
    return family_of(standard), standard


def _write_config(
    folder: Path,
    family: Family,
    model_type: str,
    model: ModelConfig,
    source: dict[str, Any],
    vocab_size: int,
    dtype: torch.dtype,
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    kept = {name: source[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in source}
    config = AutoConfig.for_model(
        model_type,
        **family.settings(model),
        **kept,
        vocab_size=vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
    )
    if model_type == "mistral":
        config.sliding_window = None
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.dtype = dtype
    config.save_pretrained(folder)


def _write_safetensors(folder: Path, tensors: Tensors, max_shard_bytes: int, progress: Progress | None) -> None:
    """Shards of whole tensors, each at most `max_shard_bytes` unless one tensor is larger; one shard in memory."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.num_bytes
    total, written = sum(tensor.num_bytes for tensor in tensors.values()), 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        state = {name: tensors[name].read().to(tensors[name].dtype).contiguous().clone() for name in names}
        save_file(state, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        written += sum(tensors[name].num_bytes for name in names)
        if progress is not None:
            progress(written, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _check_exits(exits: ExitConfig) -> None:
    if not exits.num_exits:
        raise ValueError("the model has no exits to write (--with-exits); leave --with-exits out, or add-exits first")
