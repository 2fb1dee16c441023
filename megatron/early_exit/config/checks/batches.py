"""Batch sizes and their ramp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron.early_exit.config.checks.layout import asked_interleaving, num_chunks
from megatron.early_exit.config.fields import words_of
from megatron.early_exit.config.settings import RunSettings

MAX_MICROBATCHES = 1_000_000
"""Of one iteration."""


def batch_problems(cfg: RunSettings, world_size: int) -> Iterator[str]:
    """Batches that microbatches, ranks or the interleaved schedule do not divide."""
    training = cfg.training
    dp_size = max(cfg.parallel.data_parallel_size(world_size), 1)
    unit = training.micro_batch_size * dp_size
    target = training.global_batch_size or unit
    first_sizes = [target]
    if training.rampup_batch_size:
        ramp_issues = list(_rampup_problems(training.rampup_batch_size, target, unit))
        if ramp_issues:
            yield from ramp_issues
            return
        start, increment, _ = training.rampup_batch_size
        first_sizes = [start, start + increment]  # all others are further increments away
    if target % unit:
        yield (
            f"--global-batch-size {target} is not divisible by --micro-batch-size ({training.micro_batch_size}) x"
            f" data-parallel size ({dp_size}) = {unit}"
        )
        return
    pp_size = cfg.parallel.pipeline_model_parallel_size
    if pp_size > 1 and num_chunks(cfg) > 1:
        unfit = [size for size in first_sizes if size // unit % pp_size]
        if unfit:
            yield (
                f"a global batch of {unfit[0]} gives {unfit[0] // unit} microbatches: the interleaved schedule needs a"
                f" multiple of --pipeline-model-parallel-size {pp_size}; change --global-batch-size, or drop"
                f" {asked_interleaving(cfg)}"
            )
    if training.train_samples is not None and training.train_samples < first_sizes[0]:
        yield f"--train-samples {training.train_samples} is less than one global batch of {first_sizes[0]}"
    if target // unit > MAX_MICROBATCHES:
        yield (
            f"--global-batch-size {target} makes {target // unit} microbatches of one iteration: at most"
            f" {MAX_MICROBATCHES}; is it meant in samples?"
        )


def _rampup_problems(rampup: Sequence[int], target: int, unit: int) -> Iterator[str]:
    """unit: samples of one microbatch on all data-parallel ranks."""
    text = f"--rampup-batch-size {words_of(rampup)}"
    if len(rampup) != 3:
        yield f"{text}: expected START INCREMENT SAMPLES, got {len(rampup)} values"
        return
    start, increment, _ = rampup
    if min(rampup) < 1:
        yield f"{text}: all three must be at least 1"
        return
    if start >= target:
        yield f"{text}: starts at {start}, which must be less than --global-batch-size {target}"
    elif (target - start) % increment:
        yield f"{text}: {increment} does not divide --global-batch-size {target} - {start} = {target - start}"
    if start % unit or increment % unit:
        yield f"{text}: {start} and {increment} must be divisible by micro batch size x data-parallel size = {unit}"


def batch_warnings(cfg: RunSettings) -> Iterator[str]:
    """A ramp that the learning rate does not follow."""
    if cfg.training.rampup_batch_size and cfg.training.train_iters is not None:
        yield (
            "--rampup-batch-size with --train-iters: the learning rate is scheduled over train-iters full batches, so"
            " smaller batches leave its decay unfinished at the end; use --train-samples to train it out"
        )
