"""What a family of architectures of `transformers` is, and what the conversions of all families are made of."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors, combined
from megatron.early_exit.config.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

THEIR_OUTPUT = "lm_head.weight"

Shapes = dict[str, tuple[str, ...]]
"""By parameter: each dimension as a product of settings and numbers, such as "num_key_value_heads*head_dim"."""


@dataclass(frozen=True)
class Family:
    """Both directions of the conversion of some model types."""

    model_types: tuple[str, ...]
    model_config: Callable[[PretrainedConfig, int], ModelConfig]
    """Our settings, for sequences up to a length. Raises ValueError for what our model cannot express."""
    ours: Callable[[Tensors, ModelConfig], Tensors]
    """Our parameters from theirs, vocabulary not padded. Raises KeyError for one that is missing."""
    theirs: Callable[[Tensors, ModelConfig], Tensors]
    """The inverse."""
    settings: Callable[[ModelConfig], dict[str, Any]]
    """Their config's fields."""
    shapes: Callable[[PretrainedConfig], Shapes]
    """All their parameters; without that of the output if it is tied."""
    sizes: Callable[[PretrainedConfig], dict[str, int]]
    """The settings that shapes are made of."""
    settings_read: frozenset[str]
    """Fields of their config that `model_config` reads or refuses."""
    base_prefix: str
    """What the names of all parameters but the output's begin with."""
    embedding: str
    """Their name of the word embedding."""
    derived: re.Pattern[str]
    """Names of tensors that older files hold and that follow from the settings."""


def parameter_of(tensors: Mapping[str, LazyTensor], name: str) -> LazyTensor:
    """Raises KeyError that says what is missing."""
    try:
        return tensors[name]
    except KeyError:
        raise KeyError(f"the model has no parameter {name}") from None


def chunk_of_rows(tensor: Tensor, *, count: int, index: int) -> Tensor:
    """One of so many equal parts of its rows."""
    return tensor.chunk(count)[index]


def by_group(parts: list[LazyTensor], model: ModelConfig) -> LazyTensor:
    """[queries of group 0, its key, its value, queries of group 1, ...] from all queries, all keys, all values."""

    def interleave(*tensors: Tensor) -> Tensor:
        grouped = [tensor.reshape(model.num_kv_heads, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(grouped, 1).flatten(0, 1)

    rows = sum(part.shape[0] for part in parts)
    return combined(parts, (rows, *parts[0].shape[1:]), interleave)


def by_kind(fused: LazyTensor, model: ModelConfig) -> list[LazyTensor]:
    """The inverse of `by_group`."""
    per_group = model.num_attention_heads // model.num_kv_heads * model.head_size
    sizes = (per_group, model.head_size, model.head_size)

    def take(tensor: Tensor, kind: int) -> Tensor:
        grouped = tensor.reshape(model.num_kv_heads, -1, *tensor.shape[1:])
        part: Tensor = grouped.split(sizes, 1)[kind]
        return part.flatten(0, 1)

    shapes = [(size * model.num_kv_heads, *fused.shape[1:]) for size in sizes]
    return [fused.then(shape, functools.partial(take, kind=kind)) for kind, shape in enumerate(shapes)]
