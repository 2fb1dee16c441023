"""Checkpoints of the original EE-LLM (and of Megatron-LM's legacy format) -> our parameters.

    LOAD/iter_0000002/mp_rank_00/model_optim_rng.pt          one pipeline stage: mp_rank_TP
    LOAD/iter_0000002/mp_rank_00_001/model_optim_rng.pt      several: mp_rank_TP_PP

A checkpoint of partial tuning (--tune-exit-pipeline-parallel-size) has the first stages alone, under the names that
they have in the whole model: mp_rank_TP_000 even if only one was saved. `legacy_merge.py` makes it whole.

The files are pickles. They are read by PyTorch's restricted unpickler, which runs no code of theirs: it knows the few
classes below and refuses a file that names another. Files are memory-mapped, so tensors are read when they are written.
"""

from __future__ import annotations

import _codecs
import argparse
import enum
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron.early_exit.checkpoint.exits import exits_of_layers
from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors, combined, concatenated
from megatron.early_exit.config.checkpoint_files import chosen_folder
from megatron.early_exit.config.exits import ExitConfig, ExitHeadKind
from megatron.early_exit.config.model import ModelConfig

_FILE = "model_optim_rng.pt"


class ModelType(enum.Enum):
    """Stands for Megatron's enum of this name, which the settings in a checkpoint hold."""

    encoder_or_decoder = 1
    encoder_and_decoder = 2
    retro_encoder = 3
    retro_decoder = 4


def _known_classes() -> torch.serialization.safe_globals:
    reconstruct: Any = np.empty(0).__reduce__()[0]  # a function of a module that NumPy has moved
    return torch.serialization.safe_globals([
        argparse.Namespace,
        (ModelType, "megatron.core.enums.ModelType"),
        (ModelType, "megatron.model.enums.ModelType"),
        (ModelType, "megatron.model.ModelType"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(kind)) for kind in ("uint8", "uint32", "int64", "float32", "float64")},
        _codecs.encode,
    ])  # fmt: skip


def is_legacy(folder: Path) -> bool:
    """Whether `folder` is one iteration of a legacy checkpoint."""
    return any(folder.glob(f"mp_rank_*/{_FILE}"))


def holds_legacy(load: Path) -> bool:
    """Whether `load` is a legacy checkpoint: one iteration, or the folder of several."""
    return is_legacy(load) or any(load.glob("*/mp_rank_*"))


def find_legacy(load: Path, iteration: int | None = None) -> Path:
    """Folder of the iteration to read: the given one, else the last. Raises FileNotFoundError with what is missing."""
    if is_legacy(load):
        return load
    folder = chosen_folder(load, iteration)
    if not is_legacy(folder):
        raise FileNotFoundError(f"{folder} holds no legacy checkpoint (mp_rank_*/{_FILE})")
    return folder


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
    exits = _exit_config(args)
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


def _check_nothing_is_left(folder: Path, stages: list[_Stage]) -> None:
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
    named = _exit_config(args)
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


def _read_stages(folder: Path) -> tuple[ModelConfig, list[_Stage], argparse.Namespace]:
    ranks = _read_ranks(folder)
    args = ranks[0][0]["args"]
    model = _model_config(args)
    return model, [_Stage([_flatten(rank["model"]) for rank in stage], model) for stage in ranks], args


def _embeddings(first_stage: _Stage, model: ModelConfig) -> Tensors:
    tensors = {"embedding.word_embeddings.weight": first_stage.take("embedding.word_embeddings.weight", 0)}
    if model.position_embedding_type == "learned_absolute":
        tensors["embedding.position_embeddings.weight"] = first_stage.take("embedding.position_embeddings.weight")
    return tensors


def _all_layers(stages: list[_Stage], exits: ExitConfig, args: argparse.Namespace) -> Tensors:
    tensors: Tensors = {}
    first = 1
    for stage in stages:
        tensors |= stage.layers(first, exits, getattr(args, "exit_layer_nums", None) or [])
        first += stage.num_layers
    return tensors


def _output_weights_of_exits(stages: list[_Stage], model: ModelConfig, exits: ExitConfig) -> Tensors:
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


def _read_ranks(folder: Path) -> list[list[dict[str, Any]]]:
    """Contents of all files, by pipeline stage and tensor-parallel rank."""
    found: dict[tuple[int, int], Path] = {}
    for path in folder.iterdir():
        match = re.fullmatch(r"mp_rank_(\d{2})(?:_(\d{3}))?", path.name)
        if match:
            found[int(match[2] or 0), int(match[1])] = path / _FILE
    num_stages, num_ranks = (max(key[i] for key in found) + 1 for i in (0, 1))
    missing = [(pp, tp) for pp in range(num_stages) for tp in range(num_ranks) if (pp, tp) not in found]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the files of (pipeline stage, tensor rank) {missing[:4]}")
    ranks = [[_read_file(found[pp, tp]) for tp in range(num_ranks)] for pp in range(num_stages)]
    args = ranks[0][0]["args"]
    if args.tensor_model_parallel_size != num_ranks:
        raise FileNotFoundError(
            f"{folder} was saved by {args.tensor_model_parallel_size} tensor-parallel ranks; found are {num_ranks}"
        )
    return ranks


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with _known_classes():
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return content
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than weights and settings, and is not read: {error}") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise OSError(f"{path} cannot be read, it may be damaged: {error}") from error


