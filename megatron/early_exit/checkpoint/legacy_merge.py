"""Makes a checkpoint of partial tuning whole: its exits, and all the rest from the model that it was tuned from.

The original's --tune-exit-pipeline-parallel-size saves the first pipeline stages alone. Tuning leaves the layers of
these stages as they were, so both sides have them, with the same bits. That is checked, since exits of another model
are of no use. Then the base's are taken: if it is a checkpoint of ours, its file is linked and not written again.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

import torch

from megatron.early_exit.checkpoint.exits import exits_of_layers, merged_exits
from megatron.early_exit.checkpoint.legacy import PartialCheckpoint
from megatron.early_exit.checkpoint.tensors import EXIT_HEAD, LazyTensor, Tensors
from megatron.early_exit.checkpoint.vocabulary import vocabulary_rows
from megatron.early_exit.checkpoint.writing import Progress
from megatron.early_exit.config.description import ModelDescription, architecture_differences
from megatron.early_exit.config.exits import ExitConfig

_EMBEDDING = "embedding.word_embeddings.weight"


class Merged(NamedTuple):
    """A whole model with the tuned exits."""

    description: ModelDescription
    tensors: Tensors
    left_out: list[tuple[tuple[int, ...], str]]
    """(layers, why they have no exit now), of exits that one side has or names."""


def merge_partial(
    partial: PartialCheckpoint, base: ModelDescription, base_tensors: Tensors, progress: Progress | None = None
) -> Merged:
    """The base with the exits of `partial` on the layers that this holds; behind these, the base keeps its exits.

    Reads all frozen parameters, one of each side at a time, and no others. Raises ValueError for another architecture,
    for exits of another kind behind the partial's layers, and for the first frozen parameter that is not the same."""
    base = replace(base, model=replace(base.model, padded_vocab_size=vocabulary_rows(base_tensors)))
    _check_architecture(partial, base, base_tensors)
    later = tuple(layer for layer in base.exits.exit_layer_nums if layer > partial.num_layers)
    exits = _all_exits(partial, base.exits, later)
    _check_frozen(partial, base_tensors, progress)
    tensors = {name: tensor for name, tensor in base_tensors.items() if not _is_tuned(name, partial)}
    tensors |= {name: tensor for name, tensor in partial.tensors.items() if EXIT_HEAD in name}
    return Merged(replace(base, exits=exits), tensors, _left_out(partial, base.exits, later))


def _check_architecture(partial: PartialCheckpoint, base: ModelDescription, base_tensors: Tensors) -> None:
    rows = vocabulary_rows(partial.tensors)
    mine = replace(base, model=replace(partial.model, padded_vocab_size=rows), exits=ExitConfig())
    differences = architecture_differences(mine, replace(base, exits=ExitConfig()), names=("tuned", "base"))
    types = [str(tensors[_EMBEDDING].dtype).removeprefix("torch.") for tensors in (base_tensors, partial.tensors)]
    if types[0] != types[1]:
        differences.append(f"type of the weights: base {types[0]}, tuned {types[1]}")
    if differences:
        raise ValueError(
            f"--base is not the model that {partial.folder} was tuned from; these differ:\n"
            + "\n".join(f"  - {line}" for line in differences)
        )


def _all_exits(partial: PartialCheckpoint, base: ExitConfig, later: tuple[int, ...]) -> ExitConfig:
    if not later:
        return partial.exits
    if base.pre_exit != partial.exits.pre_exit:
        listed = " ".join(map(str, later))
        raise ValueError(
            f"all exits of a model are on one side of their layers, and those that the base has at layers {listed} are "
            f"on another than those that were tuned (pre_exit: base {base.pre_exit}, tuned {partial.exits.pre_exit}); "
            f"take them away: convert the base, remove-exits --exit-layer-nums {listed}, and give what that writes as "
            "--base"
        )
    return merged_exits(exits_of_layers(base, later), partial.exits, (*partial.exits.exit_layer_nums, *later))


def _left_out(
    partial: PartialCheckpoint, base: ExitConfig, later: tuple[int, ...]
) -> list[tuple[tuple[int, ...], str]]:
    not_tuned = set(base.exit_layer_nums) - set(later) - set(partial.exits.exit_layer_nums)
    nowhere = set(partial.later_exits) - set(later)
    left_out = [
        (not_tuned, "the base has them, and the checkpoint that was tuned has these layers without"),
        (nowhere, "the checkpoint that was tuned names them, but does not hold these layers, and the base has none"),
    ]
    return [(tuple(sorted(layers)), why) for layers, why in left_out if layers]


def _check_frozen(partial: PartialCheckpoint, base: Tensors, progress: Progress | None) -> None:
    frozen = {name: tensor for name, tensor in partial.tensors.items() if EXIT_HEAD not in name}
    for name in sorted(frozen.keys() ^ {name for name in base if _is_frozen(name, partial)}):
        raise _wrong_base(partial, f"only the {'tuned one' if name in frozen else 'base'} has {_with_layer(name)}")
    pairs = [(name, tensor, base[name]) for name, tensor in frozen.items()]
    pairs += [(name, tensor, base[_EMBEDDING]) for name, tensor in partial.output_weights.items()]
    total, done = sum(tensor.num_bytes for _, tensor, _ in pairs), 0
    for name, tensor, other in pairs:
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype) or not _same_bits(tensor, other):
            raise _wrong_base(partial, f"{_with_layer(name)} differs")
        done += tensor.num_bytes
        if progress is not None:
            progress(done, total)


def _wrong_base(partial: PartialCheckpoint, why: str) -> ValueError:
    return ValueError(
        f"--base is not the model that {partial.folder} was tuned from: tuning changes exits alone, but {why}"
    )


def _with_layer(name: str) -> str:
    layer = _layer_of(name)
    return name if layer is None else f"{name} (layer {layer})"


def _same_bits(one: LazyTensor, other: LazyTensor) -> bool:
    bits = lambda lazy: lazy.read().contiguous().view(torch.uint8)
    return torch.equal(bits(one), bits(other))


def _layer_of(name: str) -> int | None:
    """Number of the layer, from 1, that a parameter belongs to."""
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    return int(match[1]) + 1 if match else None


def _is_tuned(name: str, partial: PartialCheckpoint) -> bool:
    """Whether a parameter of the base is of an exit on the layers that `partial` has."""
    layer = _layer_of(name)
    return EXIT_HEAD in name and layer is not None and layer <= partial.num_layers


def _is_frozen(name: str, partial: PartialCheckpoint) -> bool:
    """Whether a parameter of the base is one that `partial` has and tuning does not change."""
    layer = _layer_of(name)
    is_here = name.startswith("embedding.") if layer is None else layer <= partial.num_layers
    return is_here and EXIT_HEAD not in name
