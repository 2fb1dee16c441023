"""All settings of one run, checked against each other once, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron.early_exit.config.checkpoint import CheckpointConfig
from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.logging import LoggingConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import OptimizerConfig, TrainingConfig
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.config.pipeline import PipelineConfig


@dataclass(frozen=True)
class RunConfig:
    """What `pretrain_early_exit_gpt.py` was asked to do."""

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
    def num_built_layers(self) -> int:
        """Layers that this run builds: all, or with --tune-exit those up to the last exit."""
        return self.model.num_layers if self.builds_final_head else self.exits.exit_layer_nums[-1]

    @property
    def builds_final_head(self) -> bool:
        """Whether the final head is needed: to be trained, or as the teacher of exits that are tuned."""
        return not self.training.tune_exit or self.training.tune_exit_distillation > 0

    @property
    def layers_per_stage(self) -> int:
        """Layers of each pipeline stage; of the last one that is tuned, at most so many."""
        return self.model.num_layers // self.parallel.pipeline_model_parallel_size

    @property
    def num_stages_with_exits(self) -> int:
        """Pipeline stages up to the one with the last exit."""
        return -(-self.exits.exit_layer_nums[-1] // self.layers_per_stage)

    @property
    def exit_stages(self) -> tuple[int, ...]:
        """Pipeline stages that own exits, counted from 0; with interleaving those of model chunks."""
        per_stage = self.layers_per_stage // self.parallel.num_model_chunks(self.model.num_layers)
        return tuple(sorted({(layer - 1) // per_stage for layer in self.exits.exit_layer_nums}))


def with_tuned_stages(cfg: RunConfig) -> RunConfig:
    """`cfg`, which has --tune-exit, with the number of stages that run filled in where it is left open."""
    given = cfg.parallel.tune_exit_pipeline_parallel_size
    if given is not None or not cfg.exits.num_exits or cfg.layers_per_stage < 1:
        return cfg
    return replace(cfg, parallel=replace(cfg.parallel, tune_exit_pipeline_parallel_size=cfg.num_stages_with_exits))
