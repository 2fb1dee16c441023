"""Chooses how a model with exits is pipelined on a cluster, and says why.

Four questions, each answered by simulating the candidates: on which side of a stage's boundary do exits sit, how many
layers does each stage get, do exits run in idle time, and how many further microbatches fill the bubbles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron.early_exit.config.layer_split import split_flags
from megatron.early_exit.schedules.comparison import (
    FREE,
    Setup,
    Variant,
    compare,
    exits_in_backward,
    exits_in_idle_time,
    plain_gpt,
)
from megatron.early_exit.schedules.fill import uniform_fill

GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """What the planner chose and what it expects."""

    setup: Setup
    """The setup with the chosen side of exits and layers per stage."""
    variant: Variant
    """The chosen plan."""
    plain: Variant
    """Plain GPT as the given setup splits it."""
    exits_in_idle_time: bool
    num_fill_warmup: int
    num_fill_cooldown: int
    reasons: tuple[str, ...]
    """One sentence or two for each decision, with numbers."""

    @property
    def time_overhead(self) -> float:
        """Share by which the iteration is longer than plain GPT's."""
        return self.variant.iteration_sec / self.plain.iteration_sec - 1

    @property
    def memory_overhead(self) -> float:
        """Memory of the rank that needs most, against plain GPT's that needs most."""
        return max(self.variant.peak_bytes) / max(self.plain.peak_bytes) - 1

    @property
    def training_flags(self) -> list[str]:
        """Flags of training that differ with the choice: exits, layers of every stage, and what runs in idle time."""
        config, num_ranks = self.setup.config, self.setup.num_ranks
        exits = ["--exit-layer-nums", *map(str, config.exits.exit_layer_nums)]
        exits.append("--pre-exit" if config.exits.pre_exit else "--no-pre-exit")
        idle = ["--exits-in-bubbles"] if self.exits_in_idle_time and self.trains_exits_in_idle_time else []
        fill = ["--fill-explicit-bubbles"] if self.num_fill_warmup + self.num_fill_cooldown else []
        return [*exits, *split_flags(self.setup.layers_per_stage, num_ranks), *idle, *fill]

    @property
    def trains_exits_in_idle_time(self) -> bool:
        """Whether training can run the exits in idle time; it does not where all layers may be recomputed."""
        return self.setup.config.parallel.recompute_granularity != "full"


def choose(setup: Setup, is_uneven_allowed: bool = True) -> Choice:
    """The fastest way that fits. setup: with exits; its own choices are the starting point. Raises ValueError."""
    if not setup.config.exits.num_exits:
        raise ValueError("there is nothing to choose without exits: give --exit-layer-nums")
    plain = plain_gpt(setup)
    reasons = []
    chosen, reason = _choose_side(setup)
    reasons.append(reason)
    if is_uneven_allowed and setup.num_ranks > 1 and len(setup.layers_per_stage) == setup.num_ranks:
        chosen, reason = _choose_layers(chosen)
        reasons.append(reason)
    variants = compare(chosen)
    base, in_backward, in_idle_time = variants[:3]
    is_idle = in_idle_time.iteration_sec < in_backward.iteration_sec
    reasons.append(_reason_for_idle_time(chosen, base, in_backward, in_idle_time, is_idle))
    variant, warmup, cooldown = in_idle_time if is_idle else in_backward, 0, 0
    if len(variants) > 3:
        filled = variants[3]
        if _fits(chosen, filled) or not _fits(chosen, variant):
            warmup, cooldown = filled.plan.num_fill_warmup, filled.plan.num_fill_cooldown
            reasons.append(_reason_for_fill(chosen, variant, filled))
            variant = filled if warmup + cooldown else variant
        else:
            reasons.append(f"No fill: it needs {_gib(filled)}, and the GPU has {_gpu_gib(chosen)}.")
    else:
        reasons.append("No fill: the interleaved schedule has no plan for it.")
    if not _fits(chosen, variant):
        reasons.append(
            f"It does not fit: the fullest rank needs {_gib(variant)} of the {_gpu_gib(chosen)} of a "
            f"{chosen.gpu.name}. Use more tensor or pipeline ranks, or recompute activations."
        )
    return Choice(chosen, variant, plain, is_idle, warmup, cooldown, tuple(reasons))


# Which side of a boundary


