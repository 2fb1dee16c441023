"""Architecture of the backbone: sizes and the choices that change its function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron.early_exit.config.ranges import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ProperFraction,
    at_least,
    at_most,
)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only GPT or Llama. Names are Megatron's."""

    num_layers: Annotated[int, at_least(1), at_most(10_000)]
    """Transformer layers."""

    hidden_size: PositiveInt
    """Width of the hidden states."""

    num_attention_heads: PositiveInt
    """Query heads."""

    ffn_hidden_size: PositiveInt | None = None
    """Width of the MLP. Default: 4 h, or with --swiglu 8/3 h rounded down to a multiple of 64, as Megatron."""

    kv_channels: PositiveInt | None = None
    """Width of one head. Default: hidden size / heads."""

    group_query_attention: bool = False
    """Share keys and values among groups of query heads."""

    num_query_groups: PositiveInt = 1
    """Key/value heads, with --group-query-attention."""

    max_position_embeddings: PositiveInt | None = None
    """Longest sequence that the model accepts. Default: --seq-length."""

    position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute"
    """How positions enter the model."""

    rotary_base: PositiveInt = 10000
    """Base of the rotary frequencies."""

    rotary_percent: Fraction = 1.0
    """Share of each head's channels that is rotated."""

    use_rope_scaling: bool = False
    """Scale the rotary frequencies as Llama 3.1 does, for sequences longer than the 8,192 tokens of Llama 3."""

    rope_scaling_factor: PositiveFloat = 8.0
    """By how much, with --use-rope-scaling."""

    rotary_seq_len_interpolation_factor: PositiveFloat | None = None
    """Divide positions by this before they turn anything (linear interpolation)."""

    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Norm before attention, before the MLP, before the output and in exits."""

    norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance in norms."""

    qk_layernorm: bool = False
    """Normalise every head's query and key before they are rotated (Qwen3)."""

    swiglu: bool = False
    """Gated MLP with SiLU instead of GELU."""

    openai_gelu: bool = False
    """GELU by its tanh approximation, as GPT-2 has it."""

    add_bias_linear: bool = True
    """Biases in attention and MLP linear layers (--disable-bias-linear turns them off)."""

    add_qkv_bias: bool = False
    """Biases in the query, key and value projection alone (Qwen2)."""

    untie_embeddings_and_output_weights: bool = False
    """The output projection has a weight of its own instead of the word embedding."""

    hidden_dropout: ProperFraction = 0.1
    """Dropout on what attention and MLP add to the residual, and on embeddings."""

    attention_dropout: ProperFraction = 0.1
    """Dropout on attention probabilities."""

    init_method_std: NonNegativeFloat = 0.02
    """Standard deviation of the initial weights."""

    apply_query_key_layer_scaling: bool = False
    """Accepted and without effect: attention keeps scores in fp32, where they cannot overflow."""

    make_vocab_size_divisible_by: PositiveInt = 128
    """Pad the vocabulary to a multiple of this times the tensor-parallel size."""

    padded_vocab_size: PositiveInt | None = None
    """Rows of the embedding; set it to keep the vocabulary of a checkpoint. Default: the tokenizer's, padded."""

    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Submodules of a layer: PyTorch's own (SDPA attention) or Transformer Engine's."""

    @property
    def ffn_size(self) -> int:
        """Width of the MLP after defaults."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.swiglu:
            return max(8 * self.hidden_size // 3 // 64, 1) * 64
        return 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Width of one attention head after defaults."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads after defaults."""
        return self.num_query_groups if self.group_query_attention else self.num_attention_heads

    def padded_to(self, vocab_size: int, tensor_parallel_size: int) -> int:
        """Rows of the embedding for a tokenizer with `vocab_size` ids."""
        if self.padded_vocab_size is not None:
            return self.padded_vocab_size
        multiple = self.make_vocab_size_divisible_by * tensor_parallel_size
        return -(-vocab_size // multiple) * multiple
