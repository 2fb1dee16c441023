"""What a run would be, from its settings alone: `--dry-run` builds nothing and starts no other process.

Memory is an estimate: parameters, gradients and optimizer state are counted, activations follow Korthikanti et al.
(arXiv:2205.05198, attention without its score matrix), temporary buffers and fragmentation are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.early_exit.config.run import ResolvedConfig, RunConfig
from megatron.early_exit.config.saved_description import read_description
from megatron.early_exit.data.tokenizer import build_tokenizer
from megatron.early_exit.model import sizes
from megatron.early_exit.training.plans import plan_text


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


def stages(config: ResolvedConfig, world_size: int) -> list[StageEstimate]:
    """Estimates of all stages."""
    chunks = [tuple(layers) for layers in config.build.stage_layers]
    return [_stage(config, world_size, stage, chunks) for stage in range(config.parallel.num_stages)]


def _stage(config: ResolvedConfig, world_size: int, stage: int, chunks: list[tuple[int, ...]]) -> StageEstimate:
    """chunks: layers of all chunks of the model; every stage has one after the other in turn."""
    parallel, training = config.parallel, config.training
    mine = range(stage, len(chunks), parallel.num_stages)
    layers = tuple(layer for index in mine for layer in chunks[index])
    exits = tuple(layer for layer in layers if layer in config.exits.exit_layer_nums)
    count = sum(sizes.stage_parameters(config, chunks[index], index == 0, index == len(chunks) - 1) for index in mine)
    trained = count
    if training.tune_exit:
        trained = sum(sizes.exit_parameters(config, head) for head in config.exits.heads_of(layers))
    microbatches = max((training.global_batch_size or 1) // max(training.micro_batch_size, 1), 1)
    if training.tune_exit:
        activations = sizes.activation_bytes(config, 1)  # nothing is kept of a frozen layer
        activations += _bytes_kept_for_teacher(config, stage, len(exits), microbatches)
    else:
        in_flight = min(parallel.num_stages - stage, microbatches)
        activations = in_flight * sum(sizes.activation_bytes(config, len(chunks[index])) for index in mine)
    tokens = [sizes.exit_tokens(config, index) for index in config.exits.indices_of(layers)]
    if stage == parallel.num_stages - 1:
        tokens.append(sizes.microbatch_tokens(config))
    if tokens:
        activations += sizes.logits_chunk_bytes(config, max(tokens))
    return StageEstimate(
        layers, exits, count, trained, sizes.weight_bytes(config, count), sizes.gradient_bytes(config, trained),
        sizes.optimizer_bytes(config, world_size, trained), activations,
    )  # fmt: skip


def _bytes_kept_for_teacher(config: ResolvedConfig, stage: int, num_exits: int, microbatches: int) -> int:
    """Inputs of a stage's exits until the final head that they follow has seen their microbatch, and what this reads:
    of the microbatch that is there, and of the next one."""
    is_before_exits = stage < config.exit_stages[0]
    if not follows_live_teacher(config) or is_before_exits:
        return 0
    in_flight = min(config.parallel.num_stages - stage, microbatches)
    return (in_flight * num_exits + 2) * sizes.sharded_hidden_states_bytes(config)


def follows_live_teacher(config: RunConfig) -> bool:
    """Whether exits are tuned to follow a final head that runs beside them, not one whose input is kept."""
    training = config.training
    return training.tune_exit_distillation > 0 and training.cache_hidden_states is None


def describe(config: RunConfig, world_size: int) -> str:
    """The run in a few lines. Raises ValueError or OSError if the checkpoint that it would start from cannot be
    loaded."""
    from megatron.early_exit.checkpoint.start import find_start, loads_optimizer  # PyTorch, which takes seconds

    config, start = find_start(config)
    training, parallel = config.training, config.parallel
    present = None if start is None else read_description(start)
    size, note = 0, ""
    if present is None and config.model.padded_vocab_size is None:
        try:
            size = build_tokenizer(config.data.tokenizer).vocab_size
        except ValueError as error:
            size, note = 32000, f" (a guess: {error})"
    config = config.resolved(size, present)
    dp = parallel.data_parallel_size(world_size)
    batch = training.global_batch_size or training.micro_batch_size * dp
    tokens = batch * training.seq_length
    samples = training.train_samples
    iterations = -(-samples // batch) if samples is not None else training.given_iterations
    lines = [
        f"layout      {world_size} ranks = TP {parallel.tensor_model_parallel_size} x PP {parallel.num_stages}"
        f" x DP {dp}",
        f"batch       {batch:,} sequences of {training.seq_length:,} tokens = {tokens:,} tokens, "
        f"{batch // (training.micro_batch_size * dp)} microbatches of {training.micro_batch_size} on each replica",
        f"length      {iterations:,} iterations, {iterations * tokens:,} tokens",
        f"vocabulary  {config.description.padded_vocab_size:,} rows{note}",
    ]
    if start is not None:
        with_optimizer = "with" if loads_optimizer(config) else "without"
        lines.append(f"start       from {start}, {with_optimizer} its optimizer state")
    estimates = stages(config, world_size)
    gib = lambda count: f"{count / 2**30:.2f}"
    if training.cache_hidden_states is not None:
        drawn = iterations * batch
        cached = sizes.cached_samples(config, drawn)
        lines.append(
            f"cache       {cached:,} samples in {training.cache_hidden_states}, "
            f"{gib(sizes.cache_bytes(config, drawn))} GiB on disk, drawn {drawn / cached:.1f} times"
        )
    if config.pipeline.is_planned:
        lines.append(f"plan        {plan_text(config, batch // (training.micro_batch_size * dp))}")
    for number, one in enumerate(estimates):
        exits = f"; exits {', '.join(map(str, one.exits))}" if one.exits else ""
        lines.append(
            f"stage {number:<5} layers {one.layers[0]} to {one.layers[-1]}{exits}; on each TP rank {one.parameters:,} "
            f"parameters, {one.trained:,} trained; about {gib(one.total_bytes)} GiB = weights {gib(one.weight_bytes)}"
            f" + gradients {gib(one.gradient_bytes)} + optimizer {gib(one.optimizer_bytes)}"
            f" + activations {gib(one.activation_bytes)}"
        )
    return "\n".join(lines)
