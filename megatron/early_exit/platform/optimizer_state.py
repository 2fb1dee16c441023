"""Repairs of core's optimizers when they save and load their state in the form that any layout can read.

Found by running core 0.16.1 with PyTorch's Adam (no Apex, no Transformer Engine). Each repair names its condition for
removal; `tests/distributed/test_resume.py` fails without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.early_exit.platform.device import device


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain, or the one that there is."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def repair_optimizer(optimizer: MegatronOptimizer) -> None:
    """Repair this optimizer object and those that it contains."""
    for part in optimizer_parts(optimizer):
        _know_the_step_without_parameters(part)
        if isinstance(part, DistributedOptimizer) and not getattr(part, "_early_exit_repaired", False):
            part._early_exit_repaired = True
            _save_without_shifting(part)
            _load_with_step(part)


_NO_PARAMETERS = "no parameters"


def _know_the_step_without_parameters(part: MegatronOptimizer) -> None:
    """A stage whose exits are all elsewhere has nothing to tune, and an optimizer without parameters. Core reads the
    step count from a parameter's state: its distributed optimizer fails without one, and the others save no step if
    this is rank 0, whose word on everything common counts. Such a rank takes the others' step while it saves. Can go
    when core counts steps in one place."""
    original = part.sharded_state_dict

    def sharded_state_dict(*args: Any, **kwargs: Any) -> Any:
        steps = [state["step"] for state in part.optimizer.state.values() if "step" in state]
        mine = torch.tensor([float(steps[0]) if steps else 0.0], device=device())
        torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MAX)
        if steps or not isinstance(part.optimizer, torch.optim.Adam):
            return original(*args, **kwargs)
        states: dict[Any, Any] = part.optimizer.state  # by parameter, of which there is none
        states[_NO_PARAMETERS] = {"step": mine[0].cpu()}
        try:
            state = original(*args, **kwargs)
        finally:
            del states[_NO_PARAMETERS]
        for holder in (state, state.get("optimizer", {})):
            holder.get("state", {}).pop(_NO_PARAMETERS, None)
        return state

    part.sharded_state_dict = sharded_state_dict


def _save_without_shifting(part: DistributedOptimizer) -> None:
    """Core gathers buckets without the padding between them, but cuts parameters out of the result at positions that
    count it: the state of all parameters after a padded bucket would be saved shifted. (A tied output weight has a
    bucket of its own, so this happens with small or odd sizes.) Can go when core counts alike in both places."""
    original = part.sharded_param_state_fully_reshardable

    def save(*args: Any, **kwargs: Any) -> Any:
        with _positions_without_bucket_padding(part):
            return original(*args, **kwargs)

    part.sharded_param_state_fully_reshardable = save


@contextmanager
def _positions_without_bucket_padding(part: DistributedOptimizer) -> Iterator[None]:
    original = [buffer.param_index_map for buffer in part.buffers]
    for buffer in part.buffers:
        padding_before, total = [], 0
        for bucket in buffer.buckets:
            padding_before.append(total)
            total += bucket.grad_data.numel() - bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - padding_before[bucket], end - padding_before[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, positions in zip(part.buffers, original, strict=True):
            buffer.param_index_map = positions


def _load_with_step(part: DistributedOptimizer) -> None:
    """PyTorch's Adam keeps its step count beside the moments. Core restores it from the parameter groups, as one tensor
    for all parameters, which Adam would then increment once for each of them; and misses it among the moments that it
    restores afterwards. Can go when core gives each parameter its own step and skips it there."""
    original = part._set_main_param_and_optimizer_states

    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"], **tensors}
        original(model_param, tensors)

    part._set_main_param_and_optimizer_states = set_states


def allocate_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Give the optimizer its state before the first step, so that a checkpoint can be loaded into it.

    Core's distributed optimizer reads Adam's step count from that state and fails if there is none; for SGD core has
    no function that makes the state, and calls it all the same. Can go when neither is so."""
    for part in optimizer_parts(optimizer):
        inner = part.optimizer
        for group in inner.param_groups if inner is not None else []:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = _initial_state(inner, group, parameter)
        if part.init_state_fn is None:
            part.init_state_fn = lambda *_: None


def _initial_state(
    inner: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.nn.Parameter
) -> dict[str, torch.Tensor]:
    if isinstance(inner, torch.optim.Adam):  # AdamW is one
        return {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if group.get("momentum"):  # of SGD, of PyTorch as of Apex
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return {}
