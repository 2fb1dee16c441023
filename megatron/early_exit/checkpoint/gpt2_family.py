"""GPT-2."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from megatron.early_exit.checkpoint.family import THEIR_OUTPUT, Shapes, by_group, by_kind, chunk_of_rows, parameter_of
from megatron.early_exit.checkpoint.tensors import Tensors, concatenated
from megatron.early_exit.checkpoint.vocabulary import OUTPUT_WEIGHT, WORD_EMBEDDING
from megatron.early_exit.config.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def gpt2_config(config: PretrainedConfig, max_length: int) -> ModelConfig:
    if config.activation_function not in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"activation_function {config.activation_function} is not supported: gelu and gelu_new are")
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise ValueError("scale_attn_by_inverse_layer_idx, and scale_attn_weights false, are not supported")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    return ModelConfig(
        num_layers=config.n_layer,
        hidden_size=config.n_embd,
        num_attention_heads=config.n_head,
        ffn_hidden_size=config.n_inner or 4 * config.n_embd,
        max_position_embeddings=max_length,
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
        norm_epsilon=config.layer_norm_epsilon,
        openai_gelu=config.activation_function != "gelu",
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        hidden_dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
        init_method_std=config.initializer_range,
    )


def gpt2_settings(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_size,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": "gelu_new" if model.openai_gelu else "gelu",
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": model.init_method_std,
    }


GPT2_SETTINGS = frozenset((
    "n_layer", "n_embd", "n_head", "n_inner", "n_positions", "vocab_size", "layer_norm_epsilon", "activation_function",
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings", "resid_pdrop", "attn_pdrop",
    "embd_pdrop", "initializer_range",
))  # fmt: skip

_GPT2_SHAPES = {
    "ln_1.weight": ("n_embd",), "ln_1.bias": ("n_embd",),
    "attn.c_attn.weight": ("n_embd", "3*n_embd"), "attn.c_attn.bias": ("3*n_embd",),
    "attn.c_proj.weight": ("n_embd", "n_embd"), "attn.c_proj.bias": ("n_embd",),
    "ln_2.weight": ("n_embd",), "ln_2.bias": ("n_embd",),
    "mlp.c_fc.weight": ("n_embd", "n_inner"), "mlp.c_fc.bias": ("n_inner",),
    "mlp.c_proj.weight": ("n_inner", "n_embd"), "mlp.c_proj.bias": ("n_embd",),
}  # fmt: skip


def gpt2_shapes(config: PretrainedConfig) -> Shapes:
    table = ("vocab_size", "n_embd")
    shapes: Shapes = {
        "transformer.wte.weight": table, "transformer.wpe.weight": ("n_positions", "n_embd"),
        "transformer.ln_f.weight": ("n_embd",), "transformer.ln_f.bias": ("n_embd",),
    }  # fmt: skip
    for index in range(config.n_layer):
        shapes |= {f"transformer.h.{index}.{name}": shape for name, shape in _GPT2_SHAPES.items()}
    return shapes if config.tie_word_embeddings else shapes | {THEIR_OUTPUT: table}


def gpt2_sizes(config: PretrainedConfig) -> dict[str, int]:
    names = ("vocab_size", "n_embd", "n_positions")
    return {name: getattr(config, name) for name in names} | {"n_inner": config.n_inner or 4 * config.n_embd}


# Our name -> theirs; and whether theirs is the transpose.
_GPT2_LAYER = {
    "input_layernorm": ("ln_1", False),
    "self_attention.linear_qkv": ("attn.c_attn", True),
    "self_attention.linear_proj": ("attn.c_proj", True),
    "pre_mlp_layernorm": ("ln_2", False),
    "mlp.linear_fc1": ("mlp.c_fc", True),
    "mlp.linear_fc2": ("mlp.c_proj", True),
}


def _gpt2_names(model: ModelConfig) -> dict[str, tuple[str, bool]]:
    names = {
        WORD_EMBEDDING: ("transformer.wte.weight", False),
        "embedding.position_embeddings.weight": ("transformer.wpe.weight", False),
    }
    modules = {"decoder.final_layernorm": ("transformer.ln_f", False)}
    for index in range(model.num_layers):
        modules |= {
            f"decoder.layers.{index}.{ours}": (f"transformer.h.{index}.{theirs}", is_transposed)
            for ours, (theirs, is_transposed) in _GPT2_LAYER.items()
        }
    for ours, (theirs, is_transposed) in modules.items():
        names |= {f"{ours}.weight": (f"{theirs}.weight", is_transposed), f"{ours}.bias": (f"{theirs}.bias", False)}
    if model.untie_embeddings_and_output_weights:
        names[OUTPUT_WEIGHT] = ("lm_head.weight", False)
    return names


def gpt2_to_ours(theirs: Tensors, model: ModelConfig) -> Tensors:
    ours = {}
    for name, (other, is_transposed) in _gpt2_names(model).items():
        tensor = parameter_of(theirs, other)
        tensor = tensor.transposed() if is_transposed else tensor
        if "linear_qkv" in name:
            third = (tensor.shape[0] // 3, *tensor.shape[1:])
            parts = [tensor.then(third, functools.partial(chunk_of_rows, count=3, index=i)) for i in range(3)]
            tensor = by_group(parts, model)
        ours[name] = tensor
    return ours


def ours_to_gpt2(ours: Tensors, model: ModelConfig) -> Tensors:
    theirs = {}
    for name, (other, is_transposed) in _gpt2_names(model).items():
        tensor = parameter_of(ours, name)
        if "linear_qkv" in name:
            tensor = concatenated(by_kind(tensor, model))
        theirs[other] = tensor.transposed() if is_transposed else tensor
    return theirs
