"""What a checkpoint is: architecture, exits, tokenizer and precision, with nothing left open."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import Dtype

# Model fields that a checkpoint's weights do not depend on: they may differ from run to run.
FREE_MODEL_FIELDS = frozenset(
    {
        "hidden_dropout",
        "attention_dropout",
        "init_method_std",
        "apply_query_key_layer_scaling",
        "make_vocab_size_divisible_by",
        "transformer_impl",
    }
)

# Exit fields that decide which parameters exist and what they compute.
EXIT_STRUCTURE_FIELDS = (
    "exit_layer_nums",
    "pre_exit",
    "untie_exit_output_weights",
    "use_exit_norm",
    "use_exit_mlp",
    "use_exit_block",
)

ROTARY_FIELDS = (
    "rotary_base",
    "rotary_percent",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
)


class MismatchError(ValueError):
    """A checkpoint that can be read, but not by who wants to: it is of another model or of another kind of run."""


@dataclass(frozen=True)
class ModelDescription:
    """A model as its weights are: what is needed to load, convert, decode or tune it, and nothing of a run."""

    model: ModelConfig
    """With `padded_vocab_size` and `max_position_embeddings`."""

    exits: ExitConfig
    tokenizer: TokenizerConfig
    dtype: Dtype
    """Precision of the weights."""

    def __post_init__(self) -> None:
        for name in ("padded_vocab_size", "max_position_embeddings"):
            if getattr(self.model, name) is None:
                raise ValueError(f"{name} is missing: a model that has weights has a number of them")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output weights."""
        assert self.model.padded_vocab_size is not None
        return self.model.padded_vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of the longest sequence."""
        assert self.model.max_position_embeddings is not None
        return self.model.max_position_embeddings


def architecture_differences(
    wanted: ModelDescription, present: ModelDescription, names: tuple[str, str] = ("flags", "checkpoint")
) -> list[str]:
    """Lines such as 'hidden_size: checkpoint 64, flags 128' for all that changes parameters or what they compute.

    names: what the lines call the two sides. Defaults are worked out first; tokenizer and precision may differ."""
    mine, theirs = _architecture(wanted), _architecture(present)
    if mine["position_embedding_type"] == theirs["position_embedding_type"] == "rope":
        del mine["max_position_embeddings"]
    elif mine["position_embedding_type"] == theirs["position_embedding_type"]:
        for name in ROTARY_FIELDS:
            del mine[name]
    if mine["exit_layer_nums"] == theirs["exit_layer_nums"] == ():
        for name in EXIT_STRUCTURE_FIELDS:
            del mine[name]
    return [
        f"{name}: {names[1]} {_shown(theirs[name])}, {names[0]} {_shown(value)}"
        for name, value in mine.items()
        if value != theirs[name]
    ]


def _architecture(description: ModelDescription) -> dict[str, Any]:
    """Structure of model and exits by field name, after defaults."""
    model = description.model
    values = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in FREE_MODEL_FIELDS | {"group_query_attention"}
    }
    values["ffn_hidden_size"] = model.ffn_size
    values["kv_channels"] = model.head_size
    values["num_query_groups"] = model.num_kv_heads
    values["add_qkv_bias"] = model.add_qkv_bias or model.add_bias_linear
    return values | {name: getattr(description.exits, name) for name in EXIT_STRUCTURE_FIELDS}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)
