"""Exits: where they sit, and the weights of their losses. What heads are made of: `config/exits.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

from megatron.early_exit.config.exits import exit_kind_problems
from megatron.early_exit.config.fields import flag_of, words_of
from megatron.early_exit.config.settings import RunSettings


def exit_problems(cfg: RunSettings) -> Iterator[str]:
    """What is wrong with the exits, or given without any."""
    exits = cfg.exits
    if not exits.exit_layer_nums:
        yield from _exit_options_without_exits(cfg)
        return
    yield from _exit_layer_problems(exits.exit_layer_nums, cfg.model.num_layers)
    count = exits.num_exits
    for name in ("exit_layer_weight", "exit_layer_weight_init"):
        weights = getattr(exits, name)
        if weights and len(weights) != count:
            yield f"{flag_of(name)} has {len(weights)} values for {count} exits: give {count}"
        if any(weight < 0 for weight in weights):
            yield f"{flag_of(name)} {words_of(weights)}: a loss weight cannot be negative; 0 turns an exit's loss off"
    if exits.exit_layer_weight_init and exits.exit_layer_weight_warmup_iters == 0:
        yield (
            f"--exit-layer-weight-init {words_of(exits.exit_layer_weight_init)} is never used without"
            " --exit-layer-weight-warmup-iters: give the number of iterations, or leave it out"
        )
    for name in ("exit_layer_temperature", "exit_loss_token_fraction"):
        values = getattr(exits, name)
        if len(values) not in (0, 1, count):
            yield f"{flag_of(name)} has {len(values)} values for {count} exits: give 1 or {count}"
    temperatures, fractions = exits.exit_layer_temperature, exits.exit_loss_token_fraction
    if any(temperature <= 0 for temperature in temperatures):
        yield f"--exit-layer-temperature {words_of(temperatures)}: logits are divided by it, it must be greater than 0"
    if not all(0 < fraction <= 1 for fraction in fractions):
        yield (
            f"--exit-loss-token-fraction {words_of(fractions)}: a fraction of the tokens is greater than 0 and at most"
            " 1; --exit-layer-weight 0 turns an exit's loss off"
        )
    yield from exit_kind_problems(exits)


def _exit_options_without_exits(cfg: RunSettings) -> Iterator[str]:
    options = [flag_of(field.name) for field in fields(cfg.exits) if getattr(cfg.exits, field.name) != field.default]
    if options:
        yield f"{', '.join(options)} without exits: name the layers with --exit-layer-nums, or leave these flags out"


def _exit_layer_problems(layers: Sequence[int], num_layers: int) -> Iterator[str]:
    outside = [layer for layer in layers if not 1 <= layer <= num_layers]
    if outside:
        yield (
            f"--exit-layer-nums {words_of(layers)}: no layer {words_of(outside)}; layers are counted from 1 to"
            f" --num-layers {num_layers}"
        )
    ascending = sorted(set(layers))
    repeated = sorted({layer for layer in layers if list(layers).count(layer) > 1})
    if repeated:
        yield f"--exit-layer-nums {words_of(layers)}: {words_of(repeated)} stands twice; give {words_of(ascending)}"
    elif list(layers) != ascending:
        yield (
            f"--exit-layer-nums {words_of(layers)}: not ascending; give {words_of(ascending)}, and weights and"
            " temperatures in the same order"
        )


def exit_warnings(cfg: RunSettings) -> Iterator[str]:
    """Exits that save nothing, and settings of theirs without effect."""
    exits = cfg.exits
    if exits.exit_layer_weight_warmup_style != "linear" and not exits.exit_layer_weight_warmup_iters:
        yield "--exit-layer-weight-warmup-style has no effect without --exit-layer-weight-warmup-iters"
    last = cfg.model.num_layers
    if last in exits.exit_layer_nums and not exits.pre_exit:
        yield f"the exit after layer {last} sits where the model ends anyway: it costs a head and saves no layer"
    if 1 in exits.exit_layer_nums and exits.pre_exit:
        yield "the exit before layer 1 sees the embeddings alone"