def _choose_side(setup: Setup) -> tuple[Setup, str]:
    exits = setup.config.exits
    other = _other_side(setup)
    names = _named(setup)
    if any(head.mlp for head in exits.heads):
        return setup, f"Exits stay {names}: an MLP branch stands beside its layer's own MLP."
    if other is None:
        return setup, f"Exits stay {names}: on the other side there is no layer for all of them."
    if _stages_of_exits(setup) == _stages_of_exits(other):
        return (
            setup,
            f"Exits stay {names}: inside their stages it makes no difference on which side of a layer they are.",
        )
    mine, theirs = _best_variant(setup), _best_variant(other)
    keys = [(round(one.iteration_sec / mine.iteration_sec / FREE), max(one.peak_bytes)) for one in (mine, theirs)]
    better, best, worse, rest = (other, theirs, setup, mine) if keys[1] < keys[0] else (setup, mine, other, theirs)
    return better, (
        f"Exits sit {_named(better)}: an iteration takes {_time(best)} and the fullest rank "
        f"{_gib(best)}, against {_time(rest)} and {_gib(rest)} with them {_named(worse)}."
    )


def _other_side(setup: Setup) -> Setup | None:
    """The same function of the model, with each exit on the other side of the boundary between two layers."""
    exits = setup.config.exits
    step = -1 if exits.pre_exit else 1
    layers = tuple(layer + step for layer in exits.exit_layer_nums)
    if any(head.mlp for head in exits.heads) or layers[0] < 1 or layers[-1] > setup.config.model.num_layers:
        return None
    moved = replace(exits, exit_layer_nums=layers, pre_exit=not exits.pre_exit)
    return replace(setup, config=replace(setup.config, exits=moved))


def _stages_of_exits(setup: Setup) -> list[int]:
    return [
        stage
        for layer in setup.config.exits.exit_layer_nums
        for stage, layers in enumerate(setup.stage_layers)
        if layer in layers
    ]


def _named(setup: Setup) -> str:
    exits = setup.config.exits
    side = "before" if exits.pre_exit else "after"
    plural = "s" if exits.num_exits > 1 else ""
    stages = _and(sorted(set(_stages_of_exits(setup))))
    return (
        f"{side} layer{plural} {_and(exits.exit_layer_nums)} (stage{'s' if ',' in stages or ' ' in stages else ''} "
        f"{stages})"
    )


# Layers per stage


def _choose_layers(setup: Setup) -> tuple[Setup, str]:
    """Move layer by layer away from the slowest stage, as long as the iteration gets shorter."""
    start = best = _Candidate.of(setup)
    improved = True
    while improved:
        improved = False
        for counts in _layers_moved(best.setup):
            candidate = _Candidate.of(setup.with_layers(counts))
            fits = candidate.peak_bytes <= max(start.peak_bytes, setup.gpu.memory_bytes)
            if fits and candidate.iteration_sec < best.iteration_sec * (1 - 1e-6):
                best, improved = candidate, True
                break
    given = _dashed(setup.layers_per_stage)
    slowest = max(range(setup.num_ranks), key=lambda stage: _busy_sec(setup, stage))
    why = (
        f"{_extras(setup, slowest)} stage {slowest} the slowest, {_busy_sec(setup, slowest) * 1e3:.1f} ms a microbatch"
    )
    gain = 1 - best.iteration_sec / start.iteration_sec
    if gain < FREE:
        return setup, f"Layers stay {given}: {why}, and moving any layer gains less than {FREE:.1%}."
    return best.setup, (
        f"Layers {_dashed(best.setup.layers_per_stage)} instead of {given}: {why}; the iteration gets {gain:.1%} "
        f"shorter, the fullest rank has {best.peak_bytes / GIB:.1f} GiB instead of {start.peak_bytes / GIB:.1f} GiB."
    )


@dataclass(frozen=True)
class _Candidate:
    setup: Setup
    iteration_sec: float
    peak_bytes: int

    @classmethod
    def of(cls, setup: Setup) -> _Candidate:
        """Simulate a setup: of many microbatches only a few; each further one takes what the last ones took."""
        num_ranks, total = setup.num_ranks, setup.num_microbatches
        if total <= 4 * num_ranks:
            variant = _best_variant(setup)
            return cls(setup, variant.iteration_sec, max(variant.peak_bytes))
        few, more = (_best_variant(setup.with_num_microbatches(count * num_ranks)) for count in (2, 3))
        steady_sec = (more.iteration_sec - few.iteration_sec) / num_ranks
        seconds = more.iteration_sec + (total - 3 * num_ranks) * steady_sec
        return cls(setup, seconds, max(more.peak_bytes))


