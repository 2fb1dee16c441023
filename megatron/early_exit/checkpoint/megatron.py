"""Checkpoints of Megatron-LM and Megatron-Bridge: a plain GPT or Llama, to our parameters and back.

    LOAD/latest_checkpointed_iteration.txt                   a number, or the word release
    LOAD/iter_0000100/ or LOAD/release/                      one checkpoint, in one of two formats:
        .metadata, __0_0.distcp, ...; common.pt              torch_dist; Megatron-LM's arguments are in common.pt,
        run_config.yaml                                      Megatron-Bridge's settings in this file
        mp_rank_00/ or mp_rank_00_001/model_optim_rng.pt     torch: one file of each TP or (TP, PP) rank

Layers of one kind are stored one by one in `torch_dist` (`decoder.layers.3.mlp...`), or all in one tensor with a first
dimension of layers (`decoder.layers.mlp...`), which is what Megatron-LM does where nothing else is said. Both are read
layer by layer; the second is written, which all versions read.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron.early_exit.checkpoint.folders import publish_as
from megatron.early_exit.checkpoint.legacy import merge_gate_and_up
from megatron.early_exit.checkpoint.megatron_settings import arguments, bridge_settings, load_file, model_config
from megatron.early_exit.checkpoint.parameters import check_parameters
from megatron.early_exit.checkpoint.safe_pickle import SafeReader, read_metadata
from megatron.early_exit.checkpoint.store import (
    Progress,
    reading,
    write_common,
    writing,
    written_whole,
)
from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors, combined, concatenated
from megatron.early_exit.config.checkpoint_files import COMMON_FILE, METADATA_FILE, RELEASE, chosen_folder, names_latest
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.formats import is_own
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.yaml_files import read_yaml
from megatron.early_exit.model.key_names import key_of, name_of

_RANK_FILE = "model_optim_rng.pt"
_BRIDGE_FILE = "run_config.yaml"
_COMMON_OBJECT = "common_state/shard_0_1"  # where core 0.19 keeps it
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_PARAMETERS = ("embedding.", "decoder.", "output_layer.")
# What else lies beside the parameters in torch_dist.
_NOT_PARAMETERS = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler", "train_state")

# How parameters are split over tensor-parallel ranks, by the end of their names; all others are the same on each rank.
_SPLIT_ROWS = (
    "word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight",
    "linear_fc1.bias",
)  # fmt: skip
_SPLIT_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


class MegatronCheckpoint(NamedTuple):
    """A model of Megatron-LM's or Megatron-Bridge's."""

    model: ModelConfig
    tensors: Tensors
    """Under our names."""
    settings: argparse.Namespace
    """All arguments that it was trained with, in Megatron-LM's words."""


def is_megatron(folder: Path) -> bool:
    """Whether `folder` is one checkpoint of Megatron-LM or Megatron-Bridge."""
    if any(folder.glob(f"mp_rank_*/{_RANK_FILE}")):
        return True
    return (folder / METADATA_FILE).is_file() and not is_own(folder)


def find_megatron(load: Path, iteration: int | None = None) -> Path:
    """Folder of the checkpoint to read: the given iteration, else the last. Raises FileNotFoundError with what is
    missing, ValueError for a checkpoint of ours."""
    if is_megatron(load):
        return load
    folder = chosen_folder(load, iteration)
    if is_own(folder):
        raise ValueError(f"{folder} is a checkpoint of this project already")
    if not is_megatron(folder):
        raise FileNotFoundError(
            f"{folder} holds no checkpoint of Megatron-LM ({METADATA_FILE} or mp_rank_*/{_RANK_FILE})"
        )
    return folder


def read_megatron(folder: Path) -> MegatronCheckpoint:
    """One checkpoint. Its parameters are read when asked for.

    Raises OSError for files that are missing or damaged, ValueError for settings that our model does not know, and if
    the parameters are not those that the settings say."""
    if (folder / METADATA_FILE).is_file():
        settings = _sharded_settings(folder)
        model = model_config(settings)
        tensors = _sharded_tensors(folder, model)
    else:
        ranks = _read_ranks(folder)
        settings = ranks[0][0]["args"]
        model = model_config(settings)
        tensors = _tensors_of_ranks(ranks, model)
    if _EMBEDDING not in tensors:
        raise ValueError(f"{folder} has no {_EMBEDDING}")
    model = replace(model, padded_vocab_size=tensors[_EMBEDDING].shape[0])
    check_parameters(tensors, model, ExitConfig())
    return MegatronCheckpoint(model, tensors, settings)


