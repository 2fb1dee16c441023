"""What the environment says of the processes that were started together. Imports neither torch nor core."""

from __future__ import annotations

import os


def check_world_size(needed: int, setting: str | None = None, world_size: int | None = None) -> None:
    """Raise ValueError unless as many processes were started as share the weights of one model: with others, the first
    collective would wait for ranks that never come.

    setting: the flag or argument that says how many are needed; None where it is always one. world_size: of process
    groups that exist; default what the environment says (torchrun's WORLD_SIZE)."""
    if needed < 1:
        raise ValueError(f"{setting} is {needed}; it must be at least 1")
    if world_size is None:
        text = os.environ.get("WORLD_SIZE", "1")
        if not text.isdecimal():
            raise ValueError(f"the environment variable WORLD_SIZE is {text!r}; it should be a number of processes")
        world_size = int(text)
    if world_size == needed:
        return
    started = "1 process was" if world_size == 1 else f"{world_size} processes were"
    advice = [] if needed == 1 else [f"start {needed} with torchrun --nproc-per-node {needed}"]
    if world_size > 1:
        advice += [f"set {setting} to {world_size}"] if setting is not None else []
        advice += [
            "where RANK and WORLD_SIZE are those of another job (in its pod or shell), run without them: "
            "env -u RANK -u WORLD_SIZE -u LOCAL_RANK"
        ]
    what = "one process does all the work here" if setting is None else f"{setting} is {needed}"
    raise ValueError(f"{what} but {started} started (WORLD_SIZE); {', or '.join(advice)}")
