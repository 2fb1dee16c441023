"""What a model of `transformers` holds against what its settings say: nothing is left out without a word.

Errors are for what changes the function of the model, notes for what does not, or not by the judgement of
`transformers` itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from megatron.early_exit.checkpoint.family import THEIR_OUTPUT, Family
from megatron.early_exit.checkpoint.tensors import Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

THEIR_EXITS = "exits."
"""What the names of exits' parameters begin with in a folder that `to-hf --with-exits` wrote."""

# Fields of config.json without an effect on the model's function.
_IRRELEVANT = frozenset((
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id",
    "output_hidden_states", "output_attentions", "return_dict", "return_dict_in_generate", "chunk_size_feed_forward",
    "id2label", "label2id", "problem_type", "pretraining_tp", "task_specific_params", "tokenizer_class", "prefix",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "reorder_and_upcast_attn", "gradient_checkpointing", "n_ctx", "_attn_implementation", "torchscript",
    "rope_scaling", "rope_theta", "early_exits", "quantization_config", "auto_map",
))  # fmt: skip
_ROPE_SETTINGS = frozenset((
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor",
    "original_max_position_embeddings",
))  # fmt: skip
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SHOWN = 5


def check_settings(raw: Mapping[str, Any], config: PretrainedConfig, family: Family) -> list[str]:
    """Notes on settings that are not used. raw: config.json as it stands; config: what transformers makes of it.

    Raises ValueError for settings of the architecture that have an effect which ours does not have."""
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise ValueError(f"the weights are quantized (quantization_config: {method}); save them dequantized first")
    known = family.settings_read | _IRRELEVANT
    plain = type(config)().to_dict()
    problems = [
        f"{name} {value!r}"
        for name, value in config.to_dict().items()
        if name not in known and name in plain and value != plain[name]
    ]
    if problems:
        raise ValueError(f"settings of the model that are not supported: {', '.join(problems)}")
    theirs = {config.attribute_map.get(name, name): value for name, value in raw.items()}
    unknown = [name for name, value in theirs.items() if name not in known and name not in plain and value]
    rope = getattr(config, "rope_parameters", None) or {}
    unknown += [f"rope_parameters.{name}" for name in rope if name not in _ROPE_SETTINGS]
    notes = []
    if unknown:
        notes.append(f"not used, and not by transformers either: {_listed(unknown)} of config.json")
    if raw.get("auto_map") and not raw.get("early_exits"):
        notes.append("the folder has code of its own (auto_map), which is not used: the model is a plain "
                     f"{config.model_type}, as without trust_remote_code")  # fmt: skip
    if getattr(config, "embd_pdrop", None) != getattr(config, "resid_pdrop", None):
        notes.append(f"embd_pdrop {config.embd_pdrop}: dropout on embeddings is resid_pdrop {config.resid_pdrop} here")
    return notes


def with_base_prefix(tensors: Tensors, family: Family) -> Tensors:
    """The parameters under the names of the model with a head; some files leave the prefix out."""
    prefix = family.base_prefix
    if any(name.startswith(prefix) for name in tensors):
        return tensors
    is_outside = lambda name: name.startswith((THEIR_OUTPUT, THEIR_EXITS))
    return {name if is_outside(name) else prefix + name: tensor for name, tensor in tensors.items()}


def resolve_tied_output(tensors: Tensors, config: PretrainedConfig, family: Family) -> tuple[Tensors, list[str]]:
    """The parameters with one output weight if `config.tie_word_embeddings`, as transformers decides; sets it to false
    where both weights are there and differ. Returns them, and notes."""
    embedding, output = tensors.get(family.embedding), tensors.get(THEIR_OUTPUT)
    if not config.tie_word_embeddings or output is None:
        return tensors, []
    others = {name: tensor for name, tensor in tensors.items() if name != THEIR_OUTPUT}
    if embedding is None:
        return others | {family.embedding: output}, []
    if embedding.shape == output.shape and torch.equal(embedding.read(), output.read()):
        return others, []
    config.tie_word_embeddings = False
    return tensors, [
        f"config.json says tie_word_embeddings, but {THEIR_OUTPUT} differs from {family.embedding}: the output has a "
        "weight of its own, as transformers decides"
    ]


def check_tensors(tensors: Tensors, config: PretrainedConfig, family: Family) -> list[str]:
    """Notes on tensors that are not part of the model.

    Raises ValueError with the names of parameters that are missing, of other shapes than the settings say or of other
    types than weights have, or in the model's layers without a setting that names them."""
    shapes, sizes = family.shapes(config), family.sizes(config)
    problems = []
    missing = [name for name in shapes if name not in tensors]
    if missing:
        hint = ""
        if missing == [THEIR_OUTPUT]:
            hint = " (tie_word_embeddings is false: is it a model with an output for text at all?)"
        problems.append(f"the weights lack {_listed(missing)}{hint}")
    for name, shape in shapes.items():
        expected = tuple(_size(dimension, sizes) for dimension in shape)
        if name in tensors and tensors[name].shape != expected:
            problems.append(
                f"{name} has the shape {list(tensors[name].shape)}, but config.json says {list(expected)} "
                f"({', '.join(_explained(dimension, sizes) for dimension in shape)})"
            )
    problems += [
        f"{name} has the type {str(tensor.dtype).removeprefix('torch.')}, which weights cannot have here"
        for name, tensor in tensors.items()
        if (name in shapes or name.startswith(THEIR_EXITS)) and tensor.dtype not in _WEIGHT_DTYPES
    ]
    rest = [name for name in tensors if name not in shapes and not family.derived.fullmatch(name)]
    rest = [name for name in rest if not name.startswith(THEIR_EXITS)]
    inside = [name for name in rest if name.startswith(family.base_prefix) or name == "lm_head.bias"]
    if inside:
        problems.append(f"the weights hold {_listed(inside)}, which config.json does not name{_why(inside, config)}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more such" if len(problems) > _SHOWN else ""
        raise ValueError(f"the weights do not fit config.json: {'; '.join(problems[:_SHOWN])}{more}")
    outside = [name for name in rest if name not in inside]
    return [f"not part of the model, and left out: {_listed(outside)}"] if outside else []


def _why(names: list[str], config: PretrainedConfig) -> str:
    layers = [int(match[1]) for match in (re.search(r"\.(?:layers|h)\.(\d+)\.", name) for name in names) if match]
    count = config.num_hidden_layers
    if layers and max(layers) >= count:
        return f" (num_hidden_layers is {count}, and they go up to layer {max(layers) + 1})"
    if any("lora_" in name for name in names):
        return " (an adapter: merge it into the model first)"
    return " (biases are not supported there)" if all(name.endswith("bias") for name in names) else ""


def _size(dimension: str, sizes: Mapping[str, int]) -> int:
    return math.prod(int(part) if part.isdecimal() else sizes[part] for part in dimension.split("*"))


def _explained(dimension: str, sizes: Mapping[str, int]) -> str:
    """Such as 'num_key_value_heads 2 x head_dim 16'."""
    return " x ".join(part if part.isdecimal() else f"{part} {sizes[part]}" for part in dimension.split("*"))


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