# torch_dist


def _sharded_settings(folder: Path) -> argparse.Namespace:
    args: argparse.Namespace | None = _common_state(folder).get("args")
    if args is not None:
        return args
    if (folder / _BRIDGE_FILE).is_file():
        return bridge_settings(read_yaml(folder / _BRIDGE_FILE))
    raise FileNotFoundError(
        f"{folder} does not say what model it holds: neither are Megatron-LM's arguments in {COMMON_FILE}, nor is "
        f"there Megatron-Bridge's {_BRIDGE_FILE}"
    )


def _common_state(folder: Path) -> dict[str, Any]:
    """What is the same on all ranks."""
    common = folder / COMMON_FILE
    if common.is_file():
        state: dict[str, Any] = load_file(common)
        return state
    for index, info in read_metadata(folder).storage_data.items():
        if index.fqn == _COMMON_OBJECT:
            with (folder / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                (state,) = load_file(folder / info.relative_path, file.read(info.length))
            return state
    return {}


def _sharded_tensors(folder: Path, model: ModelConfig) -> Tensors:
    reader = SafeReader(folder)
    tensors: Tensors = {}
    unknown = []
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata) or "_extra_state" in key or key.startswith(_NOT_PARAMETERS):
            continue
        if not key.startswith(_PARAMETERS):
            unknown.append(key)
        elif match := re.match(r"decoder\.layers\.(?!\d+\.)", key):
            tensors |= _layers_of(reader, key, match[0], stored, model)
        else:
            tensors[name_of(key)] = _part_of(reader, key, tuple(stored.size), stored)
    if unknown:
        raise ValueError(f"{folder} holds tensors of something else than a GPT: {', '.join(unknown[:5])}")
    return _with_gate_and_up(tensors)


def _layers_of(reader: SafeReader, key: str, prefix: str, stored: TensorStorageMetadata, model: ModelConfig) -> Tensors:
    """The parameters of all layers, one by one, that are stored in one tensor."""
    num_layers, *shape = stored.size
    if num_layers != model.num_layers:
        raise ValueError(f"{key} has {num_layers} layers, by the settings {model.num_layers}")
    names = [name_of(f"{prefix}{index}.{key.removeprefix(prefix)}") for index in range(num_layers)]
    return {name: _part_of(reader, key, tuple(shape), stored, layer) for layer, name in enumerate(names)}


def _with_gate_and_up(tensors: Tensors) -> Tensors:
    """Where gate and up of an MLP are stored as two tensors (core's `singleton_local_shards`): in one."""
    for gate in [name for name in tensors if name.endswith(("linear_fc1.weight_w", "linear_fc1.bias_w"))]:
        name = gate.removesuffix("_w")
        if f"{name}_v" in tensors:
            tensors[name] = concatenated([tensors.pop(gate), tensors.pop(f"{name}_v")])
    return tensors


class _PartPlanner(DefaultLoadPlanner):
    """Reads a part of one tensor: the whole, or one layer of those that are stored in one tensor."""

    def __init__(
        self, key: str, stored: TensorStorageMetadata, part: ChunkStorageMetadata, target: torch.Tensor
    ) -> None:
        super().__init__()
        self._key, self._stored, self._part, self._target = key, stored, part, target

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(create_read_items_for_chunk_list(self._key, self._stored, [self._part]))

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._target


def _part_of(
    reader: SafeReader, key: str, shape: tuple[int, ...], stored: TensorStorageMetadata, layer: int | None = None
) -> LazyTensor:
    """layer: which one to read of a tensor of all layers, counted from 0."""
    leading = () if layer is None else (layer,)
    part = ChunkStorageMetadata(
        offsets=torch.Size([*leading, *(0 for _ in shape)]), sizes=torch.Size([*(1 for _ in leading), *shape])
    )
    dtype = stored.properties.dtype

    def read() -> torch.Tensor:
        target = torch.empty(part.sizes, dtype=dtype)
        with reading(reader, key):
            dcp.load(
                {key: target}, storage_reader=reader, planner=_PartPlanner(key, stored, part, target), no_dist=True
            )
        return target.view(shape)

    return LazyTensor(shape, dtype, read)


