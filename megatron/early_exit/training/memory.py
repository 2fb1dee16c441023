"""Whether memory can hold a run at all, from its settings alone: before its data are indexed and its model is built.

What is counted is what certainly exists at once, so that nothing is refused that would have run: parameters, gradients,
optimizer state, and of activations the inputs of layers, for one microbatch. `--dry-run` estimates all of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron.early_exit.config.run import ResolvedConfig
from megatron.early_exit.model import sizes
from megatron.early_exit.platform.device import device_memory_bytes, machine_memory_bytes, use_cuda
from megatron.early_exit.training.dry_run import StageEstimate, stages

# Core's index of a dataset: place in the order of samples (int32), document and offset of the first token (int32 each).
_INDEX_BYTES_PER_SAMPLE = 12


def check_memory(config: ResolvedConfig, world_size: int, num_samples: Sequence[int]) -> None:
    """Raise ValueError if this machine cannot hold its part of the run, or the index of the samples.

    num_samples: to draw from each dataset."""
    needed = [_certain_bytes(config, stage) for stage in stages(config, world_size)]
    largest = max(range(len(needed)), key=needed.__getitem__)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if use_cuda():
        available, used, holder = device_memory_bytes(), needed[largest], "its GPU"
    else:
        # Which stages run on this machine is not known, unless all do.
        per_stage = world_size // len(needed)
        used = per_stage * sum(needed) if local_ranks >= world_size else local_ranks * min(needed)
        available, holder = machine_memory_bytes(), f"this machine for {local_ranks} of {world_size} ranks"
    if used > available:
        raise ValueError(
            f"memory cannot hold this run: stage {largest} needs at least {_gib(needed[largest])} GiB on each rank "
            f"({_parts(config, stages(config, world_size)[largest])}), {holder} has {_gib(available)} GiB. Use a "
            "smaller --hidden-size, --num-layers, --seq-length or --micro-batch-size, or more ranks that share the "
            "model (--tensor-model-parallel-size, --pipeline-model-parallel-size); --bf16 halves the weights. "
            "--dry-run shows what every stage needs."
        )
    index = _INDEX_BYTES_PER_SAMPLE * sum(num_samples)
    if index > machine_memory_bytes():
        raise ValueError(
            f"memory cannot hold the order of {sum(num_samples):,} samples (--train-iters or --train-samples, "
            f"--eval-iters, --global-batch-size): its index takes {_gib(index)} GiB, the machine has "
            f"{_gib(machine_memory_bytes())} GiB. Train on fewer."
        )


def _certain_bytes(config: ResolvedConfig, stage: StageEstimate) -> int:
    return stage.weight_bytes + stage.gradient_bytes + stage.optimizer_bytes + _input_bytes(config, stage)


def _input_bytes(config: ResolvedConfig, stage: StageEstimate) -> int:
    """Inputs of the layers that are kept for the backward; one where nothing is."""
    keeps_all = not config.training.tune_exit and config.parallel.recompute_granularity != "full"
    return sizes.sharded_hidden_states_bytes(config) * (len(stage.layers) if keeps_all else 1)


def _parts(config: ResolvedConfig, stage: StageEstimate) -> str:
    parts = {
        "weights": stage.weight_bytes, "gradients": stage.gradient_bytes, "optimizer": stage.optimizer_bytes,
        "inputs of layers": _input_bytes(config, stage),
    }  # fmt: skip
    return " + ".join(f"{name} {_gib(count)}" for name, count in parts.items())


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f}" if count < 2**60 else f"{count / 2**30:.2g}"
