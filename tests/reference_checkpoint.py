"""Models of four layers to decode with, of all heads and styles, and their parameters, the reference's, as those of a
checkpoint. Nothing of core is imported: ranks of an engine start without it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from megatron.early_exit.checkpoint.parameters import expected_shapes
from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.loading import DTYPES
from tests.configs import VOCAB_SIZE, make_config
from tests.reference import parameter_value

MAX_POSITIONS = 40
HEADS = {
    "tied": {},
    "untied_norm": {"untie_exit_output_weights": True, "use_exit_norm": True},
    "mlp": {"use_exit_mlp": True, "use_exit_norm": True},
    "block": {"use_exit_block": True, "use_exit_norm": True, "untie_exit_output_weights": True},
    "pre_exit": {"pre_exit": True, "use_exit_norm": True},
    "pre_exit_block": {"pre_exit": True, "use_exit_block": True},
    "mixed": {
        "use_exit_block": (True, False, False), "use_exit_norm": (False, True, True),
        "use_exit_mlp": (False, False, True), "untie_exit_output_weights": (False, True, False),
    },
}  # fmt: skip
"""Of three exits; those of `mixed` are each of another kind."""
WITH_USES = {"uses": {**HEADS["mixed"], "exit_uses": ("draft", "leave", "both")}}
"""Heads of which not all do everything."""
STYLES = {
    "llama": {},
    "rotary_percent": {"rotary_percent": 0.5, "untie_embeddings_and_output_weights": True},
    "gpt2": {
        "swiglu": False, "normalization": "LayerNorm", "position_embedding_type": "learned_absolute",
        "add_bias_linear": True, "group_query_attention": False, "num_query_groups": 1,
    },
    "qkv_bias": {"add_qkv_bias": True},
}  # fmt: skip


def decoding_config(**changes: Any) -> RunConfig:
    return make_config(**{"max_position_embeddings": MAX_POSITIONS, "exit_layer_nums": (1, 2, 3), **changes})


def reference_description(cfg: RunConfig) -> ModelDescription:
    """The model whose parameters are the reference's."""
    return replace(cfg, model=replace(cfg.model, padded_vocab_size=VOCAB_SIZE)).describe(VOCAB_SIZE)


def reference_tensors(cfg: RunConfig) -> Tensors:
    """The reference's parameters as those of a checkpoint; no processes are needed."""
    description, dtype = reference_description(cfg), DTYPES[cfg.training.dtype]
    tensor = lambda name, shape: LazyTensor(shape, torch.float32, functools.partial(parameter_value, name, shape))
    shapes = expected_shapes(description.model, description.exits)
    return {name: tensor(name, shape).to(dtype) for name, shape in shapes.items()}
