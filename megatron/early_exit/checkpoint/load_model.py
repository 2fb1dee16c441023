"""Loads the weights of a checkpoint, re-sharded, into a model; and its whole model for inference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron.early_exit.checkpoint.core_loading import load_sharded
from megatron.early_exit.checkpoint.safe_pickle import read_metadata
from megatron.early_exit.checkpoint.start import check_is_whole, reading, tensor_mismatches
from megatron.early_exit.checkpoint.store import CONTENT_METADATA
from megatron.early_exit.config.description import MismatchError, ModelDescription
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.config.serialize import checkpoint_folder, read_description
from megatron.early_exit.config.settings import BuildConfig
from megatron.early_exit.data.tokenizer import Tokenizer, build_tokenizer
from megatron.early_exit.model.build import Model, build_model
from megatron.early_exit.model.key_names import stored_key
from megatron.early_exit.platform.distributed import initialize_distributed, initialize_model_parallel

_OPTIMIZER = "optimizer."
"""Begins the names of the optimizer's tensors in a checkpoint."""


def load_model_for_inference(
    load: str, load_iteration: int | None = None, tensor_parallel_size: int = 1
) -> tuple[ModelDescription, Model, Tokenizer]:
    """The model of a checkpoint in evaluation mode, all layers on one pipeline stage.

    All tensor-parallel ranks call it together. Starts the process groups if need be. Raises ConfigError if
    there is no checkpoint, OSError if it cannot be read."""
    folder = checkpoint_folder(load, load_iteration)
    description = read_description(folder)
    # Whatever modules trained it: decoding has its own, and takes the weights from these.
    config = replace(description.model, transformer_impl="local")
    parallel = ParallelConfig(tensor_model_parallel_size=tensor_parallel_size)
    initialize_distributed()
    initialize_model_parallel(parallel, config.num_layers, seed=0)
    build = BuildConfig(config, description.exits, description.dtype, parallel)
    model = build_model(build, description.padded_vocab_size, wrap_with_ddp=False)
    load_weights(folder, model)
    model.eval()
    return description, model, build_tokenizer(description.tokenizer)


def load_weights(folder: Path, model: Model) -> None:
    """Load the parameters of the checkpoint in `folder`, whose architecture `model` has. Raises OSError."""
    check_is_whole(folder)
    sharded = sharded_weights(model)
    with reading(folder):
        check_tensors(sharded, folder)
        loaded = load_sharded(sharded, folder)
    for index, chunk in enumerate(model.chunks):
        chunk.load_state_dict(loaded[f"model{index}"])


def sharded_weights(model: Model) -> dict[str, dict]:
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
    everywhere: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, wanted)
    wanted = {name: shape for part in everywhere for name, shape in part.items()}
    of_model = {name: shape for name, shape in wanted.items() if not name.startswith(_OPTIMIZER)}
    if clauses := tensor_mismatches(of_model, metadata):
        raise MismatchError(
            f"{folder} does not hold the model that its settings describe: {'; '.join(clauses)}. Its files "
            "may be those of another checkpoint: choose another with --load-iteration."
        )
    if clauses := tensor_mismatches(wanted, metadata):
        raise MismatchError(
            f"the optimizer state of {folder} is that of another model or optimizer: {'; '.join(clauses)}. Go on "
            "without it with --no-load-optim."
        )
