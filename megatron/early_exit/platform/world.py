"""What the environment says of the processes that were started together. Imports neither torch nor core."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping


def world_size() -> int:
    """How many processes were started together (torchrun's WORLD_SIZE). Raises ValueError if it is no number."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"the environment variable WORLD_SIZE is {text!r}; it should be a number of processes")
    return int(text)


def check_world_size(allowed: int = 1, setting: str | None = None) -> None:
    """Raise ValueError unless one process was started, which starts others where it needs them, or `allowed` were.

    With others a rank would wait for ranks that never come, or each do the whole work. setting: the flag or argument
    that says how many are allowed; None: always one."""
    started = world_size()
    if started in (1, allowed):
        return
    if setting is None:
        what, advice = "one process does all the work here", "start one, without torchrun"
    else:
        what = f"{setting} is {allowed}"
        advice = f"start one, without torchrun, which starts its own workers, or set {setting} to {started}"
        if allowed > 1:
            advice += f", or start {allowed} with torchrun --nproc-per-node {allowed}"
    raise ValueError(
        f"{what} but {started} processes were started (WORLD_SIZE); {advice}. Where RANK and WORLD_SIZE are those of "
        "another job (in its pod or shell), run without them: env -u RANK -u WORLD_SIZE -u LOCAL_RANK"
    )


def check_num_ranks(sizes: Mapping[str, int]) -> None:
    """As `check_world_size`, where as many are allowed as the product of `sizes`, which go by flag or argument. Raises
    ValueError for sizes below 1 as well."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    named = [name for name, size in sizes.items() if size > 1] or list(sizes)[:1]
    check_world_size(math.prod(sizes.values()), " x ".join(named))
