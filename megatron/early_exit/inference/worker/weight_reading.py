"""Reads the weights of some layers one by one from the parameters of a checkpoint, this rank's part of each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.parameters import Shapes, expected_shapes
from megatron.early_exit.checkpoint.rotary import rotary_frequencies
from megatron.early_exit.checkpoint.tensors import EXIT_HEAD, Tensors, below
from megatron.early_exit.checkpoint.vocabulary import OUTPUT_WEIGHT, WORD_EMBEDDING
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.inference.exit_probes import ExitProbes
from megatron.early_exit.inference.worker.certified_head import CertifiedHead, CertifiedHeadSetting, certified_head
from megatron.early_exit.inference.worker.head_output import ShortlistColumns
from megatron.early_exit.inference.worker.linear import Linear, MakeLinear, fastest_linear
from megatron.early_exit.inference.worker.probe import ExitProbe
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel
from megatron.early_exit.inference.worker.weights import (
    ApproximateHead,
    DecoderWeights,
    EmbeddingWeights,
    ExitWeights,
    FinalHeadWeights,
    HeadNorms,
    LayerWeights,
    MlpBranch,
    MlpWeights,
    Norm,
)

POSITION_EMBEDDING = "embedding.position_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm."
"""What its parameters' names begin with."""


def check_can_decode(model: ModelConfig, tp_size: int) -> None:
    """Raise ValueError if `model` cannot be decoded as it is, or not by `tp_size` ranks."""
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} key/value heads do not divide the {heads} attention heads of the model")
    rotated = int(model.head_size * model.rotary_percent)
    if model.position_embedding_type == "rope" and (model.head_size % 2 or rotated % 2):
        raise ValueError(
            f"{rotated} of the {model.head_size} channels of a head rotate with the position; both must be even numbers"
        )
    sizes = {"attention heads": heads, "key/value heads (query groups)": kv_heads, "MLP channels": model.ffn_size}
    if odd := [f"{size} {name}" for name, size in sizes.items() if size % tp_size]:
        fits = [str(size) for size in range(1, tp_size) if all(number % size == 0 for number in sizes.values())]
        raise ValueError(
            f"{tp_size} tensor-parallel ranks cannot share the model in equal parts: it has {' and '.join(odd)}; "
            f"choose {' or '.join(fits)}"
        )


def shapes_of_layers(description: ModelDescription, layers: range) -> Shapes:
    """Shapes by name of the parameters that `decoder_weights` reads for `layers`."""
    model, exits = description.model, description.exits
    prefixes = tuple(f"decoder.layers.{index}." for index in layers)
    names = set()
    if layers.start == 0:
        names |= {WORD_EMBEDDING, POSITION_EMBEDDING}
    if layers.stop == model.num_layers:
        prefixes += (FINAL_NORM,)
    if _needs_output_weight(description, layers):
        names.add(_output_name(model))
    shapes = expected_shapes(model, exits)
    return {name: shape for name, shape in shapes.items() if name in names or name.startswith(prefixes)}


def _needs_output_weight(description: ModelDescription, layers: range) -> bool:
    """Whether a head of `layers` uses the weight of the final head."""
    return layers.stop == description.model.num_layers or _has_tied_exits(description.exits, layers)


def _has_tied_exits(exits: ExitConfig, layers: range) -> bool:
    """Whether an exit of `layers` uses the model's output weight."""
    numbers = range(layers.start + 1, layers.stop + 1)
    return any(not head.untied_output for head in exits.heads_of(numbers))


def num_output_weights(description: ModelDescription, layers: range) -> int:
    """Output weights that heads of `layers` read."""
    numbers = range(layers.start + 1, layers.stop + 1)
    untied = sum(head.untied_output for head in description.exits.heads_of(numbers))
    return untied + _needs_output_weight(description, layers)


def _output_name(model: ModelConfig) -> str:
    return OUTPUT_WEIGHT if model.untie_embeddings_and_output_weights else WORD_EMBEDDING


