"""Plans of the pipeline: what runs in the idle time of stages."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.early_exit.config.checks.layout import asked_interleaving
from megatron.early_exit.config.fields import flag_of
from megatron.early_exit.config.pipeline import ITERATIONS_UNTIL_MEASURED
from megatron.early_exit.config.settings import RunSettings

_FILL_SETTINGS = ("num_fill_warmup_microbatches", "num_fill_cooldown_microbatches", "backward_forward_ratio")


def plan_problems(cfg: RunSettings) -> Iterator[str]:
    """What plans cannot be combined with. How many microbatches fit is for the plan's builder to say
    (`training.plans.check_plan`)."""
    pipeline, parallel, training = cfg.pipeline, cfg.parallel, cfg.training
    for name in _FILL_SETTINGS:
        if getattr(pipeline, name) is not None and not pipeline.fill_explicit_bubbles:
            yield f"{flag_of(name)} {getattr(pipeline, name)} without --fill-explicit-bubbles: add it, or drop this"
    if not pipeline.is_planned:
        return
    on = [flag_of(name) for name in ("exits_in_bubbles", "fill_explicit_bubbles", "profile_pipeline")
          if getattr(pipeline, name)]  # fmt: skip
    if parallel.num_stages == 1:
        yield f"{on[0]} with one pipeline stage: it never waits; drop the flag, or use more stages"
    if training.tune_exit and on[0] != "--profile-pipeline":
        yield f"{on[0]} with --tune-exit: tuning has no backward passes to wait for; drop the flag"
    if pipeline.exits_in_bubbles and not cfg.exits.num_exits:
        yield "--exits-in-bubbles without exits: give --exit-layer-nums, or drop it"
    if pipeline.exits_in_bubbles and parallel.recompute_granularity == "full":
        yield (
            "--exits-in-bubbles with --recompute-granularity full: what an exit reads is only there again when its"
            " layer is recomputed, in the backward pass; drop one of them, or use --recompute-granularity selective"
        )
    if pipeline.profile_pipeline and not pipeline.profile_pipeline.endswith((".png", ".svg", ".pdf")):
        yield f"--profile-pipeline {pipeline.profile_pipeline}: give the name of a .png, .svg or .pdf file"
    if pipeline.profile_pipeline and training.cache_hidden_states:
        yield "--profile-pipeline with --cache-hidden-states: exits are tuned without a pipeline; drop one of them"
    if pipeline.fill_explicit_bubbles:
        yield from _fill_problems(cfg)


def _fill_problems(cfg: RunSettings) -> Iterator[str]:
    if asked := asked_interleaving(cfg):
        yield (
            f"--fill-explicit-bubbles with {asked}: interleaving makes the bubbles small in another way, and both"
            " together are not supported; drop one of them"
        )
    if cfg.parallel.calculate_per_token_loss:
        yield (
            "--fill-explicit-bubbles with --calculate-per-token-loss: stages see different microbatches, so there is no"
            " one number of tokens to divide by; drop one of them"
        )
    if cfg.training.train_samples is not None:
        yield "--fill-explicit-bubbles with --train-samples: give the length as --train-iters"


def plan_warnings(cfg: RunSettings) -> Iterator[str]:
    """Plans that a run is too short for."""
    pipeline, iterations = cfg.pipeline, cfg.training.train_iters
    if not pipeline.is_planned or iterations is None:
        return
    if pipeline.fills_by_measure and iterations <= ITERATIONS_UNTIL_MEASURED:
        yield (
            f"--fill-explicit-bubbles has no effect in {iterations} iterations: stages are measured in the first"
            f" {ITERATIONS_UNTIL_MEASURED}; give --backward-forward-ratio, or more iterations"
        )
    needed = ITERATIONS_UNTIL_MEASURED * (1 + pipeline.measures_stages)
    if pipeline.profile_pipeline and iterations < needed:
        yield f"--profile-pipeline has no effect in {iterations} iterations: it needs {needed}"
