"""All settings of one run, checked against each other once, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.early_exit.config.checkpoint import CheckpointConfig
from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.logging import LoggingConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import OptimizerConfig, TrainingConfig
from megatron.early_exit.config.parallel import ParallelConfig


@dataclass(frozen=True)
class RunConfig:
    """What `pretrain_early_exit_gpt.py` was asked to do."""

    model: ModelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    exits: ExitConfig = field(default_factory=ExitConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
