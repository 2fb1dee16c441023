"""All settings of one run as they were given, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from megatron.early_exit.config.checkpoint import CheckpointConfig
from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.layer_split import layer_numbers
from megatron.early_exit.config.logging import LoggingConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import Dtype, OptimizerConfig, TrainingConfig
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.config.pipeline import PipelineConfig


@dataclass(frozen=True)
class BuildConfig:
    """Which part of a model is built, in which precision, and how ranks share it."""

    model: ModelConfig
    """With `max_position_embeddings`."""

    exits: ExitConfig
    dtype: Dtype
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tunes_exits: bool = False
    """Only the exits are trained (EE-Tuning)."""

    distillation_share: float = 0.0
    """Share of the exits' loss that is the divergence from the final head."""

    seed: int = 0
    """Of the tokens that exits with a token fraction learn from."""

    @property
    def num_built_layers(self) -> int:
        """Layers that are built: all, or with --tune-exit those up to the last exit."""
        return self.model.num_layers if self.builds_final_head else self.exits.exit_layer_nums[-1]

    @property
    def builds_final_head(self) -> bool:
        """Whether the final head is built: to be trained, or as the teacher of exits that are tuned. Where only some of
        the stages run, what it reads is kept already, and it is not built."""
        runs_all_stages = self.parallel.num_stages == self.parallel.pipeline_model_parallel_size
        return not self.tunes_exits or (self.distillation_share > 0 and runs_all_stages)

    @property
    def stage_layers(self) -> tuple[range, ...]:
        """Numbers, from 1, of the layers of every stage that is built; with interleaving of every model chunk. Under
        tuning the last one ends with the last exit."""
        numbers = layer_numbers(self.parallel.layers_per_stage(self.model.num_layers))
        num_stages = self.parallel.num_stages * self.parallel.num_model_chunks(self.model.num_layers)
        last = self.num_built_layers
        return tuple(range(layers.start, min(layers.stop, last + 1)) for layers in numbers[:num_stages])


@dataclass(frozen=True)
class RunSettings:
    """What `pretrain_early_exit_gpt.py` was asked to do, whether it fits together or not."""

    model: ModelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    exits: ExitConfig = field(default_factory=ExitConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def build(self) -> BuildConfig:
        """What of the model this run builds."""
        return BuildConfig(
            model=replace(self.model, max_position_embeddings=self.max_position_embeddings),
            exits=self.exits,
            dtype=self.training.dtype,
            parallel=self.parallel,
            tunes_exits=self.training.tune_exit,
            distillation_share=self.training.tune_exit_distillation,
            seed=self.training.seed,
        )

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence that the model accepts, after defaults."""
        return self.model.max_position_embeddings or self.training.seq_length

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Layers of every pipeline stage (with interleaving of every model chunk), in order. Raises ValueError if they
        cannot be split as the settings say, which `RunConfig` has checked; so do the properties that follow."""
        return self.parallel.layers_per_stage(self.model.num_layers)

    @property
    def num_stages_with_exits(self) -> int:
        """Pipeline stages up to the one with the last exit."""
        last = self.exits.exit_layer_nums[-1]
        return sum(layers.start <= last for layers in layer_numbers(self.layers_per_stage))

    @property
    def num_tuning_stages(self) -> int:
        """Pipeline stages that --tune-exit runs if nothing else is said: up to the last exit, or to the final head."""
        distils = self.training.tune_exit_distillation > 0
        return self.parallel.pipeline_model_parallel_size if distils else self.num_stages_with_exits

    @property
    def exit_stages(self) -> tuple[int, ...]:
        """Pipeline stages that own exits, counted from 0; with interleaving those of model chunks."""
        stages = enumerate(layer_numbers(self.layers_per_stage))
        return tuple(stage for stage, layers in stages if set(layers) & set(self.exits.exit_layer_nums))

    def describe(self, vocab_size: int, present: ModelDescription | None = None) -> ModelDescription:
        """The model of this run. vocab_size: ids of its tokenizer. present: the model that it starts from, whose number
        of rows of the embedding it keeps unless --padded-vocab-size is given.

        Raises ValueError if these rows cannot be shared by --tensor-model-parallel-size."""
        tp_size = self.parallel.tensor_model_parallel_size
        rows = self.model.padded_vocab_size
        if rows is None and present is not None:
            rows = present.padded_vocab_size
            if rows % tp_size:
                raise ValueError(
                    f"the checkpoint's vocabulary has {rows} rows, which --tensor-model-parallel-size {tp_size} does "
                    "not divide. Choose another size."
                )
        if rows is None:
            rows = self.model.padded_to(vocab_size, tp_size)
        model = replace(self.model, padded_vocab_size=rows, max_position_embeddings=self.max_position_embeddings)
        return ModelDescription(model, self.exits, self.data.tokenizer, self.training.dtype)


Settings = TypeVar("Settings", bound=RunSettings)


def normalised(cfg: Settings, warn: Callable[[str], None]) -> Settings:
    """`cfg` with Megatron's silent corrections, of which `warn` is told, and what is open filled in."""
    if cfg.parallel.sequence_parallel and cfg.parallel.tensor_model_parallel_size == 1:
        warn("--sequence-parallel is turned off: with --tensor-model-parallel-size 1 there is nothing to share")
        cfg = replace(cfg, parallel=replace(cfg.parallel, sequence_parallel=False))
    if cfg.training.tune_exit:
        cfg = with_tuned_stages(cfg)
    if cfg.checkpoint.load_iteration == 0:
        cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, load_iteration=None))
    return cfg


def with_tuned_stages(cfg: Settings) -> Settings:
    """`cfg`, which has --tune-exit, with the number of stages that run filled in where it is left open."""
    given = cfg.parallel.tune_exit_pipeline_parallel_size
    if given is not None or not cfg.exits.num_exits or cfg.parallel.split_problem(cfg.model.num_layers):
        return cfg
    return replace(cfg, parallel=replace(cfg.parallel, tune_exit_pipeline_parallel_size=cfg.num_tuning_stages))