# Settings that change the function of a model, or its parameters, and that ours does not have.
_WITHOUT_LIKE = (
    "num_experts", "apply_residual_connection_post_layernorm", "squared_relu", "apply_layernorm_1p",
    "retro_add_retriever", "onnx_safe", "rotary_interleaved", "qk_layernorm", "add_qkv_bias", "use_rope_scaling",
    "window_size", "multi_latent_attention", "quick_geglu", "model_spec",
)  # fmt: skip
# Tensors that follow from others or from the settings.
_DERIVED = re.compile(r"word_embeddings_for_head\.weight|.*rotary_pos_emb\.inv_freq|.*\._extra_state")


def _model_config(args: argparse.Namespace) -> ModelConfig:
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


def _exit_config(args: argparse.Namespace) -> ExitConfig:
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


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}".removeprefix("language_model.")
        flat |= _flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


# Our module -> theirs, and how its weight is split over tensor-parallel ranks: rows, columns, or not at all.
_LAYER = {
    "input_layernorm": ("input_norm", None),
    "self_attention.linear_qkv": ("self_attention.query_key_value", 0),
    "self_attention.linear_proj": ("self_attention.dense", 1),
    "pre_mlp_layernorm": ("post_attention_norm", None),
}
_MLP = {"linear_fc1": ("dense_h_to_4h", 0), "linear_fc2": ("dense_4h_to_h", 1)}


class _Stage:
    """The tensors of one pipeline stage, of all its tensor-parallel ranks."""

    def __init__(self, ranks: list[dict[str, Tensor]], model: ModelConfig) -> None:
        self._ranks, self._model = ranks, model
        self._taken: set[str] = set()
        found = (re.match(r"encoder\.layers\.(\d+)\.", name) for name in ranks[0])
        self.num_layers = max((int(match[1]) + 1 for match in found if match), default=0)

    def take(self, name: str, split: int | None = None, merge: Callable[..., Tensor] | None = None) -> LazyTensor:
        """A tensor of all ranks, which is split along a dimension or the same on each. merge: puts the parts together,
        default one after the other."""
        try:
            parts = [LazyTensor.of(rank[name]) for rank in self._ranks]
        except KeyError:
            raise OSError(f"the checkpoint has no {name}") from None
        self._taken.add(name)
        if split is None or len(parts) == 1:
            return parts[0]
        if split == 1:
            shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
            return combined(parts, shape, lambda *tensors: torch.cat(tensors, 1))
        whole = concatenated(parts)
        return whole if merge is None else combined(parts, whole.shape, merge)

    def left_over(self) -> list[str]:
        """Names of tensors that were not taken, and do not follow from others."""
        names = {name for rank in self._ranks for name in rank}
        return sorted(name for name in names - self._taken if not _DERIVED.fullmatch(name))

    def module(
        self, theirs: str, ours: str, split: int | None = None, merge: Callable[..., Tensor] | None = None
    ) -> Tensors:
        """Weight and, if there is one, bias. The bias of a module with split columns is on every rank."""
        tensors = {f"{ours}.weight": self.take(f"{theirs}.weight", split, merge)}
        if f"{theirs}.bias" in self._ranks[0]:
            tensors[f"{ours}.bias"] = self.take(f"{theirs}.bias", 0 if split == 0 else None, merge)
        return tensors

    def layers(self, first: int, exits: ExitConfig, given_order: list[int]) -> Tensors:
        """Layers of this stage with their exits. first: number of the first; given_order: exits as the original counts
        them."""
        numbers = range(first, first + self.num_layers)
        mine = [number for number in given_order if number in numbers]
        tensors: Tensors = {}
        for index, number in enumerate(numbers):
            theirs, ours = f"encoder.layers.{index}", f"decoder.layers.{number - 1}"
            exit_index = exits.index_of(number)
            kind = ExitHeadKind() if exit_index is None else exits.head_of(exit_index)
            tensors |= self._layer(theirs, ours, "mlp.trunk" if kind.mlp else "mlp")
            if exit_index is None:
                continue
            head = f"{ours}.exit_head"
            if kind.mlp:
                tensors |= self._mlp(f"{theirs}.mlp.branch", f"{head}.mlp")
            if kind.block:
                tensors |= self._layer(f"{theirs}.exit_block", f"{head}.block", "mlp")
            if kind.norm:
                tensors |= self.module(f"{theirs}.exit_norm", f"{head}.norm")
            if kind.untied_output:
                name = f"exit_output_layer.{mine.index(number)}.weight"
                tensors[f"{head}.output_layer.weight"] = self.take(name, 0)
        return tensors

    def _layer(self, theirs: str, ours: str, mlp: str) -> Tensors:
        tensors: Tensors = {}
        for our_name, (their_name, split) in _LAYER.items():
            tensors |= self.module(f"{theirs}.{their_name}", f"{ours}.{our_name}", split)
        return tensors | self._mlp(f"{theirs}.{mlp}", f"{ours}.mlp")

    def _mlp(self, theirs: str, ours: str) -> Tensors:
        tensors: Tensors = {}
        for our_name, (their_name, split) in _MLP.items():
            # Every rank has its part of the gate, then its part of up.
            merge = merge_gate_and_up if self._model.swiglu and split == 0 else None
            tensors |= self.module(f"{theirs}.{their_name}", f"{ours}.{our_name}", split, merge)
        return tensors


def merge_gate_and_up(*parts: Tensor) -> Tensor:
    """The gate, then up, of an MLP of which every tensor-parallel rank has its part of the gate, then of up."""
    halves = [part.chunk(2) for part in parts]
    return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
