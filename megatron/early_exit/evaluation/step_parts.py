"""Where a decoding step of the full model goes: what its layers and its head take by themselves, and the rest."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.early_exit.evaluation.rows import Row
from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.report import aligned

PARTS = ("layers", "final head", "rest")


def step_parts(full: Sequence[Row], costs: StepCosts, num_layers: int) -> list[Row]:
    """Of each batch size, seconds and share of the fastest step that was seen, as `costs` are the fastest as well;
    nothing over pipeline stages, where steps overlap. full: `per_prompt` of the full model at each batch size.

    The rest is the scheduler, the sampling, what attention needs for sequences longer than those that were measured,
    and on a GPU the launches; it is what is left, and so below 0 where layers were measured too slow."""
    found = []
    for one in full:
        steps = [seconds for of_round in one["fastest_step_seconds"] for seconds in of_round if seconds is not None]
        if not steps:
            continue
        step, batch = min(steps), one["batch"]
        layers, head = num_layers * costs.layer(batch, slots=batch), costs.final_head(batch)
        for part, seconds in zip(PARTS, (layers, head, step - layers - head), strict=True):
            found.append({"batch": batch, "part": part, "seconds": seconds, "share": seconds / step})
    return found


def step_table(parts: Sequence[Row]) -> str:
    """One line a batch size."""
    lines = [("batch", "step", *PARTS)]
    for batch in dict.fromkeys(one["batch"] for one in parts):
        of_batch = [one for one in parts if one["batch"] == batch]
        total = sum(one["seconds"] for one in of_batch)
        cells = (f"{1e3 * one['seconds']:.2f} ms ({one['share']:.0%})" for one in of_batch)
        lines.append((str(batch), f"{1e3 * total:.2f} ms", *cells))
    return aligned(lines)
