"""Architectures of `transformers` that we can hold, and how their parameters are called and laid out.

Ours are core's: queries, keys and values in one matrix by group of heads, gate and up in one matrix. Nothing is
computed, so that there and back again gives the same bits.
"""

from __future__ import annotations

import re

from megatron.early_exit.checkpoint.family import Family
from megatron.early_exit.checkpoint.gpt2_family import (
    GPT2_SETTINGS,
    gpt2_config,
    gpt2_settings,
    gpt2_shapes,
    gpt2_sizes,
    gpt2_to_ours,
    ours_to_gpt2,
)
from megatron.early_exit.checkpoint.llama_family import (
    LLAMA_SETTINGS,
    llama_config,
    llama_settings,
    llama_shapes,
    llama_sizes,
    llama_to_ours,
    ours_to_llama,
)
from megatron.early_exit.config.model import ModelConfig


def family_of(model_type: str) -> Family:
    """Raises ValueError with what is supported."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ValueError(f"the architecture {model_type} is not supported; supported are {known}")


def standard_model_type(model: ModelConfig) -> str:
    """The model type whose architecture `model` is. Raises ValueError if there is none."""
    if model.rotary_percent != 1.0:
        raise ValueError(f"no supported architecture rotates {model.rotary_percent} of the channels")
    is_llama_like = model.normalization == "RMSNorm" and model.position_embedding_type == "rope" and model.swiglu
    if is_llama_like and not model.add_bias_linear:
        if model.qk_layernorm and not model.add_qkv_bias:
            return "qwen3"
        if model.qk_layernorm:
            raise ValueError("no supported architecture has norms and biases of queries and keys")
        return "qwen2" if model.add_qkv_bias else "llama"
    is_gpt2_like = model.normalization == "LayerNorm" and model.position_embedding_type == "learned_absolute"
    is_gpt2_like = is_gpt2_like and model.add_bias_linear and not (model.swiglu or model.group_query_attention)
    if is_gpt2_like and model.head_size * model.num_attention_heads == model.hidden_size and not model.qk_layernorm:
        return "gpt2"
    raise ValueError(
        "no supported architecture of transformers is like this: Llama needs RMSNorm, rope, --swiglu and "
        "--disable-bias-linear; GPT-2 needs LayerNorm, learned positions, GELU and biases"
    )


FAMILIES = (
    Family(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        model_config=llama_config,
        ours=llama_to_ours,
        theirs=ours_to_llama,
        settings=llama_settings,
        shapes=llama_shapes,
        sizes=llama_sizes,
        settings_read=LLAMA_SETTINGS,
        base_prefix="model.",
        embedding="model.embed_tokens.weight",
        derived=re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    ),
    Family(
        model_types=("gpt2",),
        model_config=gpt2_config,
        ours=gpt2_to_ours,
        theirs=ours_to_gpt2,
        settings=gpt2_settings,
        shapes=gpt2_shapes,
        sizes=gpt2_sizes,
        settings_read=GPT2_SETTINGS,
        base_prefix="transformer.",
        embedding="transformer.wte.weight",
        derived=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),
    ),
)
