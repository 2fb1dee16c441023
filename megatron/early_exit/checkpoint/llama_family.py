"""Llama and what is like it: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron.early_exit.checkpoint.family import THEIR_OUTPUT, Shapes, by_group, by_kind, chunk_of_rows, parameter_of
from megatron.early_exit.checkpoint.rotary import LLAMA3_ROPE
from megatron.early_exit.checkpoint.tensors import Tensors, concatenated
from megatron.early_exit.checkpoint.vocabulary import OUTPUT_WEIGHT, WORD_EMBEDDING
from megatron.early_exit.config.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def llama_config(config: PretrainedConfig, max_length: int) -> ModelConfig:
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act} is not supported: only silu is")
    if getattr(config, "mlp_bias", False) or (
        config.model_type != "qwen2" and getattr(config, "attention_bias", False)
    ):
        raise ValueError("attention_bias and mlp_bias are not supported")
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if config.model_type != "llama" else None
    is_windowed = layer_types is None or "sliding_attention" in layer_types
    if is_windowed and window is not None and window < max_length:
        raise ValueError(
            f"the model attends to the last {window} tokens only (sliding_window), which is not supported; up to "
            f"that length it makes no difference: give --max-position-embeddings {window} or less"
        )
    if layer_types is not None and set(layer_types) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types {sorted(set(layer_types))} are not supported: only full_attention is")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{config.num_key_value_heads}"
        )
    is_grouped = config.num_key_value_heads != config.num_attention_heads
    return ModelConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.intermediate_size,
        kv_channels=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        group_query_attention=is_grouped,
        num_query_groups=config.num_key_value_heads if is_grouped else 1,
        max_position_embeddings=max_length,
        position_embedding_type="rope",
        **_rope_settings(config.rope_parameters),
        normalization="RMSNorm",
        norm_epsilon=config.rms_norm_eps,
        qk_layernorm=config.model_type == "qwen3",
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=config.model_type == "qwen2",
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        hidden_dropout=0.0,
        attention_dropout=config.attention_dropout,
        init_method_std=config.initializer_range,
    )


def _rope_settings(rope: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"rotary_base": int(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if settings["rotary_base"] != rope["rope_theta"] or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rope_parameters {dict(rope)} are not supported")
    if kind == "linear":
        settings["rotary_seq_len_interpolation_factor"] = float(rope["factor"])
    elif kind == "llama3":
        others = {name: rope[name] for name in LLAMA3_ROPE}
        if others != LLAMA3_ROPE:
            raise ValueError(f"llama3 rope_parameters {others} are not supported: only {LLAMA3_ROPE} are")
        settings |= {"use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}
    elif kind != "default":
        raise ValueError(f"rope_type {kind} is not supported: only default, linear and llama3 are")
    return settings


def llama_settings(model: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": float(model.rotary_base), "rope_type": "default"}
    if model.use_rope_scaling:
        rope |= {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3_ROPE}
    elif model.rotary_seq_len_interpolation_factor is not None:
        rope |= {"rope_type": "linear", "factor": model.rotary_seq_len_interpolation_factor}
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.ffn_size,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": rope,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_method_std,
    }


LLAMA_SETTINGS = frozenset((
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim",
    "vocab_size", "max_position_embeddings", "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "hidden_act",
    "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "attention_dropout", "initializer_range",
))  # fmt: skip

_LLAMA_SHAPES = {
    "input_layernorm.weight": ("hidden_size",),
    "self_attn.q_proj.weight": ("num_attention_heads*head_dim", "hidden_size"),
    "self_attn.k_proj.weight": ("num_key_value_heads*head_dim", "hidden_size"),
    "self_attn.v_proj.weight": ("num_key_value_heads*head_dim", "hidden_size"),
    "self_attn.o_proj.weight": ("hidden_size", "num_attention_heads*head_dim"),
    "post_attention_layernorm.weight": ("hidden_size",),
    "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
}

_LLAMA_SHAPES_OF_TYPE = {
    "qwen2": {
        "self_attn.q_proj.bias": ("num_attention_heads*head_dim",),
        "self_attn.k_proj.bias": ("num_key_value_heads*head_dim",),
        "self_attn.v_proj.bias": ("num_key_value_heads*head_dim",),
    },
    "qwen3": {"self_attn.q_norm.weight": ("head_dim",), "self_attn.k_norm.weight": ("head_dim",)},
}


def llama_shapes(config: PretrainedConfig) -> Shapes:
    table = ("vocab_size", "hidden_size")
    shapes: Shapes = {"model.embed_tokens.weight": table, "model.norm.weight": ("hidden_size",)}
    of_layer = _LLAMA_SHAPES | _LLAMA_SHAPES_OF_TYPE.get(config.model_type, {})
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in of_layer.items()}
    return shapes if config.tie_word_embeddings else shapes | {THEIR_OUTPUT: table}


def llama_sizes(config: PretrainedConfig) -> dict[str, int]:
    names = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {name: getattr(config, name) for name in names} | {"head_dim": head_dim}


_LLAMA_OUTSIDE_OF_LAYERS = {
    WORD_EMBEDDING: "model.embed_tokens.weight", "decoder.final_layernorm.weight": "model.norm.weight",
    OUTPUT_WEIGHT: "lm_head.weight",
}  # fmt: skip

_LLAMA_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}

_LLAMA_HEAD_NORMS = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}


def _llama_names(model: ModelConfig) -> dict[str, str]:
    """Our name -> theirs, of all parameters that are the same on both sides."""
    names = dict(_LLAMA_OUTSIDE_OF_LAYERS)
    if not model.untie_embeddings_and_output_weights:
        del names[OUTPUT_WEIGHT]
    of_layer = _LLAMA_LAYER | (_LLAMA_HEAD_NORMS if model.qk_layernorm else {})
    for index in range(model.num_layers):
        names |= {f"decoder.layers.{index}.{a}": f"model.layers.{index}.{b}" for a, b in of_layer.items()}
    return names


def _llama_fused(model: ModelConfig) -> list[tuple[str, list[str], bool]]:
    """(our fused matrix, its parts there, whether they are queries, keys and values)"""
    fused = []
    for index in range(model.num_layers):
        ours, theirs = f"decoder.layers.{index}", f"model.layers.{index}"
        for kind in ("weight", "bias") if model.add_qkv_bias else ("weight",):
            parts = [f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            fused.append((f"{ours}.self_attention.linear_qkv.{kind}", parts, True))
        fused.append(
            (f"{ours}.mlp.linear_fc1.weight", [f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up")], False)
        )
    return fused


def llama_to_ours(theirs: Tensors, model: ModelConfig) -> Tensors:
    ours = {name: parameter_of(theirs, other) for name, other in _llama_names(model).items()}
    for name, parts, is_qkv in _llama_fused(model):
        tensors = [parameter_of(theirs, part) for part in parts]
        ours[name] = by_group(tensors, model) if is_qkv else concatenated(tensors)
    return ours


def ours_to_llama(ours: Tensors, model: ModelConfig) -> Tensors:
    theirs = {other: parameter_of(ours, name) for name, other in _llama_names(model).items()}
    for name, parts, is_qkv in _llama_fused(model):
        fused = parameter_of(ours, name)
        if is_qkv:
            split = by_kind(fused, model)
        else:
            half = (fused.shape[0] // 2, *fused.shape[1:])
            split = [fused.then(half, functools.partial(chunk_of_rows, count=2, index=i)) for i in range(2)]
        theirs |= dict(zip(parts, split, strict=True))
    return theirs
