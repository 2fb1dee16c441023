"""How ranks share the layers: ranks, pipeline stages, model chunks, and recomputation within them."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.early_exit.config.fields import flag_of
from megatron.early_exit.config.parallel import SEED_STEP
from megatron.early_exit.config.settings import RunSettings

LARGEST_SEED = 2**32 - 1
"""NumPy's."""


def layout_problems(cfg: RunSettings, world_size: int) -> Iterator[str]:
    """Numbers of ranks, stages and layers that do not fit."""
    parallel, num_layers = cfg.parallel, cfg.model.num_layers
    tp_size, pp_size, num_stages = (
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.num_stages
    )  # fmt: skip
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
    if not has_equal_stages(cfg):
        yield (
            f"--num-layers {num_layers} is not divisible by --pipeline-model-parallel-size {pp_size}: every stage owns"
            " equally many layers"
        )
    largest_seed = LARGEST_SEED - SEED_STEP * (num_stages - 1)
    if cfg.training.seed > largest_seed:
        yield (
            f"--seed {cfg.training.seed}: must be at most {largest_seed} on {num_stages} pipeline stages, each of which"
            f" adds {SEED_STEP} to it"
        )


def has_equal_stages(cfg: RunSettings) -> bool:
    """Whether the layers can be shared out at all, which is what checks of stages take for granted."""
    return cfg.model.num_layers % cfg.parallel.pipeline_model_parallel_size == 0


def stage_problems(cfg: RunSettings) -> Iterator[str]:
    """Model chunks and recomputed groups that the layers of a stage cannot be divided into."""
    yield from _interleaving_problems(cfg)
    yield from _recompute_problems(cfg)


def _interleaving_problems(cfg: RunSettings) -> Iterator[str]:
    parallel = cfg.parallel
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    if per_chunk is None:
        return
    pp_size = parallel.pipeline_model_parallel_size
    per_stage = cfg.model.num_layers // pp_size
    if pp_size == 1:
        yield (
            f"--num-layers-per-virtual-pipeline-stage {per_chunk} with --pipeline-model-parallel-size 1: there is no"
            " pipeline to interleave; drop it"
        )
    elif per_stage % per_chunk:
        yield (
            f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide the {per_stage} layers of a stage"
            f" (--num-layers {cfg.model.num_layers} / --pipeline-model-parallel-size {pp_size})"
        )


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
        chunk_layers = cfg.model.num_layers // parallel.pipeline_model_parallel_size // num_chunks(cfg)
        if method == "uniform" and chunk_layers % count:
            yield (
                f"--recompute-num-layers {count} does not divide the {chunk_layers} layers of a model chunk, as"
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
    """Model chunks of a stage; 1 where they are larger than it."""
    return max(cfg.parallel.num_model_chunks(cfg.model.num_layers), 1)


def layout_warnings(cfg: RunSettings) -> Iterator[str]:
    """Settings without effect on this layout."""
    if cfg.parallel.num_layers_per_virtual_pipeline_stage is not None and num_chunks(cfg) == 1:
        yield "--num-layers-per-virtual-pipeline-stage has no effect: a stage's layers make one chunk"