# torch: one file of each rank


def _read_ranks(folder: Path) -> list[list[dict[str, Any]]]:
    """Contents of all files, by pipeline stage and tensor-parallel rank."""
    found: dict[tuple[int, int], Path] = {}
    for path in folder.iterdir():
        if match := re.fullmatch(r"mp_rank_(\d{2,})(?:_(\d{3,}))?", path.name):
            found[int(match[2] or 0), int(match[1])] = path / _RANK_FILE
        elif path.name.startswith("mp_rank_"):
            raise ValueError(
                f"{path} has more ranks in its name than those of tensors and stages; experts are not supported"
            )
    first = load_file(found[min(found)])
    if "args" not in first:
        raise ValueError(f"{found[min(found)]} holds no arguments of Megatron-LM")
    sizes = [getattr(first["args"], f"{kind}_model_parallel_size", 1) or 1 for kind in ("pipeline", "tensor")]
    expected = [(pp, tp) for pp in range(sizes[0]) for tp in range(sizes[1])]
    if sorted(found) != expected:
        raise FileNotFoundError(
            f"{folder} was saved by {sizes[1]} tensor-parallel ranks in {sizes[0]} pipeline stages; found are the "
            f"files of (stage, rank) {sorted(found)}"
        )
    return [[load_file(found[pp, tp]) for tp in range(sizes[1])] for pp in range(sizes[0])]


def _tensors_of_ranks(ranks: list[list[dict[str, Any]]], model: ModelConfig) -> Tensors:
    tensors: Tensors = {}
    copies: list[LazyTensor] = []  # of the embedding, which the last stage has as its output layer
    offset = 0
    num_chunks = max((int(key[5:]) + 1 for key in ranks[0][0] if re.fullmatch(r"model\d+", key)), default=0)
    for chunk in range(num_chunks) if num_chunks else [""]:
        for stage in ranks:
            of_stage = _tensors_of_stage([rank[f"model{chunk}"] for rank in stage], model)
            layers = {int(m[1]) for name in of_stage if (m := re.match(r"decoder\.layers\.(\d+)\.", name))}
            move = lambda name, offset=offset: re.sub(
                r"^(decoder\.layers\.)(\d+)", lambda match: f"{match[1]}{int(match[2]) + offset}", name
            )
            for name, tensor in of_stage.items():
                if name == _OUTPUT and not model.untie_embeddings_and_output_weights:
                    copies.append(tensor)
                else:
                    tensors[move(name)] = tensor
            offset += len(layers)
    for copy in copies:
        if _EMBEDDING in tensors and not torch.equal(copy.read(), tensors[_EMBEDDING].read()):
            raise ValueError(f"the settings say that {_OUTPUT} is the embedding, but it has other values")
    return tensors


def _tensors_of_stage(ranks: list[dict[str, Any]], model: ModelConfig) -> Tensors:
    """The parameters of a stage of all of its tensor-parallel ranks, with layers counted from the stage's first."""
    if "language_model" in ranks[0]:
        raise ValueError(
            "the checkpoint was written by a version of Megatron-LM before its core, whose models from-legacy reads"
        )
    names = [name for name, value in ranks[0].items() if isinstance(value, torch.Tensor) and "_extra_state" not in name]
    tensors = {}
    for key in names:
        parts = [LazyTensor.of(rank[key]) for rank in ranks]
        name = name_of(key)
        if len(parts) == 1 or not name.endswith((*_SPLIT_ROWS, *_SPLIT_COLUMNS)):
            tensors[name] = parts[0]
        elif name.endswith(_SPLIT_COLUMNS):
            shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
            tensors[name] = combined(parts, shape, lambda *tensors: torch.cat(tensors, 1))
        elif model.swiglu and "linear_fc1" in name:
            whole = concatenated(parts)
            tensors[name] = combined(parts, whole.shape, merge_gate_and_up)
        else:
            tensors[name] = concatenated(parts)
    return tensors


# Writing


