"""Megatron-LM's checkpoints of the format `torch`: one file of each tensor-parallel rank and pipeline stage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from megatron.early_exit.checkpoint.legacy_files import RANK_FILE
from megatron.early_exit.checkpoint.megatron_settings import load_file
from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors, combined, concatenated, merge_gate_and_up
from megatron.early_exit.checkpoint.vocabulary import OUTPUT_WEIGHT, WORD_EMBEDDING
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.model.key_names import name_of

# How parameters are split over tensor-parallel ranks, by the end of their names; all others are the same on each rank.
_SPLIT_ROWS = (
    "word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight",
    "linear_fc1.bias",
)  # fmt: skip
_SPLIT_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def read_megatron_ranks(folder: Path) -> list[list[dict[str, Any]]]:
    """Contents of all files, by pipeline stage and tensor-parallel rank."""
    found: dict[tuple[int, int], Path] = {}
    for path in folder.iterdir():
        if match := re.fullmatch(r"mp_rank_(\d{2,})(?:_(\d{3,}))?", path.name):
            found[int(match[2] or 0), int(match[1])] = path / RANK_FILE
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


def tensors_of_ranks(ranks: list[list[dict[str, Any]]], model: ModelConfig) -> Tensors:
    """All parameters under our names, of what `read_megatron_ranks` read."""
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
                if name == OUTPUT_WEIGHT and not model.untie_embeddings_and_output_weights:
                    copies.append(tensor)
                else:
                    tensors[move(name)] = tensor
            offset += len(layers)
    for copy in copies:
        if WORD_EMBEDDING in tensors and not torch.equal(copy.read(), tensors[WORD_EMBEDDING].read()):
            raise ValueError(f"the settings say that {OUTPUT_WEIGHT} is the embedding, but it has other values")
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
