"""What a legacy checkpoint's arguments say of the model and its exits."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig

# Settings that change the function of a model, or its parameters, and that ours does not have.
_WITHOUT_LIKE = (
    "num_experts", "apply_residual_connection_post_layernorm", "squared_relu", "apply_layernorm_1p",
    "retro_add_retriever", "onnx_safe", "rotary_interleaved", "qk_layernorm", "add_qkv_bias", "use_rope_scaling",
    "window_size", "multi_latent_attention", "quick_geglu", "model_spec",
)  # fmt: skip


def model_config(args: argparse.Namespace) -> ModelConfig:
    """Raises ValueError for settings that our model does not have."""

    def get(name: str, default: Any = None) -> Any:
        return getattr(args, name, default)

    others = [f"{name} {get(name)}" for name in _WITHOUT_LIKE if get(name)]
    if others:
        raise ValueError(f"settings of the checkpoint that are not supported: {', '.join(others)}")
    normalization = get("normalization", "LayerNorm")
    # The fused kernel of bias and GELU has the approximation by tanh built in.
    has_fused_gelu = bool(get("bias_gelu_fusion")) and bool(get("add_bias_linear", True)) and not get("swiglu")
    return ModelConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        ffn_hidden_size=args.ffn_hidden_size,
        kv_channels=args.kv_channels,
        group_query_attention=bool(get("group_query_attention", False)),
        num_query_groups=get("num_query_groups", 1) if get("group_query_attention", False) else 1,
        max_position_embeddings=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_base=int(get("rotary_base", 10000)),
        rotary_percent=get("rotary_percent", 1.0),
        rotary_seq_len_interpolation_factor=get("rotary_seq_len_interpolation_factor"),
        normalization=normalization,
        norm_epsilon=get("norm_epsilon") or get("layernorm_epsilon", 1e-5),
        swiglu=bool(get("swiglu", False)),
        openai_gelu=bool(get("openai_gelu", False)) or has_fused_gelu,
        add_bias_linear=bool(get("add_bias_linear", True)),
        untie_embeddings_and_output_weights=bool(args.untie_embeddings_and_output_weights),
        hidden_dropout=args.hidden_dropout,
        attention_dropout=args.attention_dropout,
        init_method_std=args.init_method_std,
        padded_vocab_size=args.padded_vocab_size,
    )


def exit_config(args: argparse.Namespace) -> ExitConfig:
    """The original keeps the order of the command line; ours is that of the layers."""
    layers = list(getattr(args, "exit_layer_nums", None) or [])
    if not layers:
        return ExitConfig()
    order = sorted(range(len(layers)), key=lambda i: layers[i])
    values = lambda name: tuple(float(getattr(args, name)[i]) for i in order) if _is_full(args, name, layers) else ()
    return ExitConfig(
        exit_layer_nums=tuple(layers[i] for i in order),
        pre_exit=bool(args.pre_exit),
        untie_exit_output_weights=bool(args.untie_exit_output_weights),
        use_exit_norm=bool(args.use_exit_norm),
        use_exit_mlp=bool(args.use_exit_mlp),
        use_exit_block=bool(args.use_exit_block),
        exit_layer_weight=values("exit_layer_weight"),
        exit_layer_temperature=values("exit_layer_temperature"),
        use_dynamic_exit_layer_weight=bool(getattr(args, "use_dynamic_exit_layer_weight", False)),
    )


def _is_full(args: argparse.Namespace, name: str, layers: list[int]) -> bool:
    return len(getattr(args, name, None) or []) == len(layers)
