"""What the stages of a pipeline cost: times and bytes of one microbatch, given (measured), or kept in a JSON file.

`cost_model.py` estimates them from a model's settings and a GPU's data sheet.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StageCosts:
    """One stage (model chunk), for one microbatch, on each of its tensor-parallel ranks."""

    forward_sec: float
    """Layers, embedding, and on the last stage the final head with its loss."""

    backward_sec: float
    """Layers with what is recomputed, embedding, final head. Without exits."""

    exit_sec: float = 0.0
    """Forward and backward of all exits of the stage; 0 without exits."""

    communication_sec: float = 0.0
    """Time from the send of a message by this stage until the neighbour, whichever, has it."""

    activation_bytes: int = 0
    """Kept from the forward to the backward."""

    exit_gradient_bytes: int = 0
    """Kept from exits that run before the backward until then: gradients of their hidden states (s x b x h)."""

    exit_head_bytes: int = 0
    """While exits run: one chunk of logits and one weight gradient."""

    final_head_bytes: int = 0
    """Memory of the final head, while the last stage's forward runs."""

    recompute_bytes: int = 0
    """While the backward runs: activations of the layer that is recomputed."""

    state_bytes: int = 0
    """Parameters, gradients and optimizer state, exits included. Not per microbatch."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{field.name} = {value!r}: must be a number, at least 0")

    def without_exits(self) -> StageCosts:
        """The stage of the model without exits, as far as it can be told: `state_bytes` still has their parameters."""
        return dataclasses.replace(self, exit_sec=0.0, exit_gradient_bytes=0, exit_head_bytes=0)


def write_costs(costs: Iterable[StageCosts], path: str | Path) -> None:
    """Write costs as JSON: a list with one object for each stage."""
    text = json.dumps([dataclasses.asdict(cost) for cost in costs], indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


def read_costs(path: str | Path) -> list[StageCosts]:
    """Costs of all stages from `write_costs`' form, or from a profile of training (`--profile-pipeline`), which has
    them under `costs`; what an object leaves out is 0. Raises ValueError or OSError."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; give a JSON file")
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if isinstance(rows, dict) and "costs" in rows:
        rows = rows["costs"]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list with one object for each stage")
    known = [field.name for field in dataclasses.fields(StageCosts)]
    costs = []
    for stage, row in enumerate(rows):
        unknown = sorted(set(row) - set(known))
        missing = [name for name in ("forward_sec", "backward_sec") if name not in row]
        if unknown or missing:
            problem = f"unknown {', '.join(unknown)}" if unknown else f"{' and '.join(missing)} missing"
            raise ValueError(f"{path}: stage {stage}: {problem}; the names are {', '.join(known)}")
        try:
            costs.append(StageCosts(**row))
        except ValueError as error:
            raise ValueError(f"{path}: stage {stage}: {error}") from None
    return costs


def exit_stages(costs: Sequence[StageCosts]) -> list[int]:
    """Stages that own exits."""
    return [stage for stage, cost in enumerate(costs) if cost.exit_sec > 0]
