"""The weights of a whole model as decoding wants them, taken from a loaded `EarlyExitGPTModel`.

Queries, keys and values are one matrix, gate and up another, as in core; here with all queries first, then all keys,
then all values, so that each is a contiguous part of a row. Under tensor parallelism every rank holds its part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import functional as F

from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.inference.worker.linear import Int8Linear, Linear, MakeLinear, fastest_linear
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel
from megatron.early_exit.model.attention import SdpaAttention
from megatron.early_exit.model.exit_head import ExitHead
from megatron.early_exit.model.gpt_model import EarlyExitGPTModel


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
class LayerWeights:
    """One transformer layer. The bias of the projection is added once, after the ranks' parts are summed."""

    attention_norm: Norm
    query_norm: Norm | None
    key_norm: Norm | None
    """Of each head, before the rotation."""
    qkv: Linear
    projection: Linear
    projection_bias: Tensor | None
    mlp_norm: Norm
    mlp: MlpWeights


@dataclass(frozen=True)
class ExitProbe:
    """How exits are evaluated at less cost than with their own heads."""

    shortlist: tuple[int, ...] = ()
    """Compute the logits of these ids only; none: of all."""
    int8: bool = False
    """With weights in int8."""


@dataclass(frozen=True)
class ApproximateHead:
    """An exit's output projection over some ids, or in low precision."""

    linear: Linear
    ids: Tensor | None
    """[columns]: the id of each; None: the whole vocabulary"""
    num_ids: int | None
    """Columns from here on are padding, so that all ranks have equally many."""


@dataclass(frozen=True)
class ExitWeights:
    """The head of one exit."""

    layer_number: int
    """The layer, counted from 1, that names it."""
    depth: int
    """Layers that a row has run when the exit reads it."""
    temperature: float
    block: LayerWeights | None
    mlp: MlpWeights | None
    mlp_norm: Norm | None
    """The owning layer's norm before its MLP, which an MLP branch shares."""
    norm: Norm | None
    output: Linear
    approximate: ApproximateHead | None
    """What is asked first; None: `output`."""


def num_ids_with_rows(output_weight: Tensor, num_ids: int, tp: TensorParallel) -> int:
    """How many of the first `num_ids` ids a model can say: those up to the last whose row is not all zeros.

    A tokenizer may have tokens that the model has never had (`from-hf` pads the vocabulary with zeros for them); a row
    of zeros gives the logit 0, which may be the largest. output_weight: this rank's [padded vocabulary / tp, h]"""
    first = tp.rank * len(output_weight)
    count = max(min(num_ids - first, len(output_weight)), 0)
    while count > 0 and not output_weight[count - 1].any():
        count -= 1
    everywhere = tp.gather(torch.tensor([first + count if count else 0], device=output_weight.device))
    return max(int(last) for last in everywhere) or num_ids


@dataclass(frozen=True)
class DecoderWeights:
    """This rank's part of the model."""

    config: ModelConfig
    embedding: Tensor
    """[padded vocabulary / tp, h]"""
    positions: Tensor | None
    """[positions, h], learned positions"""
    rotary_frequencies: Tensor | None
    """[rotated channels of a head / 2], rotary positions: angle between one position and the next"""
    layers: tuple[LayerWeights, ...]
    exits: tuple[ExitWeights, ...]
    final_norm: Norm
    output: Linear
    max_positions: int
    tp: TensorParallel

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device


@torch.no_grad()
def decoder_weights(
    chunk: EarlyExitGPTModel,
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    make_linear: MakeLinear | None = None,
    exit_probe: ExitProbe | None = None,
) -> DecoderWeights:
    """Take the weights of `chunk`, which holds the whole model; those that need no change are shared with it.

    dtype: of weights and computation, default the model's. make_linear: (weight, bias) -> the linear layer to use,
    default `fastest_linear`. exit_probe: approximate heads for the exits. Raises ValueError if the model cannot be
    decoded as it is."""
    _check_can_decode(chunk)
    return _Extraction(
        chunk, config, dtype or chunk.config.params_dtype, make_linear or fastest_linear, exit_probe
    ).run()


