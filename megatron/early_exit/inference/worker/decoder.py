"""Some layers of a model as decoding runs them: on any rows, over fused weights and a preallocated KV cache.

It knows rows and layers, not requests: which exits are evaluated, and which rows are deferred, is for others to say.
Layers are counted by depth, the number of layers of the whole model that a row has run; exits by their index among all
exits of the model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.early_exit.inference.worker.attention import Attention, AttentionMetadata, Segment, rotate
from megatron.early_exit.inference.worker.certified_head import CertifiedHead
from megatron.early_exit.inference.worker.graphs import FixedAttentionMetadata, Launch, ModelGraphs, Part
from megatron.early_exit.inference.worker.head_output import AnyOutput, ArgmaxOutput, HeadOutput, ShortlistColumns
from megatron.early_exit.inference.worker.kv_cache import KVCache
from megatron.early_exit.inference.worker.linear import Linear
from megatron.early_exit.inference.worker.weights import (
    DecoderWeights,
    ExitWeights,
    HeadNorms,
    LayerWeights,
    MlpWeights,
)
from megatron.early_exit.platform.device import to_device


class _Block(NamedTuple):
    """The transformer block of an exit."""

    weights: LayerWeights
    cache_index: int
    """Its keys and values, behind those of the layers."""


class Decoder:
    """All tensor-parallel ranks make the same calls with the same arguments."""

    def __init__(
        self,
        weights: DecoderWeights,
        *,
        num_slots: int,
        num_positions: int | None = None,
        vocab_size: int | None = None,
        use_graphs: bool | None = None,
        layers_per_stage: tuple[int, ...] = (),
    ) -> None:
        """num_slots: requests that run at once. num_positions: longest sequence, default what the model takes.
        vocab_size: ids of the tokenizer, default all rows of the embedding. use_graphs: run layers as CUDA graphs,
        default on a GPU that shares its layers with no other (see `graphs.py` for what it does on a CPU).
        layers_per_stage: of all pipeline stages; empty: all layers are here.

        Raises ValueError if the model does not take sequences of `num_positions`."""
        model, longest = weights.description.model, weights.description.max_position_embeddings
        self.weights, self.layers_per_stage = weights, layers_per_stage
        self.num_layers, self.first_layer, self.last_layer = model.num_layers, weights.first_layer, weights.last_layer
        self.exits = weights.exits  # of these layers
        self._exits = {one.index: one for one in self.exits}
        self.num_positions = longest if num_positions is None else num_positions
        if not 1 <= self.num_positions <= longest:
            raise ValueError(f"the model takes sequences of 1 to {longest} tokens, not {num_positions}")
        self.vocab_size = weights.vocab_rows * weights.tp.size if vocab_size is None else vocab_size
        self._head_size = model.head_size
        self._num_heads = model.num_attention_heads // weights.tp.size
        self._num_kv_heads = model.num_kv_heads // weights.tp.size
        self._swiglu, self._gelu = model.swiglu, "tanh" if model.openai_gelu else "none"
        # A block exit attends to what it has seen itself.
        blocks = [(one.index, one.block) for one in self.exits if one.block is not None]
        self._blocks = {
            index: _Block(block, len(weights.layers) + number) for number, (index, block) in enumerate(blocks)
        }
        if weights.device.type == "cpu":
            # Numbers so small that processors are slow with them are zeros, as in a GPU's matrix products.
            torch.set_flush_denormal(True)
        else:
            # cuDNN plans its attention anew for every shape, and the number of keys changes with every step and prompt:
            # 60 to 70 ms each on an H100, where the other kernels take 0.05.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if use_graphs is None:
            use_graphs = weights.device.type == "cuda" and weights.tp.size == 1
        # Rows that only fill the batch of a graph need a position where they write.
        self.cache = KVCache(
            len(weights.layers) + len(self._blocks), num_slots, self.num_positions + use_graphs,
            self._num_kv_heads, model.head_size, dtype=weights.dtype, device=weights.device,
        )  # fmt: skip
        self._attention = Attention(self.cache, self._num_heads, weights.rotary_frequencies)
        depths = sorted({self.first_layer, self.last_layer, *(one.depth for one in self.exits)})
        self._ranges = list(itertools.pairwise(depths))
        self.graphs: ModelGraphs | None = None
        if use_graphs:
            self.graphs = ModelGraphs(self._graph_parts(), model.hidden_size, self._attention)
            self.graphs.capture()

    def _graph_parts(self) -> dict[Part, Launch]:
        """What runs as graphs: the layers between two exits by (first, last), and the blocks of exits by exit index."""
        parts: dict[Part, Launch] = {}
        for first, last in self._ranges:
            parts[first, last] = functools.partial(self._launch_layers, first=first, last=last)
        for index in self._blocks:
            parts[index] = functools.partial(self._launch_exit_block, exit_index=index)
        return parts

    def exit(self, exit_index: int) -> ExitWeights:
        """An exit of these layers, by its index among all exits of the model."""
        return self._exits[exit_index]

    def attention_metadata(self, segments: Sequence[Segment]) -> AttentionMetadata:
        """What `run_layers` needs to know of the rows of `segments`, in the order of slots."""
        return AttentionMetadata(segments, self._attention)

    def embed(self, tokens: Sequence[int], attention: AttentionMetadata) -> Tensor:
        """[rows, h]: what the first layer of the model, which must be here, reads."""
        embedding = self.weights.embedding
        assert embedding is not None, "the first layer of the model is not here"
        ids, table = to_device(tokens, self.weights.device), embedding.words
        if self.weights.tp.size == 1:
            hidden = F.embedding(ids, table)
        else:
            local = ids - self.weights.tp.rank * table.size(0)
            is_mine = (local >= 0) & (local < table.size(0))
            hidden = F.embedding(local * is_mine, table) * is_mine[:, None]
            self.weights.tp.sum(hidden)
        if embedding.positions is not None:
            hidden = hidden + embedding.positions[attention.positions]
        return hidden

    def run_layers(self, hidden: Tensor, attention: AttentionMetadata, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Run rows that have run `first` layers until they have run `last`, writing keys and values.

        hidden: [rows, h]. Returns the same after the last of these layers, and its residual after attention, which an
        MLP branch reads (`hidden` itself if no layer runs)."""
        if self.graphs is not None:
            parts = [one for one in self._ranges if first <= one[0] and one[1] <= last]
            if parts and (parts[0][0], parts[-1][1]) == (first, last):
                outputs = self.graphs.run(parts, hidden, attention)
                if outputs is not None:
                    return outputs
        return self._launch_layers(hidden, attention, first, last)

    def _launch_layers(
        self, hidden: Tensor, attention: AttentionMetadata | FixedAttentionMetadata, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        """As `run_layers`, kernel by kernel."""
        residual = hidden
        for index in range(first - self.first_layer, last - self.first_layer):
            residual, hidden = self._run_layer(self.weights.layers[index], index, hidden, attention)
        return hidden, residual

    def run_exit_block(self, exit_index: int, hidden: Tensor, attention: AttentionMetadata) -> Tensor:
        """The transformer block of an exit over rows that it has not seen; as `run_layers`."""
        outputs = None if self.graphs is None else self.graphs.run([exit_index], hidden, attention)
        if outputs is None:
            outputs = self._launch_exit_block(hidden, attention, exit_index)
        return outputs[0]

    def _launch_exit_block(
        self, hidden: Tensor, attention: AttentionMetadata | FixedAttentionMetadata, exit_index: int
    ) -> tuple[Tensor, Tensor]:
        block = self._blocks[exit_index]
        residual, hidden = self._run_layer(block.weights, block.cache_index, hidden, attention)
        return hidden, residual

    @property
    def has_approximate_heads(self) -> bool:
        """Whether `approximate_output` is cheaper, and says less, than `exit_output`, here and on other stages."""
        return self.weights.has_approximate_heads

    @overload
    def approximate_output(self, exit_index: int, hidden: Tensor) -> HeadOutput: ...

    @overload
    def approximate_output(self, exit_index: int, hidden: Tensor, *, tokens_only: bool) -> AnyOutput: ...

    def approximate_output(self, exit_index: int, hidden: Tensor, *, tokens_only: bool = False) -> AnyOutput:
        """What decides whether an exit may be taken, or is drafted from: its approximate head, or its own.

        Over a shortlist without the best token the first tells less than the exit's own head; with it, the confidence
        is at least as large: only some of the ids share the probability. Arguments as of `exit_output`."""
        approximate = self.exit(exit_index).approximate
        if approximate is None:
            return self.exit_output(exit_index, hidden, tokens_only=tokens_only)
        logits = approximate.linear(self._exit_hidden(exit_index, hidden))
        temperature = self.exit(exit_index).temperature
        return self._output(logits, temperature, approximate.columns)

    @property
    def has_probes(self) -> bool:
        """Whether exits, here and on other stages, have probes."""
        return self.weights.has_probes

    def probe_scores(self, exit_index: int, hidden: Tensor) -> list[float]:
        """What the exit's probe says of rows, the same on all ranks. Arguments as of `exit_output`."""
        probe = self.exit(exit_index).probe
        assert probe is not None, "requests that ask probes which are not there are refused"
        # Ranks may have added up the hidden states in other orders, and must decide alike.
        scores: list[float] = self.weights.tp.gather(probe(hidden))[0].tolist()
        return scores

    @overload
    def exit_output(self, exit_index: int, hidden: Tensor) -> HeadOutput: ...

    @overload
    def exit_output(self, exit_index: int, hidden: Tensor, *, tokens_only: bool) -> AnyOutput: ...

    def exit_output(self, exit_index: int, hidden: Tensor, *, tokens_only: bool = False) -> AnyOutput:
        """What the exit's own head says about rows.

        hidden: [rows, h]; of a block exit, what the block made of them; of an MLP branch, the residual after attention
        of the exit's layer. tokens_only: nothing but the most probable token of each row is needed, which may cost less
        (`ArgmaxOutput`)."""
        head, hidden = self.exit(exit_index), self._exit_hidden(exit_index, hidden)
        certified = head.certified if tokens_only else None
        return self._certified_or_exact(certified, head.output, hidden, head.temperature)

    def _exit_hidden(self, exit_index: int, hidden: Tensor) -> Tensor:
        """[rows, h]: what an exit's output projection reads. hidden: as of `exit_output`"""
        head = self.exit(exit_index)
        if head.mlp is not None:
            hidden = self._add_mlp(head.mlp.mlp, head.mlp.norm(hidden), hidden)
        if head.norm is not None:
            hidden = head.norm(hidden)
        return hidden

    @overload
    def final_output(self, hidden: Tensor) -> HeadOutput: ...

    @overload
    def final_output(self, hidden: Tensor, *, tokens_only: bool) -> AnyOutput: ...

    def final_output(self, hidden: Tensor, *, tokens_only: bool = False) -> AnyOutput:
        """What the final head, which must be here, says about rows that have run all layers.

        hidden: [rows, h]. tokens_only: as of `exit_output`"""
        final = self.weights.final
        assert final is not None, "the last layer of the model is not here"
        return self._certified_or_exact(final.certified if tokens_only else None, final.output, final.norm(hidden))

    def _certified_or_exact(
        self, certified: CertifiedHead | None, linear: Linear, hidden: Tensor, temperature: float = 1.0
    ) -> AnyOutput:
        """Tokens alone, if the certified head is there, pays for so many rows and has an answer; else all logits."""
        tokens = None if certified is None else certified.tokens(hidden, self.vocab_size, temperature)
        return self._output(linear(hidden), temperature) if tokens is None else ArgmaxOutput(tokens)

    def _output(self, logits: Tensor, temperature: float, shortlist: ShortlistColumns | None = None) -> HeadOutput:
        if temperature != 1.0:
            logits = logits.float() / temperature
        return HeadOutput(logits, vocab_size=self.vocab_size, tp=self.weights.tp, shortlist=shortlist)

    def _run_layer(
        self,
        layer: LayerWeights,
        cache_index: int,
        hidden: Tensor,
        attention: AttentionMetadata | FixedAttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        """(residual after attention, output), each [rows, h]"""
        heads = layer.qkv(layer.attention_norm(hidden))
        if heads.dtype != self.weights.dtype:
            heads = heads.to(self.weights.dtype)
        heads = heads.view(attention.num_rows, -1, self._head_size)
        if layer.head_norms is not None:
            heads = self._norm_heads(layer.head_norms, heads)
        if attention.rotation is not None:
            heads = rotate(heads, attention.rotation)
        queries, keys_and_values = heads.split((self._num_heads, 2 * self._num_kv_heads), 1)
        attention.write(cache_index, keys_and_values)
        context = attention.attend(cache_index, queries)
        residual = self._add(layer.projection, context, layer.projection_bias, hidden)
        return residual, self._add_mlp(layer.mlp, layer.mlp_norm(residual), residual)

    def _norm_heads(self, norms: HeadNorms, heads: Tensor) -> Tensor:
        """Queries and keys, each head normalised. heads: [rows, heads, d], values last"""
        kinds = heads.split((self._num_heads, self._num_kv_heads, self._num_kv_heads), 1)
        both = zip((norms.query, norms.key), kinds)
        normed = [norm(kind.reshape(-1, self._head_size)).view(kind.shape) for norm, kind in both]
        return torch.cat([*normed, kinds[2]], 1)

    def _add_mlp(self, mlp: MlpWeights, normed: Tensor, residual: Tensor) -> Tensor:
        wide = mlp.fc1(normed)
        if self._swiglu:
            gate, up = wide.chunk(2, -1)
            wide = F.silu(gate).mul_(up)
        else:
            wide = F.gelu(wide, approximate=self._gelu)
        return self._add(mlp.fc2, wide, mlp.fc2_bias, residual)

    def _add(self, linear: Linear, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """residual + linear(x) + bias, summed over the ranks, which hold a part of the inputs each."""
        if self.weights.tp.size == 1:
            out = linear.add_to(residual, x)
        else:
            part = linear(x).to(residual.dtype).contiguous()
            self.weights.tp.sum(part)
            out = part.add_(residual)
        return out if bias is None else out.add_(bias)
