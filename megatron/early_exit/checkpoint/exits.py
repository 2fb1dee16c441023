"""Adds exits to a model's parameters, replaces them and takes them away. EE-Tuning's first stage (arXiv:2402.00518)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors, below
from megatron.early_exit.checkpoint.vocabulary import model_output_weight
from megatron.early_exit.config.exits import ExitConfig, ExitHeadKind, exit_kind_problems, head_settings
from megatron.early_exit.config.model import ModelConfig

Init = Literal["copy", "random"]


def add_exits(
    tensors: Tensors,
    model: ModelConfig,
    present: ExitConfig,
    wanted: ExitConfig,
    *,
    init: Init = "copy",
    replace_present: bool = False,
    seed: int = 1234,
) -> tuple[Tensors, ExitConfig]:
    """The parameters with the exits of `wanted` beside those that are there; returns them and all exits' settings.

    init: "copy" takes the model's output weight, its final norm, the MLP of the exit's own layer and the last layer;
    "random" draws what training from scratch draws. replace_present: start exits of `wanted` that are there anew.
    Raises ValueError for layers that the model does not have, and for heads that no exit can have."""
    _check(model, present, wanted, replace_present)
    all_layers = sorted({*present.exit_layer_nums, *wanted.exit_layer_nums})
    result = dict(tensors)
    for layer in wanted.exit_layer_nums:
        prefix = _prefix(layer)
        result = {name: tensor for name, tensor in result.items() if not name.startswith(prefix)}
        sources = _copied(tensors, model, wanted.head_of(wanted.exit_layer_nums.index(layer)), layer)
        for name, source in sources.items():
            result[prefix + name] = source if init == "copy" else _random(source, model, prefix + name, seed)
    return result, merged_exits(present, wanted, tuple(all_layers))


def remove_exits(
    tensors: Tensors, present: ExitConfig, layers: tuple[int, ...] | None = None
) -> tuple[Tensors, ExitConfig]:
    """The parameters without the exits at `layers` (default: all), and the settings of those that are left.

    Raises ValueError for layers without an exit."""
    layers = present.exit_layer_nums if layers is None else layers
    missing = [layer for layer in layers if layer not in present.exit_layer_nums]
    if missing:
        raise ValueError(f"no exits at layers {missing}; the model has exits at {list(present.exit_layer_nums)}")
    prefixes = tuple(_prefix(layer) for layer in layers)
    left = tuple(layer for layer in present.exit_layer_nums if layer not in layers)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)} if layers else tensors
    return kept, exits_of_layers(present, left) if left else ExitConfig()


def _check(model: ModelConfig, present: ExitConfig, wanted: ExitConfig, replace_present: bool) -> None:
    layers = wanted.exit_layer_nums
    outside = [layer for layer in layers if not 1 <= layer <= model.num_layers]
    if outside or not layers or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"--exit-layer-nums {' '.join(map(str, layers))}: give different layers from 1 to {model.num_layers}, "
            "in ascending order"
        )
    if problems := list(exit_kind_problems(wanted)):
        raise ValueError("; ".join(problems))
    there = [layer for layer in layers if layer in present.exit_layer_nums]
    if there and not replace_present:
        raise ValueError(f"layers {there} have exits; --replace starts them anew, or choose other layers")
    others = sorted(set(present.exit_layer_nums) - set(layers))
    if others and present.pre_exit != wanted.pre_exit:
        raise ValueError(
            f"all exits of a model are on one side of their layers, and those at {others} read its "
            f"{'input' if present.pre_exit else 'output'}; {'add' if present.pre_exit else 'drop'} --pre-exit, or"
            " replace them as well"
        )


def _prefix(layer: int) -> str:
    return f"decoder.layers.{layer - 1}.exit_head."


def _copied(tensors: Tensors, model: ModelConfig, kind: ExitHeadKind, layer: int) -> Tensors:
    """The head's parameters by their name in the head, each as what it is a copy of."""
    of = lambda module: below(tensors, f"{module}.")
    own, last = f"decoder.layers.{layer - 1}", f"decoder.layers.{model.num_layers - 1}"
    head: Tensors = {}
    if kind.block:
        block = {name: tensor for name, tensor in of(last).items() if not name.startswith("exit_head.")}
        head |= {f"block.{name}": tensor for name, tensor in block.items()}
    if kind.mlp:
        head |= {f"mlp.{name}": tensor for name, tensor in of(f"{own}.mlp").items()}
    if kind.norm:
        head |= {f"norm.{name}": tensor for name, tensor in of("decoder.final_layernorm").items()}
    if kind.untied_output:
        head["output_layer.weight"] = model_output_weight(tensors)
    return head


def _random(like: LazyTensor, model: ModelConfig, name: str, seed: int) -> LazyTensor:
    """As training from scratch begins: ones in norms, zeros in biases, normal weights, narrower where a layer adds to
    the residual."""
    std = model.init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * model.num_layers)

    def draw() -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(like.shape)
        if "norm." in name:
            return torch.ones(like.shape)
        # Its own generator: the same numbers whatever else is drawn.
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.empty(like.shape).normal_(0.0, std, generator=generator)

    return LazyTensor(like.shape, like.dtype, lambda: draw().to(like.dtype))


def merged_exits(present: ExitConfig, wanted: ExitConfig, layers: tuple[int, ...]) -> ExitConfig:
    """The settings of all exits, at `layers`; where both have one, those of `wanted`."""
    if not present.exit_layer_nums or set(present.exit_layer_nums) <= set(wanted.exit_layer_nums):
        return wanted
    owners = [wanted if layer in wanted.exit_layer_nums else present for layer in layers]
    places = [(owner, owner.exit_layer_nums.index(layer)) for owner, layer in zip(owners, layers, strict=True)]
    return replace(
        wanted,
        exit_layer_nums=layers,
        exit_layer_weight=tuple(exits.weights_at(10**12)[index] for exits, index in places),
        exit_layer_weight_init=(),
        exit_layer_weight_warmup_iters=0,
        exit_layer_temperature=tuple(exits.temperature_of(index) for exits, index in places),
        exit_loss_token_fraction=tuple(exits.token_fraction_of(index) for exits, index in places),
        exit_uses=tuple(exits.use_of(index) for exits, index in places),
        **head_settings([exits.head_of(index) for exits, index in places]),
    )


def exits_of_layers(exits: ExitConfig, layers: tuple[int, ...]) -> ExitConfig:
    """The settings of some of the exits."""
    positions = [exits.exit_layer_nums.index(layer) for layer in layers]
    of = lambda values: tuple(values[i] for i in positions) if len(values) > 1 else values
    return replace(
        exits,
        exit_layer_nums=layers,
        exit_layer_weight=of(exits.exit_layer_weight),
        exit_layer_weight_init=of(exits.exit_layer_weight_init),
        exit_layer_temperature=of(exits.exit_layer_temperature),
        exit_loss_token_fraction=of(exits.exit_loss_token_fraction),
        exit_uses=of(exits.exit_uses),
        **head_settings([exits.head_of(index) for index in positions]),
    )
