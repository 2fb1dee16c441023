"""Layout: how ranks share the model, the batch and the memory for activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron.early_exit.config.layer_split import split_layers
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

    decoder_first_pipeline_num_layers: PositiveInt | None = None
    """Layers of the first pipeline stage. The stages between the first and the last share the rest equally."""

    decoder_last_pipeline_num_layers: PositiveInt | None = None
    """Layers of the last pipeline stage. The stages between the first and the last share the rest equally."""

    pipeline_model_parallel_layout: str | None = None
    """Layers of every pipeline stage, or with several model chunks per rank of every chunk: such as Et*7|(t*8|)*2t*7L,
    in which | divides stages, E is the embedding, t a layer, L the loss, and *8 repeats."""

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
        """Model chunks on each pipeline rank (1 without interleaving). Errors as of `layers_per_stage`."""
        return len(self.layers_per_stage(num_layers)) // self.pipeline_model_parallel_size

    def layers_per_stage(self, num_layers: int) -> tuple[int, ...]:
        """Layers of every stage (of every model chunk, in the order of the layers) of a model of `num_layers`.

        Raises ValueError with the flags that do not fit."""
        return split_layers(
            num_layers, self.pipeline_model_parallel_size, per_chunk=self.num_layers_per_virtual_pipeline_stage,
            first=self.decoder_first_pipeline_num_layers, last=self.decoder_last_pipeline_num_layers,
            layout=self.pipeline_model_parallel_layout,
        )  # fmt: skip

    def split_problem(self, num_layers: int) -> str | None:
        """Why layers cannot be split over the stages as these settings say; None if they can."""
        try:
            self.layers_per_stage(num_layers)
        except ValueError as error:
            return str(error)
        return None

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model in a world of `world_size` ranks."""
        return world_size // (self.tensor_model_parallel_size * self.num_stages)
