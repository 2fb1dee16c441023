"""How large a model is and what it computes, from its settings alone: parameters, bytes, FLOPs of parts and stages.

All sizes are of one tensor-parallel rank. FLOPs are those of matrix products and causal attention; activations follow
Korthikanti et al. (arXiv:2205.05198) for attention without its score matrix. Needs neither torch
nor core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron.early_exit.config.exits import ExitHeadKind, num_sampled_tokens
from megatron.early_exit.config.run import ResolvedConfig, RunConfig

# A chunk's fp32 logits take at most this much memory on each rank...
_CHUNK_BYTES = 64 * 2**20
# ...but a chunk has at least this many tokens: smaller matrix products waste the hardware.
_MIN_CHUNK_TOKENS = 128
# A GPU reads and writes the sum of weight gradients, 12 bytes for each weight, in every chunk. With so many tokens that
# takes a fifth of the time of the chunk's matrix products (H100: 3 TB/s, 600 TFLOP/s)...
_GPU_CHUNK_TOKENS = 2048
# ...unless the vocabulary is so large that their fp32 logits take more than this.
_MAX_GPU_CHUNK_BYTES = 2**30


# Parameters


def stage_parameters(config: ResolvedConfig, layers: Sequence[int], is_first: bool, is_last: bool) -> int:
    """Parameters of one model chunk. layers: numbers, from 1; is_first, is_last: of the model's chunks."""
    model = config.model
    heads = config.exits.heads_of(layers)
    count = len(layers) * layer_parameters(config) + sum(exit_parameters(config, head) for head in heads)
    has_final_head = is_last and config.build.builds_final_head
    if is_first:
        count += output_parameters(config)
        if model.position_embedding_type == "learned_absolute":
            count += config.max_position_embeddings * model.hidden_size
    if has_final_head:
        count += _norm_parameters(config)
    # The output weight, or a copy of it, unless it is the embedding that is there already.
    distils = config.build.distillation_share > 0
    uses_output_weight = has_final_head or any(distils or not head.untied_output for head in heads)
    if uses_output_weight and (model.untie_embeddings_and_output_weights or not is_first):
        count += output_parameters(config)
    return count


def output_parameters(config: ResolvedConfig) -> int:
    """Parameters of an output projection, or of the word embedding."""
    return config.description.padded_vocab_size * config.model.hidden_size // config.parallel.tensor_model_parallel_size


def exit_parameters(config: ResolvedConfig, head: ExitHeadKind) -> int:
    """Parameters of one exit, without an output weight that is the model's."""
    return (
        head.untied_output * output_parameters(config)
        + head.norm * _norm_parameters(config)
        + head.mlp * _mlp_parameters(config)
        + head.block * layer_parameters(config)
    )


