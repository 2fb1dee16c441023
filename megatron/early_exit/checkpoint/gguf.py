"""GGUF files: read by `transformers`, and checked for what its reader drops."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron.early_exit.checkpoint.rotary import LLAMA3_ROPE, llama3_factors
from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Metadata of an architecture that transformers uses, or that has no effect.
_KNOWN = frozenset((
    "context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon", "rope.dimension_count", "rope.freq_base", "attention.key_length",
    "attention.value_length", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
))  # fmt: skip
_ONE_OF = lambda *names: "|".join(name.replace(".", r"\.") for name in names)
_LLAMA = ("attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight",
          "ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")  # fmt: skip
_OF_LAYER = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": (*_LLAMA, "attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": (*_LLAMA, "attn_q_norm.weight", "attn_k_norm.weight"),
    "gpt2": tuple(f"{name}.{kind}" for name in ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up",
                                                "ffn_down") for kind in ("weight", "bias")),
}  # fmt: skip
_OUTSIDE = ("token_embd.weight", "output.weight", "output_norm.weight", "output_norm.bias", "position_embd.weight",
            "rope_freqs.weight")  # fmt: skip


def complete_gguf_config(file: Path, config: PretrainedConfig) -> None:
    """Put into `config` what transformers leaves out of a GGUF file's settings.

    Raises ValueError for settings and tensors in the file that would be dropped."""
    from gguf import GGUFReader

    reader = GGUFReader(str(file))
    architecture = _value(reader, "general.architecture")
    prefix = f"{architecture}."
    settings = {name.removeprefix(prefix): _value(reader, name) for name in reader.fields if name.startswith(prefix)}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    of_layer = _OF_LAYER.get(architecture)
    if of_layer is None:
        raise ValueError(f"{file}: the architecture {architecture} is not supported as GGUF")
    known = re.compile(rf"blk\.\d+\.({_ONE_OF(*of_layer)})|{_ONE_OF(*_OUTSIDE)}")
    unknown = sorted(name for name in tensors if not known.fullmatch(name))
    is_scaled = settings.get("rope.scaling.type", "none") != "none" or settings.get("rope.scale_linear", 1.0) != 1.0
    unknown += [
        f"{prefix}{name} {value!r}"
        for name, value in settings.items()
        if name not in _KNOWN and value and (is_scaled or not name.startswith("rope.scaling."))
    ]
    if unknown:
        raise ValueError(f"{file} holds what would be left out: {', '.join(unknown[:5])}")
    _check_heads(file, settings)
    if is_scaled:
        kind = settings.get("rope.scaling.type", "linear")
        factor = settings.get("rope.scaling.factor") or settings.get("rope.scale_linear")
        if kind != "linear" or not factor:
            raise ValueError(f"{file}: rope.scaling.type {kind} is not supported: only linear is")
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": float(factor)}
    if "rope_freqs.weight" in tensors:
        factors = torch.tensor(tensors["rope_freqs.weight"].data).float().flatten()
        config.rope_parameters = _llama3_rope(file, factors, dict(config.rope_parameters))


def _value(reader: Any, name: str) -> Any:
    field = reader.fields.get(name)
    if field is None:
        raise ValueError(f"the GGUF file has no {name}")
    return field.contents()


def _check_heads(file: Path, settings: Mapping[str, Any]) -> None:
    """All channels of a head are rotated, and keys are as wide as values and as the hidden size says."""
    head_count = settings["attention.head_count"]
    if not isinstance(head_count, int):
        raise ValueError(f"{file}: layers with different numbers of heads are not supported")
    default = settings["embedding_length"] // head_count
    width = settings.get("attention.key_length", settings.get("rope.dimension_count", default))
    widths = {
        name: settings.get(name, width)
        for name in ("rope.dimension_count", "attention.key_length", "attention.value_length")
    }
    if len(set(widths.values())) > 1:
        raise ValueError(f"{file}: heads of different widths, or rotated in part, are not supported: {widths}")


def _llama3_rope(file: Path, factors: torch.Tensor, rope: dict[str, Any]) -> dict[str, Any]:
    """The settings whose factors by frequency these are, as llama.cpp stores them of Llama 3.1."""
    scaled = rope | {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3_ROPE}
    expected = llama3_factors(scaled, 2 * len(factors))
    if not torch.allclose(factors, expected, rtol=1e-3):
        raise ValueError(f"{file}: rope_freqs.weight is not that of Llama 3.1 and its like, others are not supported")
    return scaled


def read_gguf(file: Path, config: PretrainedConfig) -> Tensors:
    """All parameters in fp32, in memory. Raises ValueError if the file lacks some."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=config, dtype=torch.float32, output_loading_info=True
    )
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])})
    if wrong:
        raise ValueError(f"{file} does not hold the model that its settings describe: {', '.join(wrong[:5])}")
    return {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}
