"""Tuning of exits (--tune-exit), and its cache of hidden states."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.early_exit.config.checks.layout import asked_interleaving
from megatron.early_exit.config.exits import exit_kind_problems
from megatron.early_exit.config.fields import flag_of
from megatron.early_exit.config.settings import RunSettings


def tuning_problems(cfg: RunSettings, world_size: int) -> Iterator[str]:
    """What --tune-exit lacks or cannot be combined with, and what is of no use without it."""
    exits, parallel, checkpoint = cfg.exits, cfg.parallel, cfg.checkpoint
    given = parallel.tune_exit_pipeline_parallel_size
    if not cfg.training.tune_exit:
        for name in ("tune_exit_distillation", "cache_hidden_states", "cache_samples"):
            if getattr(cfg.training, name) not in (None, 0):
                yield f"{flag_of(name)} {getattr(cfg.training, name)} without --tune-exit: add it, or drop this"
        if given is not None:
            yield f"--tune-exit-pipeline-parallel-size {given} without --tune-exit: add it, or drop this"
        return
    yield from _cache_problems(cfg, world_size)
    if not exits.num_exits:
        yield "--tune-exit without exits: add some to the checkpoint (tools/convert_checkpoint.py add-exits)"
        return
    if not list(exit_kind_problems(exits)) and not any(head.has_parameters for head in exits.heads):
        yield (
            "--tune-exit has nothing to tune: the exits use the model's output weight and have no norm, MLP branch or"
            " block; add exits with parameters of their own"
        )
    share = cfg.training.tune_exit_distillation
    if not 0 <= share <= 1:
        yield f"--tune-exit-distillation {share}: a share lies between 0 and 1"
    needed = cfg.num_tuning_stages
    if given is not None and given != needed and share > 0:
        combined = f"--tune-exit-pipeline-parallel-size {given} with --tune-exit-distillation {share}"
        if given != cfg.num_stages_with_exits:
            yield f"{combined}: the final head is on stage {needed}; give {needed}, or leave it out"
        elif cfg.training.cache_hidden_states is None:
            yield (
                f"{combined}: the final head is on stage {needed}, and what it reads is not kept; give {needed}, or"
                " --cache-hidden-states with a folder that holds it"
            )
    elif given is not None and given != needed:
        yield (
            f"--tune-exit-pipeline-parallel-size {given}: of {parallel.pipeline_model_parallel_size} stages with"
            f" {_layers_of_stages(cfg)}, the last exit (layer {exits.exit_layer_nums[-1]}) is on stage {needed}; give"
            f" {needed}, or leave it out"
        )
    if asked := asked_interleaving(cfg):
        yield f"--tune-exit with {asked}: forward passes need no interleaving; drop it"
    if parallel.calculate_per_token_loss:
        yield "--tune-exit with --calculate-per-token-loss is not supported; drop it"
    if checkpoint.load is None and checkpoint.pretrained_checkpoint is None:
        yield "--tune-exit needs a model: --pretrained-checkpoint, or --load to go on"


def _layers_of_stages(cfg: RunSettings) -> str:
    """Such as `2 layers each`, or `3, 5 layers`."""
    counts = cfg.layers_per_stage
    return f"{counts[0]} layers each" if len(set(counts)) == 1 else f"{', '.join(map(str, counts))} layers"


def _cache_problems(cfg: RunSettings, world_size: int) -> Iterator[str]:
    training, samples = cfg.training, cfg.training.cache_samples
    if samples is None:
        return
    if training.cache_hidden_states is None:
        yield f"--cache-samples {samples} without --cache-hidden-states: give a folder, or drop this"
    unit = training.micro_batch_size * max(cfg.parallel.data_parallel_size(world_size), 1)
    if samples < 1 or samples % unit:
        yield (
            f"--cache-samples {samples}: must be a multiple of micro batch size x data-parallel size = {unit}, at least"
            f" {unit}"
        )


def tuning_warnings(cfg: RunSettings) -> Iterator[str]:
    """Settings without effect on tuning."""
    if not cfg.training.tune_exit:
        return
    if cfg.parallel.recompute_granularity is not None:
        yield "--recompute-granularity has no effect with --tune-exit: the frozen layers keep no activations"
    if cfg.parallel.overlap_grad_reduce:
        yield "--overlap-grad-reduce has no effect with --tune-exit"
