"""Architectures of `transformers` that we can hold, and how their parameters are called and laid out.

Ours are core's: queries, keys and values in one matrix by group of heads, gate and up in one matrix. Nothing is
computed, so that there and back again gives the same bits.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.tensors import EXIT_HEAD, LazyTensor, Tensors, combined, concatenated, with_rows
from megatron.early_exit.config.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WORD_EMBEDDING, OUTPUT_WEIGHT = "embedding.word_embeddings.weight", "output_layer.weight"
"""Names of our weights with a row for each id; an exit's own output weight ends like the second."""

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


def pad_vocabulary(tensors: Tensors, rows: int) -> Tensors:
    """Give every weight with a row for each token id `rows` of them: zeros are added, or padding is removed."""
    is_over_ids = lambda name: name in (WORD_EMBEDDING, OUTPUT_WEIGHT) or name.endswith("exit_head.output_layer.weight")
    return {name: with_rows(tensor, rows) if is_over_ids(name) else tensor for name, tensor in tensors.items()}


def vocabulary_rows(tensors: Tensors) -> int:
    """Rows of the embedding."""
    return tensors[WORD_EMBEDDING].shape[0]


def model_output_weight(tensors: Tensors) -> LazyTensor:
    """The weight of the final head."""
    return tensors.get(OUTPUT_WEIGHT, tensors[WORD_EMBEDDING])


def without_exits(tensors: Tensors) -> Tensors:
    """The parameters of the plain model."""
    return {name: tensor for name, tensor in tensors.items() if EXIT_HEAD not in name}


def _take(tensors: Mapping[str, LazyTensor], name: str) -> LazyTensor:
    try:
        return tensors[name]
    except KeyError:
        raise KeyError(f"the model has no parameter {name}") from None


def _chunk(tensor: Tensor, *, count: int, index: int) -> Tensor:
    """One of so many equal parts of its rows."""
    return tensor.chunk(count)[index]


# Llama and what is like it


def _llama_config(config: PretrainedConfig, max_length: int) -> ModelConfig:
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


# What core's scaling has built in.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_factors(rope: Mapping[str, Any], head_size: int) -> torch.Tensor:
    """[head size / 2]: what each rotary frequency is divided by, as Llama 3.1 scales them."""
    frequencies = rope["rope_theta"] ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    factors: Tensor = 1.0 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()


def rotary_frequencies(model: ModelConfig) -> torch.Tensor:
    """[rotated channels of a head / 2], fp32: the angle (radians) between one position and the next."""
    size = int(model.head_size * model.rotary_percent)
    frequencies = 1.0 / model.rotary_base ** (torch.arange(0, size, 2).float() / size)
    if model.use_rope_scaling:
        rope = {**LLAMA3_ROPE, "rope_theta": model.rotary_base, "factor": model.rope_scaling_factor}
        frequencies = frequencies / llama3_factors(rope, size)
    return frequencies / (model.rotary_seq_len_interpolation_factor or 1.0)


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


def _llama_settings(model: ModelConfig) -> dict[str, Any]:
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


_LLAMA_SETTINGS = frozenset((
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


def _llama_shapes(config: PretrainedConfig) -> Shapes:
    table = ("vocab_size", "hidden_size")
    shapes: Shapes = {"model.embed_tokens.weight": table, "model.norm.weight": ("hidden_size",)}
    of_layer = _LLAMA_SHAPES | _LLAMA_SHAPES_OF_TYPE.get(config.model_type, {})
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in of_layer.items()}
    return shapes if config.tie_word_embeddings else shapes | {THEIR_OUTPUT: table}


def _llama_sizes(config: PretrainedConfig) -> dict[str, int]:
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


def _llama_ours(theirs: Tensors, model: ModelConfig) -> Tensors:
    ours = {name: _take(theirs, other) for name, other in _llama_names(model).items()}
    for name, parts, is_qkv in _llama_fused(model):
        tensors = [_take(theirs, part) for part in parts]
        ours[name] = by_group(tensors, model) if is_qkv else concatenated(tensors)
    return ours


def _llama_theirs(ours: Tensors, model: ModelConfig) -> Tensors:
    theirs = {other: _take(ours, name) for name, other in _llama_names(model).items()}
    for name, parts, is_qkv in _llama_fused(model):
        fused = _take(ours, name)
        if is_qkv:
            split = by_kind(fused, model)
        else:
            half = (fused.shape[0] // 2, *fused.shape[1:])
            split = [fused.then(half, functools.partial(_chunk, count=2, index=i)) for i in range(2)]
        theirs |= dict(zip(parts, split, strict=True))
    return theirs


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


# GPT-2


def _gpt2_config(config: PretrainedConfig, max_length: int) -> ModelConfig:
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


def _gpt2_settings(model: ModelConfig) -> dict[str, Any]:
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


_GPT2_SETTINGS = frozenset((
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


def _gpt2_shapes(config: PretrainedConfig) -> Shapes:
    table = ("vocab_size", "n_embd")
    shapes: Shapes = {
        "transformer.wte.weight": table, "transformer.wpe.weight": ("n_positions", "n_embd"),
        "transformer.ln_f.weight": ("n_embd",), "transformer.ln_f.bias": ("n_embd",),
    }  # fmt: skip
    for index in range(config.n_layer):
        shapes |= {f"transformer.h.{index}.{name}": shape for name, shape in _GPT2_SHAPES.items()}
    return shapes if config.tie_word_embeddings else shapes | {THEIR_OUTPUT: table}


def _gpt2_sizes(config: PretrainedConfig) -> dict[str, int]:
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


def _gpt2_ours(theirs: Tensors, model: ModelConfig) -> Tensors:
    ours = {}
    for name, (other, is_transposed) in _gpt2_names(model).items():
        tensor = _take(theirs, other)
        tensor = tensor.transposed() if is_transposed else tensor
        if "linear_qkv" in name:
            third = (tensor.shape[0] // 3, *tensor.shape[1:])
            parts = [tensor.then(third, functools.partial(_chunk, count=3, index=i)) for i in range(3)]
            tensor = by_group(parts, model)
        ours[name] = tensor
    return ours


def _gpt2_theirs(ours: Tensors, model: ModelConfig) -> Tensors:
    theirs = {}
    for name, (other, is_transposed) in _gpt2_names(model).items():
        tensor = _take(ours, name)
        if "linear_qkv" in name:
            tensor = concatenated(by_kind(tensor, model))
        theirs[other] = tensor.transposed() if is_transposed else tensor
    return theirs


FAMILIES = (
    Family(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        model_config=_llama_config,
        ours=_llama_ours,
        theirs=_llama_theirs,
        settings=_llama_settings,
        shapes=_llama_shapes,
        sizes=_llama_sizes,
        settings_read=_LLAMA_SETTINGS,
        base_prefix="model.",
        embedding="model.embed_tokens.weight",
        derived=re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    ),
    Family(
        model_types=("gpt2",),
        model_config=_gpt2_config,
        ours=_gpt2_ours,
        theirs=_gpt2_theirs,
        settings=_gpt2_settings,
        shapes=_gpt2_shapes,
        sizes=_gpt2_sizes,
        settings_read=_GPT2_SETTINGS,
        base_prefix="transformer.",
        embedding="transformer.wte.weight",
        derived=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),
    ),
)
