"""The function of our parameters in plain PyTorch, with one layer in memory at a time.

Not for speed: conversions are compared with `transformers` by it, without core, processes or a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.early_exit.checkpoint.rotary import rotary_frequencies
from megatron.early_exit.checkpoint.tensors import EXIT_HEAD, Tensors, below
from megatron.early_exit.checkpoint.vocabulary import model_output_weight
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig

NO_EXITS = ExitConfig()

# b sequences, s tokens, h hidden size, n heads, g groups of heads with one key and value, d head size


def head_logits(
    tensors: Tensors,
    model: ModelConfig,
    tokens: Tensor,
    positions: Tensor,
    exits: ExitConfig = NO_EXITS,
    exit_layer: int | None = None,
) -> Tensor:
    """[b, s, rows of the output weight] in fp32, of the final head or of the exit named `exit_layer`.

    tokens, positions: [b, s]; every token attends to those before it, whatever their positions."""
    with torch.inference_mode():
        hidden = _read(tensors, "embedding.word_embeddings.weight")[tokens]
        if model.position_embedding_type == "learned_absolute":
            hidden = hidden + _read(tensors, "embedding.position_embeddings.weight")[positions]
        angles = _rotary_angles(model, positions)
        depth = model.num_layers if exit_layer is None else exit_layer - exits.pre_exit
        residual = hidden
        for index in range(depth):
            layer = below(tensors, f"decoder.layers.{index}.")
            residual, hidden = _layer(layer, model, hidden, angles)
        if exit_layer is not None:
            return _exit_logits(tensors, model, exits, exit_layer, residual, hidden, angles)
        hidden = _norm(below(tensors, "decoder.final_layernorm."), model, hidden)
        return hidden @ model_output_weight(tensors).read().float().t()


def _exit_logits(
    tensors: Tensors,
    model: ModelConfig,
    exits: ExitConfig,
    layer_number: int,
    residual: Tensor,
    hidden: Tensor,
    angles: Tensor,
) -> Tensor:
    layer = f"decoder.layers.{layer_number - 1}"
    head = below(tensors, f"{layer}{EXIT_HEAD}")
    index = exits.exit_layer_nums.index(layer_number)
    kind = exits.head_of(index)
    if kind.mlp:
        normed = _norm(below(tensors, f"{layer}.pre_mlp_layernorm."), model, residual)
        hidden = residual + _mlp(below(head, "mlp."), model, normed)
    if kind.block:
        _, hidden = _layer(below(head, "block."), model, hidden, angles)
    if kind.norm:
        hidden = _norm(below(head, "norm."), model, hidden)
    weight = head["output_layer.weight"] if kind.untied_output else model_output_weight(tensors)
    logits = hidden @ weight.read().float().t()
    return logits / exits.temperature_of(index)


def _read(tensors: Tensors, name: str) -> Tensor:
    return tensors[name].read().float()


def _linear(tensors: Tensors, name: str, inputs: Tensor) -> Tensor:
    bias = _read(tensors, f"{name}.bias") if f"{name}.bias" in tensors else None
    return F.linear(inputs, _read(tensors, f"{name}.weight"), bias)


def _norm(tensors: Tensors, model: ModelConfig, inputs: Tensor) -> Tensor:
    weight = _read(tensors, "weight")
    if model.normalization == "RMSNorm":
        return F.rms_norm(inputs, weight.shape, weight, model.norm_epsilon)
    return F.layer_norm(inputs, weight.shape, weight, _read(tensors, "bias"), model.norm_epsilon)


def _layer(tensors: Tensors, model: ModelConfig, hidden: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """(residual after attention, output), each [b, s, h]"""
    normed = _norm(below(tensors, "input_layernorm."), model, hidden)
    residual = hidden + _attention(below(tensors, "self_attention."), model, normed, angles)
    normed = _norm(below(tensors, "pre_mlp_layernorm."), model, residual)
    return residual, residual + _mlp(below(tensors, "mlp."), model, normed)


def _attention(tensors: Tensors, model: ModelConfig, inputs: Tensor, angles: Tensor) -> Tensor:
    per_group = model.num_attention_heads // model.num_kv_heads
    qkv = _linear(tensors, "linear_qkv", inputs)
    qkv = qkv.unflatten(-1, (model.num_kv_heads, per_group + 2, model.head_size))  # [b, s, g, n/g + 2, d]
    queries, keys, values = (
        qkv[..., :per_group, :],
        qkv[..., per_group : per_group + 1, :],
        qkv[..., per_group + 1 :, :],
    )
    if model.qk_layernorm:
        queries = _norm(below(tensors, "q_layernorm."), model, queries)
        keys = _norm(below(tensors, "k_layernorm."), model, keys)
    if model.position_embedding_type == "rope":
        queries, keys = _rotate(queries, angles), _rotate(keys, angles)
    by_head = lambda tensor: tensor.expand(*queries.shape).flatten(2, 3).transpose(1, 2)  # [b, n, s, d]
    context = F.scaled_dot_product_attention(by_head(queries), by_head(keys), by_head(values), is_causal=True)
    return _linear(tensors, "linear_proj", context.transpose(1, 2).flatten(2))


def _rotary_angles(model: ModelConfig, positions: Tensor) -> Tensor:
    """[b, s, 1, 1, rotated channels / 2]"""
    angles = positions[..., None].float() * rotary_frequencies(model)
    return angles[:, :, None, None]


def _rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """heads: [b, s, g, heads, d]; the two halves of the rotated channels are the coordinates."""
    half = angles.size(-1)
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _mlp(tensors: Tensors, model: ModelConfig, inputs: Tensor) -> Tensor:
    inner = _linear(tensors, "linear_fc1", inputs)
    if model.swiglu:
        gate, up = inner.chunk(2, -1)
        inner = F.silu(gate) * up
    else:
        inner = F.gelu(inner, approximate="tanh" if model.openai_gelu else "none")
    return _linear(tensors, "linear_fc2", inner)