def layer_parameters(config: RunConfig) -> int:
    """Parameters of one transformer layer without its exit."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    queries = model.num_attention_heads * model.head_size
    fused = queries + 2 * model.num_kv_heads * model.head_size
    count = (fused + queries) * model.hidden_size // tp
    if model.add_bias_linear or model.add_qkv_bias:
        count += fused // tp
    if model.add_bias_linear:
        count += model.hidden_size
    if model.qk_layernorm:
        count += 2 * model.head_size * (2 if model.normalization == "LayerNorm" else 1)
    return count + 2 * _norm_parameters(config) + _mlp_parameters(config)


def _norm_parameters(config: RunConfig) -> int:
    return config.model.hidden_size * (2 if config.model.normalization == "LayerNorm" else 1)


def _mlp_parameters(config: RunConfig) -> int:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    wide = model.ffn_size * (2 if model.swiglu else 1)
    weights = (wide + model.ffn_size) * model.hidden_size // tp
    return weights + (wide // tp + model.hidden_size if model.add_bias_linear else 0)


# Bytes


def weight_bytes(config: RunConfig, parameters: int) -> int:
    return parameters * (2 if _is_half(config) else 4)


def gradient_bytes(config: RunConfig, trained: int) -> int:
    """Buffer of main gradients. trained: parameters."""
    training = config.training
    is_fp16_buffer = training.fp16 and not config.parallel.accumulate_allreduce_grads_in_fp32
    return trained * (2 if is_fp16_buffer else 4)


def optimizer_bytes(config: RunConfig, world_size: int, trained: int) -> int:
    """Moments (Adam's two, SGD's one), and fp32 weights beside half-precision ones. trained: parameters."""
    optimizer = config.optimizer
    moments = 2 if optimizer.optimizer == "adam" else int(optimizer.sgd_momentum > 0)
    state = trained * (4 * moments + (4 if _is_half(config) else 0))
    if config.parallel.use_distributed_optimizer:
        state //= config.parallel.data_parallel_size(world_size)
    return state


def hidden_states_bytes(config: RunConfig) -> int:
    """Hidden states [s, b, h] of one microbatch, whole."""
    training = config.training
    width = 2 if _is_half(config) else 4
    return training.seq_length * training.micro_batch_size * config.model.hidden_size * width


def cached_samples(config: RunConfig, num_drawn: int) -> int:
    """Samples that --cache-hidden-states holds. num_drawn: that training draws in all."""
    return min(config.training.cache_samples or num_drawn, num_drawn)


def cache_bytes(config: RunConfig, num_drawn: int) -> int:
    """What the files of --cache-hidden-states take. num_drawn: samples that training draws in all."""
    num_points = config.exits.num_exits + (config.training.tune_exit_distillation > 0)
    width = config.model.hidden_size * (2 if _is_half(config) else 4)
    return num_points * cached_samples(config, num_drawn) * config.training.seq_length * width


def activation_bytes(config: RunConfig, num_layers: int) -> int:
    """What the layers of one model chunk keep of one microbatch from its forward to its backward.

    A recomputed layer keeps its input."""
    num_recomputed = num_recomputed_layers(config, num_layers)
    kept = sharded_hidden_states_bytes(config) * num_recomputed
    return kept + layer_activation_bytes(config) * (num_layers - num_recomputed)


def num_recomputed_layers(config: RunConfig, num_layers: int) -> int:
    """Layers of a model chunk of `num_layers` that run again, whole, in the backward."""
    parallel = config.parallel
    if parallel.recompute_granularity != "full":
        return 0
    if parallel.recompute_method != "block":
        return num_layers
    assert parallel.recompute_num_layers is not None, "--recompute-method block goes with --recompute-num-layers"
    return min(parallel.recompute_num_layers, num_layers)


def layer_activation_bytes(config: RunConfig) -> int:
    """What one layer that is not recomputed keeps of one microbatch: 34 bytes for every half-precision element."""
    parallel = config.parallel
    tp, elements = parallel.tensor_model_parallel_size, hidden_states_bytes(config) // 2
    return elements * 34 // tp if parallel.sequence_parallel else elements * (10 * tp + 24) // tp


def sharded_hidden_states_bytes(config: RunConfig) -> int:
    """Hidden states between layers on one rank: with sequence parallelism, its part."""
    parallel = config.parallel
    return hidden_states_bytes(config) // (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def logits_chunk_bytes(config: ResolvedConfig, num_tokens: int) -> int:
    """fp32 logits of one chunk of tokens: all of them that ever exists. num_tokens: of a microbatch, whose loss is
    computed."""
    columns = config.description.padded_vocab_size // config.parallel.tensor_model_parallel_size
    return min(chunk_size(columns, is_gpu=True), num_tokens) * columns * 4


def microbatch_tokens(config: RunConfig) -> int:
    """Tokens of one microbatch."""
    return config.training.seq_length * config.training.micro_batch_size


def exit_tokens(config: RunConfig, exit_index: int) -> int:
    """Tokens of one microbatch that an exit learns from."""
    return num_sampled_tokens(config.exits.token_fraction_of(exit_index), microbatch_tokens(config))


def chunk_size(local_vocab_size: int, *, is_gpu: bool) -> int:
    """Tokens of one chunk for a rank that holds `local_vocab_size` rows of the output weight."""
    in_bytes = lambda size: size // (4 * local_vocab_size) // _MIN_CHUNK_TOKENS * _MIN_CHUNK_TOKENS
    tokens = in_bytes(_CHUNK_BYTES)
    if is_gpu:
        tokens = max(tokens, min(_GPU_CHUNK_TOKENS, in_bytes(_MAX_GPU_CHUNK_BYTES)))
    return max(tokens, _MIN_CHUNK_TOKENS)


def _is_half(config: RunConfig) -> bool:
    return config.training.dtype != "fp32"


# FLOPs of all tensor-parallel ranks together, forward and backward, for one token


def layer_flops_per_token(config: RunConfig) -> int:
    """Six for every weight of a matrix product, and causal attention: two products over half the sequence."""
    model = config.model
    attention_width = model.num_attention_heads * model.head_size
    projections = model.hidden_size * (2 * attention_width + 2 * model.num_kv_heads * model.head_size)
    return 6 * (projections + _mlp_weights(config)) + 6 * attention_width * config.training.seq_length


def output_flops_per_token(config: RunConfig, vocab_size: int) -> int:
    """FLOPs of one output projection for one token."""
    return 6 * config.model.hidden_size * vocab_size


def exit_flops_per_token(config: RunConfig, exit_index: int, vocab_size: int) -> float:
    """FLOPs of one exit for one token of the microbatch: its output projection sees those that it learns from, a block
    or an MLP branch sees all."""
    return config.exits.token_fraction_of(exit_index) * output_flops_per_token(
        config, vocab_size
    ) + branch_flops_per_token(config, config.exits.head_of(exit_index))


def tuned_exit_flops_per_token(config: RunConfig, exit_index: int, vocab_size: int, distillation_share: float) -> float:
    """FLOPs of one exit that is tuned while the rest of the model is frozen, for one token of the microbatch.

    Its output projection's logits, the gradients of what is its own, and the final head's logits if it distils, are of
    the tokens that it learns from. No gradient is taken of an output weight that is the model's."""
    head, fraction = config.exits.head_of(exit_index), config.exits.token_fraction_of(exit_index)
    has_more = replace(head, untied_output=False).has_parameters
    products = 1 + has_more + head.untied_output + (distillation_share > 0)
    output = fraction * products * output_flops_per_token(config, vocab_size) / 3
    return output + branch_flops_per_token(config, head)


def branch_flops_per_token(config: RunConfig, head: ExitHeadKind) -> int:
    """FLOPs of an exit's block or MLP branch for one token; 0 without either."""
    return head.block * layer_flops_per_token(config) + head.mlp * 6 * _mlp_weights(config)


def _mlp_weights(config: RunConfig) -> int:
    model = config.model
    return (3 if model.swiglu else 2) * model.hidden_size * model.ffn_size
