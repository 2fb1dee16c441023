"""Loads a training checkpoint; `training/saving.py` writes it, `training/checkpoint_state.py` says what it holds."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron.early_exit.checkpoint.core_loading import load_common, load_sharded
from megatron.early_exit.checkpoint.load_model import check_tensors
from megatron.early_exit.checkpoint.start import loads_optimizer, reading
from megatron.early_exit.config.checkpoint_files import RUN_CONFIG_FILE
from megatron.early_exit.config.run import ResolvedConfig
from megatron.early_exit.config.serialize import load_run_config
from megatron.early_exit.config.settings import RunSettings
from megatron.early_exit.model.build import Model
from megatron.early_exit.platform.optimizer_state import allocate_optimizer_state
from megatron.early_exit.training.checkpoint_state import sharded_state
from megatron.early_exit.training.random_states import set_random_states
from megatron.early_exit.training.state import TrainingState

log = logging.getLogger(__name__)


def load_checkpoint(
    folder: Path,
    config: ResolvedConfig,
    model: Model,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> TrainingState:
    """Load what `config.checkpoint` asks for from `folder` into the model, the optimizer, its schedule and the
    generators. Returns the progress of the run that saved it, or a new one with --finetune.

    The settings are those that `checkpoint.start.find_start` has checked. Raises ValueError if the checkpoint has other
    tensors than its settings say, OSError if it cannot be read."""
    settings = config.checkpoint
    weights_only = settings.finetune
    with reading(folder):
        common = load_common(folder)
    saved_config = load_run_config(folder / RUN_CONFIG_FILE) if "training_state" in common else None
    loaded_optimizer = optimizer if loads_optimizer(config) else None
    with_rng = (
        not (weights_only or settings.no_load_rng)
        and optimizer is not None
        and saved_config is not None
        and _goes_on_with_random_states(config, saved_config)
    )
    if loaded_optimizer is not None:
        allocate_optimizer_state(loaded_optimizer)
    sharded = sharded_state(model, loaded_optimizer, None, None, with_rng=with_rng, is_loading=True)
    with reading(folder):
        check_tensors(sharded, folder)
        loaded = load_sharded(sharded, folder)
    for index, chunk in enumerate(model.chunks):
        chunk.load_state_dict(loaded[f"model{index}"])
    if loaded_optimizer is not None:
        loaded_optimizer.load_state_dict(loaded["optimizer"])
    elif optimizer is not None:
        optimizer.reload_model_params()  # the fp32 main weights follow the loaded ones
    if with_rng:
        set_random_states(loaded["rng_state"])
    if weights_only or "training_state" not in common:  # a converted checkpoint has weights alone
        return TrainingState()
    if scheduler is not None and not settings.no_load_optim:
        try:
            scheduler.load_state_dict(common["opt_param_scheduler"])
        except AssertionError as error:
            raise ValueError(
                f"the learning-rate schedule of {folder} is not that of the flags ({error}). Keep it with "
                "--use-checkpoint-opt-param-scheduler, or take that of the flags with --override-opt-param-scheduler."
            ) from error
    return TrainingState.from_state_dict(common["training_state"])


def _goes_on_with_random_states(config: RunSettings, saved: RunSettings) -> bool:
    """Whether the checkpoint has random-number states that fit the layout; a warning says if they do not."""
    sizes = lambda settings: (settings.parallel.tensor_model_parallel_size, settings.parallel.num_stages)
    if sizes(config) == sizes(saved):
        return not saved.checkpoint.no_save_rng
    if torch.distributed.get_rank() == 0:
        log.warning(
            "random-number states are not loaded: the checkpoint was saved with another tensor or pipeline parallel "
            "size. Dropout continues with other random numbers; nothing else is affected."
        )
    return False