@torch.no_grad()
def decoder_weights(
    tensors: Tensors,
    description: ModelDescription,
    *,
    layers: range | None = None,
    tp: TensorParallel | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    make_linear: MakeLinear = fastest_linear,
    shortlist: tuple[int, ...] = (),
    probes: ExitProbes | None = None,
    certified_heads: CertifiedHeadSetting = "off",
) -> DecoderWeights:
    """Read this rank's part of a model; beside the result, one tensor is in memory at a time.

    tensors: all parameters of the model that `description` describes (`checkpoint.parameters.expected_shapes`); what
    needs no change is shared with them. layers: indices from 0, default all. device: default the CPU. dtype: of weights
    and computation, default that of the parameters. make_linear: (weight, bias) -> the linear layer to use.
    shortlist: ids over which exits are evaluated first; none: they have no approximate heads. probes: of the exits, if
    they have any. certified_heads: of exits and the final head.
    Raises ValueError if the ranks cannot share the weights, and whatever reading a tensor raises."""
    tp = tp or TensorParallel()
    check_can_decode(description.model, tp.size)
    layers = range(description.model.num_layers) if layers is None else layers
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= description.model.num_layers:
        raise ValueError(f"layers is {layers}; the model has the layers 0 to {description.model.num_layers - 1}")
    device = device or torch.device("cpu")
    dtype = dtype or tensors[WORD_EMBEDDING].dtype
    return _Reader(
        tensors, description, layers, tp, device, dtype, make_linear, shortlist, probes, certified_heads
    ).read()


class _Output(NamedTuple):
    """The forms of one output weight."""

    linear: Linear
    certified: CertifiedHead | None
    approximate: ApproximateHead | None


