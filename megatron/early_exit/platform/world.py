"""What the environment says of the processes that were started together. Imports neither torch nor core."""

from __future__ import annotations

import os


def check_world_size(tensor_parallel_size: int, world_size: int | None = None) -> None:
    """Raise ValueError unless exactly as many processes were started as share the weights of one model: with others,
    the first collective would wait for ranks that never come.

    world_size: of process groups that exist; default what the environment says (torchrun's WORLD_SIZE)."""
    if tensor_parallel_size < 1:
        raise ValueError(f"the tensor parallel size is {tensor_parallel_size}; it must be at least 1")
    if world_size is None:
        text = os.environ.get("WORLD_SIZE", "1")
        if not text.isdecimal():
            raise ValueError(f"the environment variable WORLD_SIZE is {text!r}; it should be a number of processes")
        world_size = int(text)
    if world_size == tensor_parallel_size:
        return
    if world_size > 1:
        advice = (
            f"start {tensor_parallel_size}, or, where RANK and WORLD_SIZE are those of another job (in its pod or "
            "shell), run without them: env -u RANK -u WORLD_SIZE -u LOCAL_RANK"
        )
    else:
        advice = f"start {tensor_parallel_size} with torchrun --nproc-per-node {tensor_parallel_size}"
    started = "1 process was" if world_size == 1 else f"{world_size} processes were"
    raise ValueError(f"the tensor parallel size is {tensor_parallel_size} but {started} started (WORLD_SIZE); {advice}")
