"""Where a decoding step of the full model goes: what its layers and its head take by themselves, and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron.early_exit.evaluation.rows import Row
from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.platform.columns import aligned

REST = "rest"
PARTS = ("layers", "final head", REST)


def step_parts(full: Sequence[Row], costs: StepCosts, num_layers: int) -> list[Row]:
    """Of each batch size, seconds and share of the fastest step that was seen, as `costs` are the fastest as well;
    nothing over pipeline stages, where steps overlap. full: `per_prompt` of the full model at each batch size. costs:
    of requests like these.

    The rest is the scheduler, the sampling, what attention needs for sequences longer than those that were measured,
    and on a GPU the launches. `seconds_alone` is what a part took by itself: see `within_step`."""
    found = []
    for one in full:
        steps = [seconds for of_round in one["fastest_step_seconds"] for seconds in of_round if seconds is not None]
        if not steps:
            continue
        step, batch = min(steps), one["batch"]
        alone = dict(zip(PARTS, (num_layers * costs.layer(batch, slots=batch), costs.final_head(batch))))
        for part, seconds in within_step(step, alone).items():
            found.append({
                "batch": batch, "part": part, "seconds": seconds, "share": seconds / step,
                "seconds_alone": alone.get(part),
            })  # fmt: skip
    return found


def within_step(step: float, alone: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each part and of the rest, which add up to the step.

    Parts that were measured by themselves can add up to more than the step, and then nothing is known of the rest: it
    is 0, and the step is theirs in proportion. By itself a part is slower where weights come from memory that a step
    finds in the cache, as those of small models; and it is the fastest of a few, the step the fastest of very many."""
    total = sum(alone.values())
    scale = min(step / total, 1.0) if total else 1.0
    return {**{part: scale * seconds for part, seconds in alone.items()}, REST: max(step - total, 0.0)}


def step_table(parts: Sequence[Row]) -> str:
    """One line a batch size."""
    lines: list[tuple[str, ...]] = [("batch", "step", *PARTS)]
    for batch in dict.fromkeys(one["batch"] for one in parts):
        of_batch = [one for one in parts if one["batch"] == batch]
        total = sum(one["seconds"] for one in of_batch)
        cells = (f"{1e3 * one['seconds']:.2f} ms ({one['share']:.0%})" for one in of_batch)
        lines.append((str(batch), f"{1e3 * total:.2f} ms", *cells))
    return aligned(lines)
