"""Settings of models in Megatron-LM's words (its arguments) and in Megatron-Bridge's, from and to ours.

Megatron-LM pickles its arguments into `common.pt` or `model_optim_rng.pt`. They are read by PyTorch's restricted
unpickler, and classes of Megatron's that they name are stood in for by one that does nothing.
"""

from __future__ import annotations

import _codecs
import argparse
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from megatron.early_exit.checkpoint.safe_pickle import UnsafeFileError
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.model import ModelConfig

# Settings that change what a model computes and that ours does not know, with the values (beside none) at which they
# change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (),
    "glu_linear_offset": (0,),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_encoded_json": (),
    "heterogeneous_layers_config_path": (),
    "hybrid_attention_ratio": (0,),
    "hybrid_layer_pattern": (),
    "hybrid_mlp_ratio": (0,),
    "hybrid_override_pattern": (),
    "is_hybrid_model": (False,),
    "linear_attention_freq": (),
    "mtp_num_layers": (0,),
    "multi_latent_attention": (False,),
    "no_rope_freq": (0,),
    "num_experts": (0,),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "retro_add_retriever": (False,),
    "rotary_interleaved": (False,),
    "softmax_scale": (),
    "softmax_type": ("vanilla",),
    "spec": (),
    "squared_relu": (False,),
    "window_size": (),
    "yarn_rotary_scaling_factor": (1.0,),
}

# Names of settings in Megatron-Bridge's model section that differ from Megatron-LM's arguments.
_BRIDGE_NAMES = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
# Llama 3.1's scaling as Bridge's providers name it, and what core's scaling has built in.
_BRIDGE_ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}


