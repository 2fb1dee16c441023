"""The weights of some layers as decoding wants them; `weight_reading.py` makes them of a checkpoint's parameters.

Queries, keys and values are one matrix, gate and up another, as in core; here with all queries first, then all keys,
then all values, so that each is a contiguous part of a row. Under tensor parallelism every rank holds its part: some
groups of heads, some channels of the MLP, some rows of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.inference.worker.certified_head import CertifiedHead
from megatron.early_exit.inference.worker.head_output import ShortlistColumns
from megatron.early_exit.inference.worker.linear import Linear
from megatron.early_exit.inference.worker.probe import ExitProbe
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel


class Norm:
    """RMSNorm, or LayerNorm if there is a bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, epsilon: float) -> None:
        """weight, bias: [h]"""
        self.weight, self.bias, self.epsilon = weight, bias, epsilon
        # What RMSNorm of one row reads: rsqrt(mean(x^2) + epsilon) = sqrt(h) * rsqrt(sum(x^2) + h * epsilon).
        self._scaled_weight = weight * math.sqrt(weight.numel())
        self._scaled_epsilon = weight.new_full((1,), weight.numel() * epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, h]"""
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)
        if x.is_cuda or x.dtype != torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        # On CPUs PyTorch's rms_norm is made of some ten small operations. Between matrix products that fill the caches,
        # each takes ten microseconds, and all of them as long as a small matrix product.
        if x.size(0) == 1:
            scaled_mean_square = F.linear(x, x, self._scaled_epsilon)
        else:
            scaled_mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(self._scaled_epsilon)
        return x.mul(scaled_mean_square.rsqrt_()).mul_(self._scaled_weight)


@dataclass(frozen=True)
class MlpWeights:
    """fc1: gate and up in one with SwiGLU. The bias of fc2 is added once, after the ranks' parts are summed."""

    fc1: Linear
    fc2: Linear
    fc2_bias: Tensor | None


@dataclass(frozen=True)
class MlpBranch:
    """An MLP of an exit beside that of its layer."""

    norm: Norm
    """The owning layer's norm before its MLP, which the branch shares."""
    mlp: MlpWeights


@dataclass(frozen=True)
class HeadNorms:
    """Of each head, before the rotation."""

    query: Norm
    key: Norm


@dataclass(frozen=True)
class LayerWeights:
    """One transformer layer. The bias of the projection is added once, after the ranks' parts are summed."""

    attention_norm: Norm
    head_norms: HeadNorms | None
    qkv: Linear
    projection: Linear
    projection_bias: Tensor | None
    mlp_norm: Norm
    mlp: MlpWeights


@dataclass(frozen=True)
class ApproximateHead:
    """An exit's output projection over the ids of a shortlist, at less cost than over the whole vocabulary."""

    linear: Linear
    columns: ShortlistColumns
    """With padding, so that all ranks have equally many."""


@dataclass(frozen=True)
class ExitWeights:
    """The head of one exit."""

    index: int
    """Among all exits of the model."""
    layer_number: int
    """The layer, counted from 1, that names it; it belongs to the stage that has this layer."""
    depth: int
    """Layers that a row has run when the exit reads it."""
    temperature: float
    block: LayerWeights | None
    mlp: MlpBranch | None
    norm: Norm | None
    output: Linear
    approximate: ApproximateHead | None
    """What is evaluated first; None: `output`."""
    probe: ExitProbe | None
    """None: the model has none."""
    certified: CertifiedHead | None
    """What gives the greedy token of `output` at less cost."""


@dataclass(frozen=True)
class EmbeddingWeights:
    """What the first layer reads is looked up here."""

    words: Tensor
    """[rows of this rank, h]"""
    positions: Tensor | None
    """[positions, h], learned positions"""


@dataclass(frozen=True)
class FinalHeadWeights:
    """What follows the last layer."""

    norm: Norm
    output: Linear
    certified: CertifiedHead | None
    """What gives the greedy token of `output` at less cost."""


@dataclass(frozen=True)
class DecoderWeights:
    """This rank's part of some consecutive layers of a model."""

    description: ModelDescription
    """Of the whole model."""
    first_layer: int
    """Layers before the first of these: what a row has run that comes in."""
    layers: tuple[LayerWeights, ...]
    exits: tuple[ExitWeights, ...]
    """Those that these layers own, in their order."""
    embedding: EmbeddingWeights | None
    """None unless the first layer is among these."""
    rotary_frequencies: Tensor | None
    """[rotated channels of a head / 2], rotary positions: angle between one position and the next"""
    final: FinalHeadWeights | None
    """None unless the last layer is among these."""
    num_output_rows: int | None
    """Rows of the model's output weight up to the last that is not all zeros; None if no head here reads it."""
    vocab_rows: int
    """Of an output weight on this rank; the same on all ranks, the last of which may have padding."""
    has_approximate_heads: bool
    """Whether exits of the model, which other stages may have, are evaluated first by something cheaper."""
    has_probes: bool
    """The same of probes."""
    tp: TensorParallel
    dtype: torch.dtype
    device: torch.device

    @property
    def certified_heads(self) -> list[CertifiedHead]:
        """Of all output weights that have one."""
        final = () if self.final is None else (self.final,)
        heads = [one.certified for one in (*final, *self.exits)]
        return list({id(head): head for head in heads if head is not None}.values())

    @property
    def last_layer(self) -> int:
        """What a row has run that goes out."""
        return self.first_layer + len(self.layers)


def num_ids_with_rows(weights: DecoderWeights, num_ids: int) -> int:
    """How many of the first `num_ids` ids the model can predict: those up to the last whose row is not all zeros.

    A tokenizer may have tokens that the model has never had (`from-hf` pads the vocabulary with zeros for them); a row
    of zeros gives the logit 0, which may be the largest."""
    return min(num_ids, weights.num_output_rows) if weights.num_output_rows else num_ids
