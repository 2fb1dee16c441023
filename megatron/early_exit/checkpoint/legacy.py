"""Checkpoints of the original EE-LLM (and of Megatron-LM's legacy format) -> our parameters.

    LOAD/iter_0000002/mp_rank_00/model_optim_rng.pt          one pipeline stage: mp_rank_TP
    LOAD/iter_0000002/mp_rank_00_001/model_optim_rng.pt      several: mp_rank_TP_PP

A checkpoint of partial tuning (--tune-exit-pipeline-parallel-size) has the first stages alone, under the names that
they have in the whole model: mp_rank_TP_000 even if only one was saved. `legacy_merge.py` makes it whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megatron.early_exit.checkpoint.exits import exits_of_layers
from megatron.early_exit.checkpoint.legacy_files import read_ranks
from megatron.early_exit.checkpoint.legacy_settings import exit_config, model_config
from megatron.early_exit.checkpoint.legacy_stage import LegacyStage
from megatron.early_exit.checkpoint.tensors import Tensors
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig


class PartialCheckpoint(NamedTuple):
    """The first pipeline stages of a model whose exits were tuned."""

    folder: Path
    model: ModelConfig
    """The whole model."""
    num_layers: int
    """Layers that are here: those from 1 to this one."""
    exits: ExitConfig
    """Exits of these layers."""
    later_exits: tuple[int, ...]
    """Layers of further exits that the settings name; they are not here."""
    tensors: Tensors
    """Embeddings and layers with their exits, under our names."""
    output_weights: Tensors
    """What tied exits of stages without the embedding use: copies of it, under a name that says where they lie."""
    settings: argparse.Namespace


def read_legacy(folder: Path) -> tuple[ModelConfig, ExitConfig, Tensors, argparse.Namespace]:
    """(model, exits, our parameters, all settings that the checkpoint holds) of one iteration.

    Raises OSError for files that are missing or damaged, ValueError for what our model cannot express."""
    model, stages, args = _read_stages(folder)
    exits = exit_config(args)
    num_layers = sum(stage.num_layers for stage in stages)
    if num_layers != model.num_layers:
        raise OSError(
            f"{folder} holds {num_layers} of {model.num_layers} layers: a checkpoint of partial tuning "
            "(--tune-exit-pipeline-parallel-size) must be merged with the one it was tuned from (from-legacy --base), "
            "or stages are missing"
        )
    tensors = _embeddings(stages[0], model)
    if model.untie_embeddings_and_output_weights:
        tensors["output_layer.weight"] = stages[-1].take("output_layer.weight", 0)
    tensors |= stages[-1].module("encoder.final_norm", "decoder.final_layernorm")
    tensors |= _all_layers(stages, exits, args)
    _check_nothing_is_left(folder, stages)
    return model, exits, tensors, args


def _check_nothing_is_left(folder: Path, stages: list[LegacyStage]) -> None:
    left = [f"{name} of pipeline stage {index}" for index, stage in enumerate(stages) for name in stage.left_over()]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise ValueError(f"{folder} holds tensors that its settings do not name: {', '.join(left[:5])}{more}")


def read_partial(folder: Path) -> PartialCheckpoint:
    """One iteration of a checkpoint of partial tuning.

    Raises OSError and ValueError as `read_legacy`, and ValueError for a checkpoint of all stages or without exits."""
    model, stages, args = _read_stages(folder)
    num_layers = sum(stage.num_layers for stage in stages)
    if num_layers >= model.num_layers:
        raise ValueError(f"{folder} holds all {model.num_layers} layers and needs no base; leave out --base")
    named = exit_config(args)
    here = tuple(layer for layer in named.exit_layer_nums if layer <= num_layers)
    if not here:
        raise ValueError(
            f"{folder} holds layers 1 to {num_layers}, and names exits at {list(named.exit_layer_nums)}: none of them "
            "is here to be merged"
        )
    exits = exits_of_layers(named, here)
    partial = PartialCheckpoint(
        folder,
        model,
        num_layers,
        exits,
        later_exits=named.exit_layer_nums[len(here) :],
        tensors=_embeddings(stages[0], model) | _all_layers(stages, exits, args),
        output_weights=_output_weights_of_exits(stages, model, exits),
        settings=args,
    )
    _check_nothing_is_left(folder, stages)
    return partial


def _read_stages(folder: Path) -> tuple[ModelConfig, list[LegacyStage], argparse.Namespace]:
    ranks = read_ranks(folder)
    args = ranks[0][0]["args"]
    model = model_config(args)
    return model, [LegacyStage([_flatten(rank["model"]) for rank in stage], model) for stage in ranks], args


def _embeddings(first_stage: LegacyStage, model: ModelConfig) -> Tensors:
    tensors = {"embedding.word_embeddings.weight": first_stage.take("embedding.word_embeddings.weight", 0)}
    if model.position_embedding_type == "learned_absolute":
        tensors["embedding.position_embeddings.weight"] = first_stage.take("embedding.position_embeddings.weight")
    return tensors


def _all_layers(stages: list[LegacyStage], exits: ExitConfig, args: argparse.Namespace) -> Tensors:
    tensors: Tensors = {}
    first = 1
    for stage in stages:
        tensors |= stage.layers(first, exits, getattr(args, "exit_layer_nums", None) or [])
        first += stage.num_layers
    return tensors


def _output_weights_of_exits(stages: list[LegacyStage], model: ModelConfig, exits: ExitConfig) -> Tensors:
    """The copies of the embedding that tied exits use, of all stages with exits but the first."""
    copies: Tensors = {}
    if model.untie_embeddings_and_output_weights or all(head.untied_output for head in exits.heads):
        return copies
    last = stages[0].num_layers
    for index, stage in enumerate(stages[1:], start=1):
        first, last = last + 1, last + stage.num_layers
        if any(first <= layer <= last for layer in exits.exit_layer_nums):
            copies[f"word_embeddings_for_head.weight of pipeline stage {index}"] = stage.take(
                "word_embeddings_for_head.weight", 0
            )
    return copies


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}".removeprefix("language_model.")
        flat |= _flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}
