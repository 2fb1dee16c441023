"""What a training checkpoint holds: the model, the optimizer and its schedule, progress, random-number states.

Core's `torch_dist` format is readable under any TP/PP/DP layout: every tensor says its place in the whole model.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron.early_exit.checkpoint.load_model import sharded_weights
from megatron.early_exit.checkpoint.tensors import EXIT_HEAD
from megatron.early_exit.checkpoint.writing import CONTENT_METADATA
from megatron.early_exit.model.build import Model
from megatron.early_exit.training.random_states import sharded_random_states
from megatron.early_exit.training.state import TrainingState


def sharded_state(
    model: Model,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    state: TrainingState | None,
    *,
    with_rng: bool,
    is_loading: bool = False,
) -> dict[str, Any]:
    """What core saves and loads, with the places of all tensors in the whole model."""
    sharded: dict[str, Any] = sharded_weights(model)
    if optimizer is not None:
        models = {key: value for key, value in sharded.items() if key.startswith("model")}
        sharded["optimizer"] = optimizer.sharded_state_dict(
            models, is_loading=is_loading, metadata=dict(CONTENT_METADATA)
        )
    if scheduler is not None:
        sharded["opt_param_scheduler"] = scheduler.state_dict()
    if state is not None:
        sharded["training_state"] = state.state_dict()
    if with_rng:
        sharded["rng_state"] = sharded_random_states()
    return sharded


def keep_exits_alone(sharded_state: dict[str, Any]) -> None:
    """Drop from the model's state what tuning does not change."""
    for key in [key for key in sharded_state if key.startswith("model")]:
        state = sharded_state[key]
        sharded_state[key] = {name: value for name, value in state.items() if EXIT_HEAD in name}
