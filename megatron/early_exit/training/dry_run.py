"""What a run would be, from its settings alone: `--dry-run` builds nothing and starts no other process.

Memory is an estimate: parameters, gradients and optimizer state are counted, activations follow Korthikanti et al.
(arXiv:2205.05198, attention without its score matrix), temporary buffers and fragmentation are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.serialize import max_positions
from megatron.early_exit.data.tokenizer import build_tokenizer


@dataclass(frozen=True)
class StageEstimate:
    """One pipeline stage, on each of its tensor-parallel ranks."""

    layers: tuple[int, ...]
    """Numbers, from 1."""
    exits: tuple[int, ...]
    parameters: int
    trained: int
    """Of them."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def stages(config: RunConfig, world_size: int) -> list[StageEstimate]:
    """Estimates of all stages. config: with `padded_vocab_size`."""
    num_chunks, num_stages = config.parallel.num_model_chunks(config.model.num_layers), config.parallel.num_stages
    per_chunk = config.layers_per_stage // num_chunks
    starts = range(1, config.num_built_layers + 1, per_chunk)
    chunks = [tuple(range(start, min(start + per_chunk, config.num_built_layers + 1))) for start in starts]
    return [_stage(config, world_size, stage, chunks) for stage in range(num_stages)]


def _stage(config: RunConfig, world_size: int, stage: int, chunks: list[tuple[int, ...]]) -> StageEstimate:
    """chunks: layers of all chunks of the model; every stage has one after the other in turn."""
    parallel, training = config.parallel, config.training
    mine = range(stage, len(chunks), parallel.num_stages)
    layers = tuple(layer for index in mine for layer in chunks[index])
    exits = tuple(layer for layer in layers if layer in config.exits.exit_layer_nums)
    count = sum(_chunk_parameters(config, chunks[index], index == 0, index == len(chunks) - 1) for index in mine)
    trained = len(exits) * _exit_parameters(config) if training.tune_exit else count
    is_half = training.bf16 or training.fp16
    gradient = 4 if not is_half or training.bf16 or parallel.accumulate_allreduce_grads_in_fp32 else 2
    state = trained * (12 if is_half else 8)
    if parallel.use_distributed_optimizer:
        state //= parallel.data_parallel_size(world_size)
    has_head = bool(exits) or stage == parallel.num_stages - 1
    return StageEstimate(
        layers, exits, count, trained, count * (2 if is_half else 4), trained * gradient, state,
        _activation_bytes(config, stage, len(layers), has_head),
    )  # fmt: skip


def _chunk_parameters(config: RunConfig, layers: tuple[int, ...], is_first: bool, is_last: bool) -> int:
    model = config.model
    num_exits = sum(layer in config.exits.exit_layer_nums for layer in layers)
    count = len(layers) * _layer_parameters(config) + num_exits * _exit_parameters(config)
    has_final_head = is_last and config.builds_final_head
    if is_first:
        count += _output_parameters(config)
        if model.position_embedding_type == "learned_absolute":
            count += max_positions(config) * model.hidden_size
    if has_final_head:
        count += _norm_parameters(config)
    # The output weight, or a copy of it, unless it is the embedding that is there already.
    uses_output_weight = has_final_head or (num_exits > 0 and not config.exits.untie_exit_output_weights)
    if uses_output_weight and (model.untie_embeddings_and_output_weights or not is_first):
        count += _output_parameters(config)
    return count


def _output_parameters(config: RunConfig) -> int:
    return config.model.padded_vocab_size * config.model.hidden_size // config.parallel.tensor_model_parallel_size


def _norm_parameters(config: RunConfig) -> int:
    return config.model.hidden_size * (2 if config.model.normalization == "LayerNorm" else 1)


def _exit_parameters(config: RunConfig) -> int:
    exits = config.exits
    return (
        exits.untie_exit_output_weights * _output_parameters(config)
        + exits.use_exit_norm * _norm_parameters(config)
        + exits.use_exit_mlp * _mlp_parameters(config)
        + exits.use_exit_block * _layer_parameters(config)
    )