class _StandIn:
    """An object of a class that is not loaded. It keeps nothing and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_STAND_IN_FOR = ("megatron.", "transformer_engine.", "torch.", "numpy.", "signal.", "pathlib.", "enum.", "types.")
# What is loaded as it is: settings, and the bytes that layers of Transformer Engine keep beside their parameters.
_HARMLESS = {
    "argparse.Namespace": argparse.Namespace,
    "_io.BytesIO": io.BytesIO,
    "_codecs.encode": _codecs.encode,
    "builtins.bytes": bytes,
    "builtins.bytearray": bytearray,
    "builtins.set": set,
}


def load_file(file: Path, content: bytes | None = None) -> Any:
    """What Megatron saved in `file`, as a rule a dictionary; its tensors are memory-mapped. content: a part of it, to
    read that.

    Raises UnsafeFileError if it names functions or classes that no checkpoint needs, OSError if it cannot be read."""
    source = lambda: file if content is None else io.BytesIO(content)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(source())
        refused = [name for name in names if name not in _HARMLESS and not name.startswith(_STAND_IN_FOR)]
        if refused:
            raise UnsafeFileError(
                f"{file} is not loaded: it asks for {', '.join(refused)}, which no checkpoint needs, and could run any "
                "command that way. Do not use this file; get the checkpoint again from a source that you trust"
            )
        known: list[Any] = [(_HARMLESS.get(name) or type("StandIn", (_StandIn,), {}), name) for name in names]
        with torch.serialization.safe_globals(known):
            return torch.load(source(), map_location="cpu", weights_only=True, mmap=content is None)
    except UnsafeFileError:
        raise
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise OSError(f"{file} cannot be read, it may be damaged: {error}") from error


def bridge_settings(config: Mapping[str, Any]) -> argparse.Namespace:
    """Megatron-LM's arguments that say what Megatron-Bridge's `run_config.yaml` says of model and tokenizer.

    Raises ValueError for what they cannot say."""
    given: dict[str, Any] = dict(config["model"])
    model: dict[str, Any] = {_BRIDGE_NAMES.get(name, name): value for name, value in given.items()}
    activation, is_gated = str(_target(model.get("activation_func"), "gelu")), bool(model.get("gated_linear_unit"))
    kind = activation.rsplit(".", 1)[-1]
    if (kind, is_gated) not in (("silu", True), ("gelu", False), ("openai_gelu", False)):
        raise ValueError(
            f"activation_func {activation} with gated_linear_unit {is_gated} is not supported: silu with it and gelu "
            "without are"
        )
    if model.get("scale_factor") is not None:
        others = {name: model.get(name) for name in _BRIDGE_ROPE_SCALING}
        if others != _BRIDGE_ROPE_SCALING:
            raise ValueError(f"RoPE scaling by {others} is not supported: only {_BRIDGE_ROPE_SCALING} is")
        model |= {"use_rope_scaling": True, "rope_scaling_factor": model["scale_factor"]}
    groups = model.get("num_query_groups")
    model |= {
        "swiglu": is_gated,
        "openai_gelu": kind == "openai_gelu",
        "bias_gelu_fusion": bool(model.get("bias_activation_fusion")),
        "group_query_attention": groups is not None and groups != model.get("num_attention_heads"),
        "untie_embeddings_and_output_weights": not model.get("share_embeddings_and_output_weights", True),
        "max_position_embeddings": model.get("max_position_embeddings") or model.get("seq_length"),
    }
    tokenizer = config.get("tokenizer") or {}
    model |= {name: tokenizer.get(name) for name in ("tokenizer_type", "tokenizer_model")}
    return argparse.Namespace(**model)


def _target(value: Any, default: str) -> Any:
    return value.get("_target_", default) if isinstance(value, Mapping) else value or default


def model_config(settings: argparse.Namespace) -> ModelConfig:
    """The model that Megatron-LM's arguments describe, without the rows of its vocabulary.

    Raises ValueError with all settings that change its function and that ours does not know."""

    def get(name: str, default: Any = None) -> Any:
        value = getattr(settings, name, None)
        return default if value is None else value

    _check_supported(get)
    base = get("rotary_base", 10000)
    if base != int(base):
        raise ValueError(f"rotary_base {base} is not supported: only whole numbers are")
    has_swiglu, has_biases = bool(get("swiglu", False)), bool(get("add_bias_linear", True))
    groups = get("num_query_groups", 1) if get("group_query_attention", False) else get("num_attention_heads")
    is_grouped = groups != get("num_attention_heads")
    return ModelConfig(
        num_layers=get("num_layers"),
        hidden_size=get("hidden_size"),
        num_attention_heads=get("num_attention_heads"),
        ffn_hidden_size=get("ffn_hidden_size"),
        kv_channels=get("kv_channels"),
        group_query_attention=is_grouped,
        num_query_groups=groups if is_grouped else 1,
        max_position_embeddings=get("max_position_embeddings") or get("seq_length"),
        position_embedding_type=_position_embeddings(get),
        rotary_base=int(base),
        rotary_percent=float(get("rotary_percent", 1.0)),
        use_rope_scaling=bool(get("use_rope_scaling", False)),
        rope_scaling_factor=float(get("rope_scaling_factor", 8.0)),
        rotary_seq_len_interpolation_factor=get("rotary_seq_len_interpolation_factor"),
        normalization=get("normalization", "LayerNorm"),
        norm_epsilon=float(get("norm_epsilon") or get("layernorm_epsilon", 1e-5)),
        qk_layernorm=bool(get("qk_layernorm", False)),
        swiglu=has_swiglu,
        # Megatron's fusion of bias and GELU, on by default, is the approximation by tanh.
        openai_gelu=not has_swiglu
        and (bool(get("openai_gelu", False)) or (has_biases and bool(get("bias_gelu_fusion", False)))),
        add_bias_linear=has_biases,
        add_qkv_bias=bool(get("add_qkv_bias", False)),
        untie_embeddings_and_output_weights=bool(get("untie_embeddings_and_output_weights", False)),
        hidden_dropout=float(get("hidden_dropout", 0.1)),
        attention_dropout=float(get("attention_dropout", 0.1)),
        init_method_std=float(get("init_method_std", 0.02)),
    )


def _position_embeddings(get: Callable[..., Any]) -> Literal["learned_absolute", "rope"]:
    is_rope = get("use_rotary_position_embeddings", False) or get("position_embedding_type") == "rope"
    return "rope" if is_rope else "learned_absolute"


def _check_supported(get: Callable[..., Any]) -> None:
    issues = [
        f"{name} {get(name)}" for name, neutral in _UNSUPPORTED.items() if get(name) not in (None, "", [], (), *neutral)
    ]
    for name, known in (("position_embedding_type", ("rope", "learned_absolute")),
                        ("normalization", ("LayerNorm", "RMSNorm"))):  # fmt: skip
        if get(name, known[0]) not in known:
            issues.append(f"{name} {get(name)} (supported: {', '.join(known)})")
    if issues:
        raise ValueError("the model has settings that are not supported: " + "; ".join(issues))
    missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if get(name) is None]
    if missing:
        raise ValueError(f"the settings in the checkpoint do not say {', '.join(missing)}")


def arguments(model: ModelConfig, tokenizer: TokenizerConfig, dtype: torch.dtype) -> argparse.Namespace:
    """The arguments with which Megatron-LM builds `model` (--use-checkpoint-args); `model` has a padded vocabulary."""
    is_rope, path = model.position_embedding_type == "rope", tokenizer.tokenizer_model
    return argparse.Namespace(
        num_layers=model.num_layers,
        encoder_num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        kv_channels=model.head_size,
        group_query_attention=model.num_kv_heads != model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        seq_length=model.max_position_embeddings,
        encoder_seq_length=model.max_position_embeddings,
        max_position_embeddings=model.max_position_embeddings,
        position_embedding_type=model.position_embedding_type,
        add_position_embedding=True,
        use_rotary_position_embeddings=is_rope,
        rotary_base=model.rotary_base,
        rotary_percent=model.rotary_percent,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=model.rotary_seq_len_interpolation_factor,
        use_rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        normalization=model.normalization,
        norm_epsilon=model.norm_epsilon,
        apply_layernorm_1p=False,
        qk_layernorm=model.qk_layernorm,
        swiglu=model.swiglu,
        squared_relu=False,
        openai_gelu=model.openai_gelu,
        bias_gelu_fusion=False,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
        apply_query_key_layer_scaling=model.apply_query_key_layer_scaling,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        padded_vocab_size=model.padded_vocab_size,
        vocab_size=tokenizer.vocab_size,
        tokenizer_type=tokenizer.tokenizer_type,
        tokenizer_model=path and str(Path(path).absolute()),
        num_experts=None,
        hybrid_override_pattern=None,
        spec=None,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        num_layers_per_virtual_pipeline_stage=None,
        world_size=1,
        data_parallel_random_init=False,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        iteration=0,
        ckpt_format="torch_dist",
        use_dist_ckpt=True,
        use_mcore_models=True,
        transformer_impl=model.transformer_impl,
    )
