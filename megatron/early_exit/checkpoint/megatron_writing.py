"""Writes a plain model as Megatron-LM's release, in `torch_dist`.

Layers of one kind are written in one tensor with a first dimension of layers, which all versions of Megatron-LM read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron.early_exit.checkpoint.folders import publish_as
from megatron.early_exit.checkpoint.megatron_settings import arguments
from megatron.early_exit.checkpoint.parameters import check_parameters
from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors
from megatron.early_exit.checkpoint.writing import Progress, write_common, writing, written_whole
from megatron.early_exit.config.checkpoint_files import RELEASE, names_latest
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.model.key_names import key_of


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
