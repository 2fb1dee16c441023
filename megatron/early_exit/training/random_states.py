"""States of all random-number generators that training draws from, as part of a checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject


def sharded_random_states() -> ShardedObject:
    """Those of this process. They differ over TP and PP and are the same over DP."""
    states = {
        "random": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    return ShardedObject("rng_state", states, shape, (pp, tp), replica_id=parallel_state.get_data_parallel_rank())


def set_random_states(states: dict[str, Any]) -> None:
    """Go on with states that were saved under the same TP and PP sizes."""
    random.setstate(states["random"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