def _mlp_parameters(config: RunConfig) -> int:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    wide = model.ffn_size * (2 if model.swiglu else 1)
    weights = (wide + model.ffn_size) * model.hidden_size // tp
    return weights + (wide // tp + model.hidden_size if model.add_bias_linear else 0)


def _layer_parameters(config: RunConfig) -> int:
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


def _activation_bytes(config: RunConfig, stage: int, num_layers: int, has_head: bool) -> int:
    model, parallel, training = config.model, config.parallel, config.training
    tp = parallel.tensor_model_parallel_size
    width = 2 if training.bf16 or training.fp16 else 4
    hidden = training.seq_length * training.micro_batch_size * model.hidden_size * width // 2
    if parallel.recompute_granularity == "full":
        per_layer = 2 * hidden // (tp if parallel.sequence_parallel else 1)
    else:
        per_layer = hidden * 34 // tp if parallel.sequence_parallel else hidden * (10 * tp + 24) // tp
    if training.tune_exit:
        in_flight, num_layers = 1, 1  # nothing is kept of a frozen layer
    else:
        microbatches = (training.global_batch_size or 1) // max(training.micro_batch_size, 1)
        in_flight = min(parallel.num_stages - stage, max(microbatches, 1))
    head = 0
    if has_head:
        from megatron.early_exit.model.cross_entropy import chunk_size

        columns = model.padded_vocab_size // tp
        head = chunk_size(columns) * columns * 4
    return in_flight * num_layers * per_layer + head


def describe(config: RunConfig, world_size: int) -> str:
    """The run in a few lines. Raises ValueError if the tokenizer cannot be read."""
    training, parallel = config.training, config.parallel
    note = ""
    if config.model.padded_vocab_size is None:
        try:
            size = build_tokenizer(config.data).vocab_size
        except ValueError as error:
            size, note = 32000, f" (a guess: {error})"
        padded = config.model.padded_to(size, parallel.tensor_model_parallel_size)
        config = replace(config, model=replace(config.model, padded_vocab_size=padded))
    dp = parallel.data_parallel_size(world_size)
    batch = training.global_batch_size or training.micro_batch_size * dp
    tokens = batch * training.seq_length
    iterations = training.train_iters or -(-training.train_samples // batch)
    lines = [
        f"layout      {world_size} ranks = TP {parallel.tensor_model_parallel_size} x PP {parallel.num_stages}"
        f" x DP {dp}",
        f"batch       {batch:,} sequences of {training.seq_length:,} tokens = {tokens:,} tokens, "
        f"{batch // (training.micro_batch_size * dp)} microbatches of {training.micro_batch_size} on each replica",
        f"length      {iterations:,} iterations, {iterations * tokens:,} tokens",
        f"vocabulary  {config.model.padded_vocab_size:,} rows{note}",
    ]
    estimates = stages(config, world_size)
    gib = lambda count: f"{count / 2**30:.2f}"
    if training.cache_hidden_states is not None:
        from megatron.early_exit.training.hidden_state_caching import cache_bytes, cached_samples

        drawn = iterations * batch
        lines.append(
            f"cache       {cached_samples(config, drawn):,} samples in {training.cache_hidden_states}, "
            f"{gib(cache_bytes(config, drawn))} GiB on disk, drawn {drawn / cached_samples(config, drawn):.1f} times"
        )
    for number, one in enumerate(estimates):
        exits = f"; exits {', '.join(map(str, one.exits))}" if one.exits else ""
        lines.append(
            f"stage {number:<5} layers {one.layers[0]} to {one.layers[-1]}{exits}; on each TP rank {one.parameters:,} "
            f"parameters, {one.trained:,} trained; about {gib(one.total_bytes)} GiB = weights {gib(one.weight_bytes)}"
            f" + gradients {gib(one.gradient_bytes)} + optimizer {gib(one.optimizer_bytes)}"
            f" + activations {gib(one.activation_bytes)}"
        )
    return "\n".join(lines)
