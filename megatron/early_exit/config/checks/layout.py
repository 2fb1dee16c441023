"""How ranks share the layers: ranks, pipeline stages, model chunks, and recomputation within them."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.early_exit.config.fields import flag_of
from megatron.early_exit.config.parallel import SEED_STEP
from megatron.early_exit.config.settings import RunSettings

LARGEST_SEED = 2**32 - 1
"""NumPy's."""


def layout_problems(cfg: RunSettings, world_size: int) -> Iterator[str]:
    """Numbers of ranks and stages that do not fit."""
    parallel = cfg.parallel
    tp_size, num_stages = parallel.tensor_model_parallel_size, parallel.num_stages
    if world_size % (tp_size * num_stages):
        stages = "stages that are tuned" if cfg.training.tune_exit else "--pipeline-model-parallel-size"
        yield (
            f"{world_size} ranks do not fit: needed is a multiple of --tensor-model-parallel-size ({tp_size}) x"
            f" {stages} ({num_stages}) = {tp_size * num_stages}; change torchrun's --nproc-per-node,"
            " --nnodes, or the layout"
        )
    if parallel.sequence_parallel and tp_size == 1:
        yield "--sequence-parallel needs --tensor-model-parallel-size above 1: drop it"
    if parallel.sequence_parallel and cfg.training.seq_length % tp_size:
        yield (
            f"--seq-length {cfg.training.seq_length} is not divisible by --tensor-model-parallel-size {tp_size}, as"
            " --sequence-parallel needs"
        )
    largest_seed = LARGEST_SEED - SEED_STEP * (num_stages - 1)
    if cfg.training.seed > largest_seed:
        yield (
            f"--seed {cfg.training.seed}: must be at most {largest_seed} on {num_stages} pipeline stages, each of which"
            f" adds {SEED_STEP} to it"
        )


def has_stages(cfg: RunSettings) -> bool:
    """Whether the layers can be shared out at all, which is what other checks of stages take for granted."""
    return cfg.parallel.split_problem(cfg.model.num_layers) is None


def stage_problems(cfg: RunSettings) -> Iterator[str]:
    """Layers that cannot be split over the stages, and recomputed groups that the layers of a stage cannot be divided
    into."""
    problem = cfg.parallel.split_problem(cfg.model.num_layers)
    if problem is not None:
        yield problem
    else:
        yield from _recompute_problems(cfg)


def _recompute_problems(cfg: RunSettings) -> Iterator[str]:
    parallel = cfg.parallel
    method, count = parallel.recompute_method, parallel.recompute_num_layers
    if parallel.recompute_granularity == "full":
        if method is None or count is None:
            yield (
                "--recompute-granularity full needs --recompute-method uniform|block and --recompute-num-layers N"
                " (uniform 1 saves most memory)"
            )
            return
        undivided = [layers for layers in cfg.layers_per_stage if layers % count]
        if method == "uniform" and undivided:
            yield (
                f"--recompute-num-layers {count} does not divide the {undivided[0]} layers of a model chunk, as"
                " --recompute-method uniform needs"
            )
    elif method is not None or count is not None:
        given = " ".join(
            f"{flag_of(name)} {value}"
            for name, value in (("recompute_method", method), ("recompute_num_layers", count))
            if value is not None
        )
        yield f"{given}: only used with --recompute-granularity full; add it, or drop them"


def num_chunks(cfg: RunSettings) -> int:
    """Model chunks of a rank; 1 where layers cannot be split, which is another problem."""
    return cfg.parallel.num_model_chunks(cfg.model.num_layers) if has_stages(cfg) else 1


def asked_interleaving(cfg: RunSettings) -> str | None:
    """The flag that asks for interleaving, if one does."""
    if cfg.parallel.num_layers_per_virtual_pipeline_stage is not None:
        return "--num-layers-per-virtual-pipeline-stage"
    return "--pipeline-model-parallel-layout with several stages on a rank" if num_chunks(cfg) > 1 else None


def layout_warnings(cfg: RunSettings) -> Iterator[str]:
    """Settings without effect on this layout."""
    if cfg.parallel.num_layers_per_virtual_pipeline_stage is not None and num_chunks(cfg) == 1:
        yield "--num-layers-per-virtual-pipeline-stage has no effect: a stage's layers make one chunk"