class _Extraction:
    def __init__(
        self,
        chunk: EarlyExitGPTModel,
        config: ModelConfig,
        dtype: torch.dtype,
        make_linear: MakeLinear,
        exit_probe: ExitProbe | None,
    ) -> None:
        self.chunk, self.config, self.dtype, self.make_linear = chunk, config, dtype, make_linear
        self.exit_probe = exit_probe
        # One linear layer for each output weight, however many heads use it.
        self._outputs: dict[int, Linear] = {}
        self._approximate: dict[int, ApproximateHead] = {}

    def run(self) -> DecoderWeights:
        chunk = self.chunk
        has_positions = chunk.position_embedding_type == "learned_absolute"
        return DecoderWeights(
            config=self.config,
            embedding=self._tensor(chunk.embedding.word_embeddings.weight),
            positions=self._tensor(chunk.embedding.position_embeddings.weight) if has_positions else None,
            rotary_frequencies=self._rotary_frequencies(),
            layers=tuple(self._layer(layer) for layer in chunk.decoder.layers),
            exits=tuple(
                self._exit(layer, layer.exit_head) for layer in chunk.decoder.layers if hasattr(layer, "exit_head")
            ),
            final_norm=self._norm(chunk.decoder.final_layernorm),
            output=self._output(chunk.model_output_weight),
            max_positions=chunk.max_sequence_length,
            tp=TensorParallel(chunk.pg_collection.tp),
        )

    def _tensor(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(self.dtype)

    def _rotary_frequencies(self) -> Tensor | None:
        if self.config.position_embedding_type != "rope":
            return None
        rotary = self.chunk.rotary_pos_emb
        return rotary.inv_freq / (rotary.seq_len_interpolation_factor or 1.0)

    def _head_norm(self, norm: torch.nn.Module | None) -> Norm | None:
        if norm is None:
            return None
        kinds = (norm.weight, getattr(norm, "bias", None))
        weight, bias = (None if kind is None else self._in_pairs(kind[None, None])[0, 0] for kind in kinds)
        return Norm(self._tensor(weight), self._tensor(bias), norm.eps)

    def _norm(self, norm: torch.nn.Module) -> Norm:
        return Norm(self._tensor(norm.weight), self._tensor(getattr(norm, "bias", None)), norm.eps)

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return self.make_linear(self._tensor(weight), self._tensor(bias))

    def _output(self, weight: Tensor) -> Linear:
        if weight.data_ptr() not in self._outputs:
            self._outputs[weight.data_ptr()] = self._linear(weight)
        return self._outputs[weight.data_ptr()]

    def _layer(self, layer: TransformerLayer) -> LayerWeights:
        attention = layer.self_attention
        return LayerWeights(
            attention_norm=self._norm(layer.input_layernorm),
            query_norm=self._head_norm(attention.q_layernorm),
            key_norm=self._head_norm(attention.k_layernorm),
            qkv=self._linear(self._by_kind(attention.linear_qkv.weight), self._by_kind(attention.linear_qkv.bias)),
            projection=self._linear(attention.linear_proj.weight),
            projection_bias=self._tensor(attention.linear_proj.bias),
            mlp_norm=self._norm(layer.pre_mlp_layernorm),
            mlp=self._mlp(layer.mlp),
        )

    def _by_kind(self, qkv: Tensor | None) -> Tensor | None:
        """Rows of core's fused projection, which go by group of heads, in the order queries, keys, values."""
        if qkv is None:
            return None
        d, m = self.config.head_size, self.config
        per_group = m.num_attention_heads // m.num_kv_heads
        grouped = qkv.view(-1, per_group + 2, d, *qkv.shape[1:])
        rotated = self._in_pairs(grouped[:, : per_group + 1])
        parts = (rotated[:, :per_group], rotated[:, per_group], grouped[:, per_group + 1])
        return torch.cat([part.reshape(-1, *qkv.shape[1:]) for part in parts])

    def _in_pairs(self, heads: Tensor) -> Tensor:
        """[groups, heads, d, ...] with the channels that rotate together side by side (see `rows.RotaryTable`)."""
        if self.config.position_embedding_type != "rope":
            return heads
        size = int(self.config.head_size * self.config.rotary_percent)
        order = torch.arange(size).view(2, -1).t().flatten()  # 0, size/2, 1, size/2 + 1, ...
        return torch.cat([heads[:, :, order], heads[:, :, size:]], dim=2)

    def _mlp(self, mlp: torch.nn.Module) -> MlpWeights:
        return MlpWeights(
            fc1=self._linear(mlp.linear_fc1.weight, mlp.linear_fc1.bias),
            fc2=self._linear(mlp.linear_fc2.weight),
            fc2_bias=self._tensor(mlp.linear_fc2.bias),
        )

    def _exit(self, layer: TransformerLayer, head: ExitHead) -> ExitWeights:
        has_mlp = head.mlp is not None
        return ExitWeights(
            layer_number=layer.layer_number,
            depth=layer.layer_number - 1 if head.spec.pre_exit else layer.layer_number,
            temperature=head.spec.temperature,
            block=None if head.block is None else self._layer(head.block),
            mlp=self._mlp(head.mlp) if has_mlp else None,
            mlp_norm=self._norm(layer.pre_mlp_layernorm) if has_mlp else None,
            norm=None if head.norm is None else self._norm(head.norm),
            output=self._output(head.output_weight),
            approximate=None if self.exit_probe is None else self._approximate_head(head.output_weight),
        )

    def _approximate_head(self, weight: Tensor) -> ApproximateHead:
        if weight.data_ptr() not in self._approximate:
            self._approximate[weight.data_ptr()] = self._make_approximate_head(weight)
        return self._approximate[weight.data_ptr()]

    def _make_approximate_head(self, weight: Tensor) -> ApproximateHead:
        make_linear = Int8Linear if self.exit_probe.int8 else self.make_linear
        if not self.exit_probe.shortlist:
            return ApproximateHead(make_linear(self._tensor(weight), None), None, None)
        rows, rank = weight.size(0), self.chunk.pg_collection.tp.rank()
        ids = torch.tensor(sorted(set(self.exit_probe.shortlist)))
        num_columns = int(torch.bincount(ids // rows).max())  # of the rank that holds most of them
        mine = ids[ids // rows == rank] - rank * rows
        local = torch.cat([mine, mine.new_zeros(num_columns - len(mine))]).to(weight.device)
        return ApproximateHead(make_linear(self._tensor(weight)[local], None), local + rank * rows, len(mine))


def _check_can_decode(chunk: EarlyExitGPTModel) -> None:
    if not (chunk.pre_process and chunk.post_process):
        raise ValueError("decoding needs the whole model on one pipeline stage; load it with pipeline parallel size 1")
    if chunk.config.sequence_parallel:
        raise ValueError("decoding runs single rows, which sequence parallelism cannot split; build the model without")
    if not isinstance(chunk.decoder.layers[0].self_attention.core_attention, SdpaAttention):
        raise ValueError("decoding takes weights of --transformer-impl local; load the model with it")
