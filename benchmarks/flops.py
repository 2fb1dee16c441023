"""Floating-point operations of training, by formula, to compare the time that exits add with the work that they add.

Counts matrix products only, a multiply and an add as two operations. Every weight matrix of n elements costs 2 n per
token in forward and twice that in backward (gradients of input and weight): 6 n. Causal attention multiplies, per token
and query head of width d, on average s / 2 positions in two products: 2 s d in forward, 6 s d with backward.
Embedding lookups, norms, softmax, loss and optimizer are not counted, nor what a kernel recomputes.
"""

from __future__ import annotations

from megatron.early_exit.config.exits import ExitConfig, ExitHeadKind
from megatron.early_exit.config.model import ModelConfig


def layer_flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Forward and backward of one transformer layer."""
    query_size = model.num_attention_heads * model.head_size
    key_value_size = 2 * model.num_kv_heads * model.head_size
    attention_weights = model.hidden_size * (2 * query_size + key_value_size)
    return 6 * (attention_weights + _mlp_weights(model)) + 6 * seq_length * query_size


def _mlp_weights(model: ModelConfig) -> int:
    return (3 if model.swiglu else 2) * model.hidden_size * model.ffn_size


def exit_flops_per_token(model: ModelConfig, head: ExitHeadKind, vocab_size: int, seq_length: int) -> int:
    """What one exit adds: 6 h V for its output projection, and its MLP branch or block."""
    flops = 6 * model.hidden_size * vocab_size
    if head.mlp:
        flops += 6 * _mlp_weights(model)
    if head.block:
        flops += layer_flops_per_token(model, seq_length)
    return flops


def model_flops_per_token(model: ModelConfig, vocab_size: int, seq_length: int) -> int:
    """Forward and backward of the model without exits, final output projection included."""
    return model.num_layers * layer_flops_per_token(model, seq_length) + 6 * model.hidden_size * vocab_size


def added_flops_share(model: ModelConfig, exits: ExitConfig, vocab_size: int, seq_length: int) -> float:
    """FLOPs of all exits over the FLOPs of the model without them."""
    added = sum(exit_flops_per_token(model, head, vocab_size, seq_length) for head in exits.heads)
    return added / model_flops_per_token(model, vocab_size, seq_length)
