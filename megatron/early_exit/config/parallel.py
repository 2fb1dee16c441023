"""Layout: how ranks share the model, the batch and the memory for activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron.early_exit.config.ranges import Bound, PositiveInt

_MINUTES_OF_A_YEAR = 366 * 24 * 60
_A_SECOND_TO_A_YEAR = Bound(
    f"at least 1/60 (a second) and at most {_MINUTES_OF_A_YEAR} (a year)",
    lambda minutes: 1 / 60 <= minutes <= _MINUTES_OF_A_YEAR,
)

SEED_STEP = 100
"""What every pipeline stage adds to --seed, times its number."""


@dataclass(frozen=True)
class ParallelConfig:
    """Tensor, sequence, pipeline and data parallelism, and activation recomputation."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share every layer's weights."""

    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages."""

    tune_exit_pipeline_parallel_size: int | None = None
    """With --tune-exit: stages that run, of the --pipeline-model-parallel-size that all layers would be split into.
    Default: up to the one with the last exit, or with --tune-exit-distillation all."""

    num_layers_per_virtual_pipeline_stage: PositiveInt | None = None
    """Layers of one model chunk: more than one chunk per rank gives the interleaved schedule."""

    sequence_parallel: bool = False
    """Share norms and dropout along the sequence among tensor-parallel ranks."""

    use_distributed_optimizer: bool = False
    """Share optimizer state among data-parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""

    accumulate_allreduce_grads_in_fp32: bool = False
    """Accumulate and reduce gradients in fp32. Always on with --bf16."""

    calculate_per_token_loss: bool = False
    """Divide gradients by the number of unmasked tokens of the global batch instead of averaging microbatches."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: whole layers, or the attention core."""

    recompute_method: Literal["uniform", "block"] | None = None
    """With --recompute-granularity full: checkpoint every group of layers, or only the first ones of a stage."""

    recompute_num_layers: PositiveInt | None = None
    """Layers of one checkpointed group (uniform), or layers that are checkpointed (block)."""

    distributed_timeout_minutes: Annotated[float, _A_SECOND_TO_A_YEAR] = 10.0
    """A collective that takes longer ends the run on all ranks."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages that run."""
        return self.tune_exit_pipeline_parallel_size or self.pipeline_model_parallel_size

    def num_model_chunks(self, num_layers: int) -> int:
        """Model chunks on each pipeline rank (1 without interleaving)."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return 1
        return num_layers // self.pipeline_model_parallel_size // self.num_layers_per_virtual_pipeline_stage

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model in a world of `world_size` ranks."""
        return world_size // (self.tensor_model_parallel_size * self.num_stages)
