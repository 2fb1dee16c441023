"""Weights of Llama-like models of `transformers` under our names, for a model on one rank.

The names and the layout of the fused matrices are core's: queries, keys and values by group of heads; gate, then up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.early_exit.config.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL_TYPES = ("llama", "qwen2")


def llama_model_config(config: PretrainedConfig) -> ModelConfig:
    """Our settings for the architecture of `config`. Raises ValueError for what this model cannot express."""
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"model type {config.model_type} is not supported; it is none of {', '.join(MODEL_TYPES)}")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters {rope} are not supported: only plain rotary embeddings are")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act} is not supported: only silu is")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise ValueError("attention_bias and mlp_bias are not supported")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    is_grouped = config.num_key_value_heads != config.num_attention_heads
    return ModelConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.intermediate_size,
        kv_channels=head_size,
        group_query_attention=is_grouped,
        num_query_groups=config.num_key_value_heads if is_grouped else 1,
        max_position_embeddings=config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(rope["rope_theta"]),
        normalization="RMSNorm",
        norm_epsilon=config.rms_norm_eps,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=config.model_type == "qwen2",
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def llama_parameters(state: Mapping[str, Tensor], config: ModelConfig, vocab_rows: int) -> dict[str, Tensor]:
    """Our parameters, by name, from the state dict of a `transformers` model.

    vocab_rows: rows of the embedding, padded with zeros beyond the model's own."""
    ours = {
        "embedding.word_embeddings.weight": _padded(state["model.embed_tokens.weight"], vocab_rows),
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }
    if config.untie_embeddings_and_output_weights:
        ours["output_layer.weight"] = _padded(state["lm_head.weight"], vocab_rows)
    for index in range(config.num_layers):
        theirs, name = f"model.layers.{index}", f"decoder.layers.{index}"
        ours |= {
            f"{name}.input_layernorm.weight": state[f"{theirs}.input_layernorm.weight"],
            f"{name}.self_attention.linear_proj.weight": state[f"{theirs}.self_attn.o_proj.weight"],
            f"{name}.pre_mlp_layernorm.weight": state[f"{theirs}.post_attention_layernorm.weight"],
            f"{name}.mlp.linear_fc1.weight": torch.cat(
                [state[f"{theirs}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
            ),
            f"{name}.mlp.linear_fc2.weight": state[f"{theirs}.mlp.down_proj.weight"],
        }
        for kind in ("weight", "bias") if config.add_qkv_bias else ("weight",):
            parts = [state[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            ours[f"{name}.self_attention.linear_qkv.{kind}"] = _by_group(parts, config)
    return ours


def _by_group(parts: list[Tensor], config: ModelConfig) -> Tensor:
    """[queries of group 0, its key, its value, queries of group 1, ...]"""
    grouped = [part.view(config.num_kv_heads, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, 1).flatten(0, 1)


def _padded(weight: Tensor, rows: int) -> Tensor:
    if weight.size(0) > rows:
        raise ValueError(f"the model has {weight.size(0)} ids, which do not fit into {rows} rows")
    return torch.cat([weight, weight.new_zeros(rows - weight.size(0), weight.size(1))])
