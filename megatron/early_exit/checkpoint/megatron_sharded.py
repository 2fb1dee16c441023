"""Megatron-LM's and Megatron-Bridge's checkpoints of the format `torch_dist`, read layer by layer.

Layers of one kind are stored one by one (`decoder.layers.3.mlp...`), or all in one tensor with a first dimension of
layers (`decoder.layers.mlp...`), which is what Megatron-LM does where nothing else is said.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron.early_exit.checkpoint.megatron_settings import bridge_settings, load_file
from megatron.early_exit.checkpoint.safe_pickle import SafeReader, read_metadata
from megatron.early_exit.checkpoint.store import reading
from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors, concatenated
from megatron.early_exit.config.checkpoint_files import COMMON_FILE
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.yaml_files import read_yaml
from megatron.early_exit.model.key_names import name_of

_BRIDGE_FILE = "run_config.yaml"
_COMMON_OBJECT = "common_state/shard_0_1"  # where core 0.19 keeps it
_PARAMETERS = ("embedding.", "decoder.", "output_layer.")

# What else lies beside the parameters in torch_dist.
_NOT_PARAMETERS = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler", "train_state")


def sharded_settings(folder: Path) -> argparse.Namespace:
    """Megatron-LM's arguments, or Megatron-Bridge's in these words. Raises FileNotFoundError if neither is there."""
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


def sharded_tensors(folder: Path, model: ModelConfig) -> Tensors:
    """All parameters under our names. Raises ValueError for those of something else than a GPT."""
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
