"""The parameters of a model that is trained, as core saves and loads them, and whether a checkpoint holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron.early_exit.checkpoint.safe_pickle import read_metadata
from megatron.early_exit.checkpoint.start import check_holds_model, tensor_mismatches
from megatron.early_exit.checkpoint.writing import CONTENT_METADATA
from megatron.early_exit.config.description import MismatchError
from megatron.early_exit.model.build import Model
from megatron.early_exit.model.key_names import stored_key

_OPTIMIZER = "optimizer."
"""Begins the names of the optimizer's tensors in a checkpoint."""


def sharded_weights(model: Model) -> dict[str, dict[str, Any]]:
    """This rank's parameters for core to save or load, with their places in the whole model."""
    return {
        f"model{index}": chunk.sharded_state_dict(metadata=dict(CONTENT_METADATA))
        for index, chunk in enumerate(model.chunks)
    }


def check_tensors(sharded: dict[str, Any], folder: Path) -> None:
    """Raise MismatchError on all ranks if the checkpoint lacks what some rank wants, or has other shapes."""
    metadata = read_metadata(folder)
    wanted: dict[str, tuple[int, ...] | None] = {}
    for value in nested_values(sharded):
        for tensor in nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]:
            if isinstance(tensor, ShardedTensor):
                key = stored_key(tensor.key, metadata.state_dict_metadata)
                wanted[key] = None if tensor.allow_shape_mismatch else tuple(tensor.global_shape)
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, wanted)
    wanted = {name: shape for part in everywhere for name, shape in part.items()}
    of_model = {name: shape for name, shape in wanted.items() if not name.startswith(_OPTIMIZER)}
    check_holds_model(folder, of_model, metadata)
    if clauses := tensor_mismatches(wanted, metadata):
        raise MismatchError(
            f"the optimizer state of {folder} is that of another model or optimizer: {'; '.join(clauses)}. Go on "
            "without it with --no-load-optim."
        )