class _Piece(NamedTuple):
    """What is written at once: a tensor, or one layer of a tensor of all layers."""

    key: str
    layer: int | None
    num_layers: int
    tensor: LazyTensor

    @property
    def offset(self) -> torch.Size:
        leading = () if self.layer is None else (self.layer,)
        return torch.Size([*leading, *(0 for _ in self.tensor.shape)])

    @property
    def sizes(self) -> torch.Size:
        return torch.Size([*(() if self.layer is None else (1,)), *self.tensor.shape])

    @property
    def global_sizes(self) -> torch.Size:
        return torch.Size([*(() if self.layer is None else (self.num_layers,)), *self.tensor.shape])

    def write_item(self) -> WriteItem:
        chunk = ChunkStorageMetadata(offsets=self.offset, sizes=self.sizes)
        data = TensorWriteData(
            chunk=chunk, properties=TensorProperties(dtype=self.tensor.dtype), size=self.global_sizes
        )
        return WriteItem(MetadataIndex(self.key, self.offset), WriteItemType.SHARD, tensor_data=data)


class _PiecesPlanner(DefaultSavePlanner):
    """Writes tensors of all layers layer by layer, each read when it is its turn."""

    def __init__(self, pieces: Iterable[_Piece], empty_objects: Iterable[str], progress: Progress | None) -> None:
        super().__init__(flatten_state_dict=False)
        self._pieces = {MetadataIndex(piece.key, piece.offset): piece for piece in pieces}
        self._empty_objects, self._progress = list(empty_objects), progress
        self._total, self._written = sum(piece.tensor.num_bytes for piece in self._pieces.values()), 0

    def create_local_plan(self) -> SavePlan:
        items = [piece.write_item() for piece in self._pieces.values()]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._empty_objects]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([None], buffer)
            return buffer
        piece = self._pieces[write_item.index]
        value = piece.tensor.read().to(piece.tensor.dtype).contiguous().view(piece.sizes)
        self._written += piece.tensor.num_bytes
        if self._progress is not None:
            self._progress(self._written, self._total)
        return value


def write_megatron(
    save: Path,
    description: ModelDescription,
    tensors: Tensors,
    *,
    check: Callable[[Path], None] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the backbone of a model into the folder `save`, as Megatron-LM's release. Returns the checkpoint's folder.

    check: raises what is wrong with the checkpoint in the folder that it is given, before it gets its name.
    Raises FileExistsError if there is a checkpoint already and not `force`, OSError if it cannot be written, ValueError
    if `tensors` are not those of the model without exits."""
    check_target(save, force)
    model = description.model
    check_parameters(tensors, model, ExitConfig())
    pieces = [_piece(name, tensor, model.num_layers) for name, tensor in tensors.items()]
    partial = save / "release.partial"
    with written_whole(partial, sum(tensor.num_bytes for tensor in tensors.values())):
        planner = _PiecesPlanner(pieces, _states_beside_parameters(model), progress)
        with writing(partial):
            dcp.save({}, storage_writer=FileSystemWriter(partial, thread_count=1), planner=planner, no_dist=True)
        dtype = next(iter(tensors.values())).dtype
        common = {
            "args": arguments(model, description.tokenizer, dtype),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False},
        }
        write_common(common, partial)
        if check is not None:
            check(partial)
        return publish_as(partial, save / RELEASE, RELEASE)


def check_target(save: Path, force: bool) -> None:
    """Raise FileExistsError if `save` holds a checkpoint that must not be replaced."""
    if save.is_file():
        raise FileExistsError(f"{save} is a file; give a folder")
    if any(save.glob("iter_*")):
        raise FileExistsError(f"{save} holds checkpoints of a training run, which are never replaced")
    if names_latest(save) and not force:
        raise FileExistsError(f"{save} already holds a checkpoint; choose another folder, or --force to replace it")


def _piece(name: str, tensor: LazyTensor, num_layers: int) -> _Piece:
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    if match is None:
        return _Piece(key_of(name), None, num_layers, tensor)
    return _Piece(key_of(f"decoder.layers.{name[match.end() :]}"), int(match[1]), num_layers, tensor)


def _states_beside_parameters(model: ModelConfig) -> list[str]:
    """Keys of the objects, here empty, that layers of core's and of Transformer Engine's ask for."""
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"]
    modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
    if model.qk_layernorm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    keys = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{model.num_layers}"
        for module in modules
        for layer in range(model.num_layers)
    ]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]
