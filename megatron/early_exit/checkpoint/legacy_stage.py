"""The tensors of one pipeline stage of a legacy checkpoint, under our names."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors, combined, concatenated, merge_gate_and_up
from megatron.early_exit.config.exits import ExitConfig, ExitHeadKind
from megatron.early_exit.config.model import ModelConfig

# Tensors that follow from others or from the settings.
_DERIVED = re.compile(r"word_embeddings_for_head\.weight|.*rotary_pos_emb\.inv_freq|.*\._extra_state")

# Our module -> theirs, and how its weight is split over tensor-parallel ranks: rows, columns, or not at all.
_LAYER = {
    "input_layernorm": ("input_norm", None),
    "self_attention.linear_qkv": ("self_attention.query_key_value", 0),
    "self_attention.linear_proj": ("self_attention.dense", 1),
    "pre_mlp_layernorm": ("post_attention_norm", None),
}
_MLP = {"linear_fc1": ("dense_h_to_4h", 0), "linear_fc2": ("dense_4h_to_h", 1)}


class LegacyStage:
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
