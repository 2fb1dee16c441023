"""An exit as a model of its own: a plain model of fewer layers, whose final head is the exit.

- An exit after layer N is a model of N layers, one before it (`pre_exit`) of N - 1.
- A block is one more layer.
- An MLP branch is the MLP of the last layer: it reads what the layer's own MLP reads and adds to the same residual.
- The exit's norm and output are the final ones. A temperature is divided out of the norm.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron.early_exit.checkpoint.tensors import EXIT_HEAD, LazyTensor, Tensors, below, without_exits
from megatron.early_exit.checkpoint.vocabulary import model_output_weight
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig

_FINAL_NORM = "decoder.final_layernorm."


def model_of_exit(
    tensors: Tensors, model: ModelConfig, exits: ExitConfig, layer_number: int, *, unit_norm: bool = False
) -> tuple[ModelConfig, Tensors]:
    """(settings, parameters) of the plain model that computes the logits of the exit named `layer_number`.

    unit_norm: give an exit without a norm one of ones: the most probable tokens stay the same, probabilities do not.
    Raises ValueError if there is no such exit, or no such model."""
    if layer_number not in exits.exit_layer_nums:
        there = f"its exits are {list(exits.exit_layer_nums)}" if exits.num_exits else "it has no exits"
        raise ValueError(f"--exit {layer_number}: the model has no such exit; {there}")
    depth, kind = exits.depth_of(layer_number), exits.head_of(exits.exit_layer_nums.index(layer_number))
    if depth == 0 and not kind.block:
        raise ValueError(f"--exit {layer_number}: the exit comes before the first layer; no model has no layers")
    layer = f"decoder.layers.{layer_number - 1}"
    head = below(tensors, f"{layer}{EXIT_HEAD}")
    layers = tuple(f"decoder.layers.{index}." for index in range(depth))
    plain = {
        name: tensor
        for name, tensor in without_exits(tensors).items()
        if name.startswith(layers) or not name.startswith(("decoder.", "output_layer."))
    }
    plain |= {f"{layer}.mlp.{name}": tensor for name, tensor in below(head, "mlp.").items()}
    plain |= {f"decoder.layers.{depth}.{name}": tensor for name, tensor in below(head, "block.").items()}
    plain |= _final_norm(tensors, head, model, exits, layer_number, unit_norm)
    is_tied = not (model.untie_embeddings_and_output_weights or kind.untied_output)
    if not is_tied:
        plain["output_layer.weight"] = head.get("output_layer.weight", model_output_weight(tensors))
    changed = replace(model, num_layers=depth + kind.block, untie_embeddings_and_output_weights=not is_tied)
    return changed, plain


def _final_norm(
    tensors: Tensors, head: Tensors, model: ModelConfig, exits: ExitConfig, layer_number: int, unit_norm: bool
) -> Tensors:
    temperature = exits.temperature_of(exits.exit_layer_nums.index(layer_number))
    norm = below(head, "norm.")
    if not norm:
        problem = f"--exit {layer_number}: the exit has no norm, and all architectures have one before the output"
        if model.normalization != "RMSNorm":
            raise ValueError(f"{problem}, which as LayerNorm changes the choice of tokens")
        if not unit_norm:
            raise ValueError(
                f"{problem}. --unit-norm writes one of ones: the order of tokens stays the same, probabilities do not"
            )
        weight = tensors[f"{_FINAL_NORM}weight"]
        ones = LazyTensor(weight.shape, weight.dtype, lambda: torch.ones(weight.shape, dtype=weight.dtype))
        return {f"{_FINAL_NORM}weight": ones}
    if temperature != 1.0:
        norm = {name: _divided(tensor, temperature) for name, tensor in norm.items()}
    return {_FINAL_NORM + name: tensor for name, tensor in norm.items()}


def _divided(tensor: LazyTensor, divisor: float) -> LazyTensor:
    return tensor.then(tensor.shape, lambda value: (value.float() / divisor).to(value.dtype))