def _layers_moved(setup: Setup) -> Iterator[tuple[int, ...]]:
    """Splits with one layer less on the slowest stage (or one recomputed group, which is not divided), the least busy
    stage's first."""
    counts, parallel = setup.layers_per_stage, setup.config.parallel
    by_busy = sorted(range(len(counts)), key=lambda stage: _busy_sec(setup, stage))
    source = by_busy[-1]
    step = parallel.recompute_num_layers or 1 if parallel.recompute_method == "uniform" else 1
    if counts[source] <= step:
        return
    for target in by_busy[:-1]:
        moved = list(counts)
        moved[source] -= step
        moved[target] += step
        yield tuple(moved)


def _busy_sec(setup: Setup, stage: int) -> float:
    """What one microbatch takes on a stage."""
    cost = setup.costs[stage]
    return cost.forward_sec + cost.backward_sec + cost.exit_sec


def _extras(setup: Setup, stage: int) -> str:
    num_exits = _stages_of_exits(setup).count(stage)
    parts = [
        text
        for text, is_there in [
            (f"{num_exits} exit{'s' if num_exits > 1 else ''}", num_exits),
            ("the embedding", stage == 0),
            ("the final head", stage == len(setup.layers_per_stage) - 1),
        ]
        if is_there
    ]
    verb = "make" if len(parts) > 1 or num_exits > 1 else "makes"
    return f"{' and '.join(parts)} {verb}" if parts else "its layers make"


# Plans


def _best_variant(setup: Setup) -> Variant:
    """Exits in idle time where that is possible, without fill."""
    in_backward = exits_in_backward(setup)
    in_idle_time = exits_in_idle_time(in_backward, setup.early_exit_stages)
    return min(in_backward, in_idle_time, key=lambda variant: variant.iteration_sec)


def _fits(setup: Setup, variant: Variant) -> bool:
    return max(variant.peak_bytes) <= setup.gpu.memory_bytes


# Sentences


def _reason_for_idle_time(
    setup: Setup, plain: Variant, in_backward: Variant, in_idle_time: Variant, is_idle: bool
) -> str:
    overhead = lambda variant: f"{variant.iteration_sec / plain.iteration_sec - 1:+.2%}"
    stuck = sorted(set(_stages_of_exits(setup)) - set(setup.early_exit_stages))
    note = ""
    if stuck:
        note = (
            f" On stage {_and(stuck)} they stay in the backward: inside recomputed layers their hidden states do not "
            "exist before."
        )
    if is_idle:
        return (
            f"Exits run in idle time: {overhead(in_idle_time)} against plain GPT with the same layers per stage, "
            f"instead of {overhead(in_backward)} in the backward.{note}"
        )
    return f"Exits stay in the backward ({overhead(in_backward)} against plain GPT): idle time gains nothing.{note}"


def _reason_for_fill(setup: Setup, variant: Variant, filled: Variant) -> str:
    costs = setup.costs
    ratio = sum(cost.backward_sec + cost.exit_sec for cost in costs) / sum(cost.forward_sec for cost in costs)
    formula = f"floor((P - 1) r / (1 + r)) = {uniform_fill(setup.num_ranks, ratio)} with r = {ratio:.2f}"
    warmup, cooldown = filled.plan.num_fill_warmup, filled.plan.num_fill_cooldown
    if not warmup + cooldown:
        return (
            f"No fill: one more microbatch makes the iteration more than {FREE:.1%} longer (equal stages: {formula})."
        )
    busy = lambda one: 1 - sum(map(one.timeline.idle_share, range(setup.num_ranks))) / setup.num_ranks
    return (
        f"Bubbles hold {warmup} + {cooldown} further microbatches (warmup + cooldown) at no time (equal stages with "
        f"exits everywhere: {formula}); ranks are busy {busy(filled):.1%} instead of {busy(variant):.1%} of the "
        f"iteration, the fullest rank has {_gib(filled)} instead of {_gib(variant)}."
    )


def _time(variant: Variant) -> str:
    seconds = variant.iteration_sec
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3f} ms"


def _gib(variant: Variant) -> str:
    return f"{max(variant.peak_bytes) / GIB:.1f} GiB"


def _gpu_gib(setup: Setup) -> str:
    return f"{setup.gpu.memory_bytes / GIB:.1f} GiB"


def _and(numbers: Sequence[int]) -> str:
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _dashed(numbers: Sequence[int]) -> str:
    return "-".join(map(str, numbers))