class _Reader:
    """Reads the parameters of some layers."""

    def __init__(
        self,
        tensors: Tensors,
        description: ModelDescription,
        layers: range,
        tp: TensorParallel,
        device: torch.device,
        dtype: torch.dtype,
        make_linear: MakeLinear,
        shortlist: tuple[int, ...],
        probes: ExitProbes | None,
        certified_heads: CertifiedHeadSetting,
    ) -> None:
        self._tensors, self._layers, self._tp, self._device, self._dtype = tensors, layers, tp, device, dtype
        self._make_linear, self._shortlist, self._probes = make_linear, shortlist, probes
        self._certified_heads = certified_heads
        self._description, self._model, self._exits = description, description.model, description.exits
        self._vocab_rows = -(-description.padded_vocab_size // tp.size)
        self._output_name = _output_name(self._model)
        self._num_output_rows: int | None = None
        self._heads: dict[str, _Output] = {}
        """Of each output weight, however many heads use it."""

    def read(self) -> DecoderWeights:
        model = self._model
        is_first, is_last = self._layers.start == 0, self._layers.stop == model.num_layers
        numbers = [number for number in self._exits.exit_layer_nums if number - 1 in self._layers]
        embedding = self._embedding() if is_first else None
        if _needs_output_weight(self._description, self._layers):
            is_approximated = _has_tied_exits(self._exits, self._layers)
            self._read_head(self._output_name, is_approximated, None if embedding is None else embedding.words)
        return DecoderWeights(
            description=self._description,
            first_layer=self._layers.start,
            layers=tuple(self._layer(below(self._tensors, f"decoder.layers.{index}.")) for index in self._layers),
            exits=tuple(self._exit(number) for number in numbers),
            embedding=embedding,
            rotary_frequencies=rotary_frequencies(model) if model.position_embedding_type == "rope" else None,
            final=self._final() if is_last else None,
            num_output_rows=self._num_output_rows,
            vocab_rows=self._vocab_rows,
            has_approximate_heads=bool(self._shortlist) and self._exits.num_exits > 0,
            has_probes=self._probes is not None,
            tp=self._tp,
            dtype=self._dtype,
            device=self._device,
        )

    def _embedding(self) -> EmbeddingWeights:
        words, positions = self._vocabulary_rows(WORD_EMBEDDING), None
        if self._model.position_embedding_type == "learned_absolute":
            positions = self._converted(self._tensors[POSITION_EMBEDDING].read())
        return EmbeddingWeights(words, positions)

    def _final(self) -> FinalHeadWeights:
        head = self._heads[self._output_name]
        return FinalHeadWeights(self._norm(below(self._tensors, FINAL_NORM)), head.linear, head.certified)

    def _converted(self, tensor: Tensor) -> Tensor:
        """In the type and on the device of the decoder, without the rest of a tensor that it is a part of."""
        converted = tensor.to(self._device, self._dtype)
        is_part = converted.untyped_storage().nbytes() > converted.nbytes
        return converted.clone(memory_format=torch.contiguous_format) if is_part else converted

    def _rows(self, tensors: Tensors, name: str, num_blocks: int = 1) -> Tensor:
        """This rank's part of each of `num_blocks` equal blocks of rows, one after the other."""
        tensor = tensors[name].read()
        if self._tp.size == 1:
            return tensor
        parts: Tensor = tensor.unflatten(0, (num_blocks, self._tp.size, -1))[:, self._tp.rank]
        return parts.flatten(0, 1)

    def _bias_rows(self, tensors: Tensors, name: str, num_blocks: int = 1) -> Tensor | None:
        """As `_rows`; None if there is no such tensor."""
        return self._rows(tensors, name, num_blocks) if name in tensors else None

    def _columns(self, tensors: Tensors, name: str) -> Tensor:
        """This rank's columns of a matrix, whose results are summed over the ranks."""
        return tensors[name].read().chunk(self._tp.size, 1)[self._tp.rank]

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return self._make_linear(self._converted(weight), None if bias is None else self._converted(bias))

    def _whole(self, tensors: Tensors, name: str) -> Tensor | None:
        """None if there is no such tensor."""
        return self._converted(tensors[name].read()) if name in tensors else None

    def _norm(self, tensors: Tensors) -> Norm:
        weight = self._converted(tensors["weight"].read())
        return Norm(weight, self._whole(tensors, "bias"), self._model.norm_epsilon)

    def _head_norms(self, attention: Tensors) -> HeadNorms | None:
        """Of queries and keys; None: the model has none."""
        query, key = below(attention, "q_layernorm."), below(attention, "k_layernorm.")
        return HeadNorms(self._head_norm(query), self._head_norm(key)) if query else None

    def _head_norm(self, tensors: Tensors) -> Norm:
        """Its channels in the order that they have here."""
        in_order = {name: one.then(one.shape, lambda v: self._in_pairs(v[None, None])[0, 0])
                    for name, one in tensors.items()}  # fmt: skip
        return self._norm(in_order)

    def _layer(self, tensors: Tensors) -> LayerWeights:
        attention = below(tensors, "self_attention.")
        qkv, bias = self._rows(attention, "linear_qkv.weight"), self._bias_rows(attention, "linear_qkv.bias")
        return LayerWeights(
            attention_norm=self._norm(below(tensors, "input_layernorm.")),
            head_norms=self._head_norms(attention),
            qkv=self._linear(self._by_kind(qkv), None if bias is None else self._by_kind(bias)),
            projection=self._linear(self._columns(attention, "linear_proj.weight")),
            projection_bias=self._whole(attention, "linear_proj.bias"),
            mlp_norm=self._norm(below(tensors, "pre_mlp_layernorm.")),
            mlp=self._mlp(below(tensors, "mlp.")),
        )

    def _by_kind(self, qkv: Tensor) -> Tensor:
        """Rows of core's fused projection, which go by group of heads, in the order queries, keys, values."""
        per_group = self._model.num_attention_heads // self._model.num_kv_heads
        grouped = qkv.view(-1, per_group + 2, self._model.head_size, *qkv.shape[1:])
        rotated = self._in_pairs(grouped[:, : per_group + 1])
        parts = (rotated[:, :per_group], rotated[:, per_group], grouped[:, per_group + 1])
        return torch.cat([part.reshape(-1, *qkv.shape[1:]) for part in parts])

    def _in_pairs(self, heads: Tensor) -> Tensor:
        """[groups, heads, d, ...] with the channels that rotate together side by side (see `attention.RotaryTable`)."""
        if self._model.position_embedding_type != "rope":
            return heads
        size = int(self._model.head_size * self._model.rotary_percent)
        order = torch.arange(size).view(2, -1).t().flatten()  # 0, size/2, 1, size/2 + 1, ...
        return torch.cat([heads[:, :, order], heads[:, :, size:]], dim=2)

    def _mlp(self, tensors: Tensors) -> MlpWeights:
        num_blocks = 2 if self._model.swiglu else 1  # gate and up
        bias = self._bias_rows(tensors, "linear_fc1.bias", num_blocks)
        return MlpWeights(
            fc1=self._linear(self._rows(tensors, "linear_fc1.weight", num_blocks), bias),
            fc2=self._linear(self._columns(tensors, "linear_fc2.weight")),
            fc2_bias=self._whole(tensors, "linear_fc2.bias"),
        )

    def _exit(self, layer_number: int) -> ExitWeights:
        index, layer = self._exits.exit_layer_nums.index(layer_number), f"decoder.layers.{layer_number - 1}"
        head = below(self._tensors, f"{layer}{EXIT_HEAD}")
        kind, output_name = self._exits.head_of(index), self._output_name
        if kind.untied_output:
            output_name = f"{layer}{EXIT_HEAD}{OUTPUT_WEIGHT}"
            self._read_head(output_name, is_approximated=True)
        output = self._heads[output_name]
        network = None if self._probes is None else self._probes.networks.get(layer_number)
        return ExitWeights(
            index=index,
            layer_number=layer_number,
            depth=self._exits.depth_of(layer_number),
            temperature=self._exits.temperature_of(index),
            block=self._layer(below(head, "block.")) if kind.block else None,
            mlp=self._mlp_branch(layer, head) if kind.mlp else None,
            norm=self._norm(below(head, "norm.")) if kind.norm else None,
            output=output.linear,
            approximate=output.approximate,
            certified=output.certified,
            probe=None if network is None else ExitProbe(network, self._device),
        )

    def _mlp_branch(self, layer: str, head: Tensors) -> MlpBranch:
        norm = self._norm(below(self._tensors, f"{layer}.pre_mlp_layernorm."))
        return MlpBranch(norm, self._mlp(below(head, "mlp.")))

    # Weights with a row for each id.

    def _read_head(self, name: str, is_approximated: bool, embedding: Tensor | None = None) -> None:
        """embedding: what is read already, if it may be the weight `name`."""
        weight = embedding if embedding is not None and name == WORD_EMBEDDING else self._vocabulary_rows(name)
        approximate = self._approximate_head(weight) if is_approximated and self._shortlist else None
        linear = self._make_linear(weight, None)
        certified = certified_head(weight, linear, self._tp, self._certified_heads)
        self._heads[name] = _Output(linear, certified, approximate)

    def _vocabulary_rows(self, name: str) -> Tensor:
        """This rank's rows, with zeros behind the last if there are not enough for all ranks."""
        weight = self._tensors[name].read()
        if name == self._output_name:
            self._num_output_rows = _rows_before_zeros(weight)
        mine = weight[self._tp.rank * self._vocab_rows :][: self._vocab_rows]
        if len(mine) < self._vocab_rows:
            mine = torch.cat([mine, mine.new_zeros(self._vocab_rows - len(mine), mine.size(1))])
        return self._converted(mine)

    def _approximate_head(self, weight: Tensor) -> ApproximateHead:
        """weight: this rank's rows"""
        rows, rank = self._vocab_rows, self._tp.rank
        ids = torch.tensor(sorted(set(self._shortlist)))
        num_columns = int(torch.bincount(ids // rows).max())  # of the rank that holds most of them
        mine = ids[ids // rows == rank] - rank * rows
        local = torch.cat([mine, mine.new_zeros(num_columns - len(mine))]).to(weight.device)
        return ApproximateHead(self._make_linear(weight[local], None), ShortlistColumns(local + rank * rows, len(mine)))


def _rows_before_zeros(weight: Tensor) -> int:
    """weight: [rows, h]"""
    count = len(weight)
    while count > 0 and not weight[count - 1].any():
        count -= 1
    return count
