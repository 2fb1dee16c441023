"""1F1B whose bubbles are filled with further microbatches (EE-LLM, arXiv:2312.04916, section 3).

Stage p of P idles for (P - 1 - p) backwards before its first backward, and as many forwards plus p backwards in the
cooldown. Two kinds of microbatches beyond the batch use this time, r = backward / forward:

- *Warmup fill* k (from 1) runs forward and backward through the first stages only: where all stages take equal time,
  those with k <= floor((P - 1 - p) r / (1 + r)), cut back to the last stage with an exit. Where its backward begins
  there is only the exits' gradient.
- *Cooldown fill* k runs forward through all stages, and backward from the last one as far as time allows: through the
  stages with k <= floor(p r / (1 + r)).

**Order.** In 1F1B, regular forward i of stage p may start as late as i (f + b) after the stage's first forward. Hence
the warmup has gaps of one backward each: fill 1's backward takes the last of them, fill 2's the one before, and so on,
at every stage, as if those were backwards of microbatches before the first. The forwards of fills come as early as the
regular ones behind them allow: fill k after ceil(k / r) regular forwards. All fills of the formula fit in this order.
Cooldown fills simply go on with 1F1B; what would end after the iteration is left out. No stage p holds more than P - p
microbatches between forward and backward, as in 1F1B.

With unequal stages or fewer microbatches than stages the order is the same. What is used is what costs nothing when the
passes are timed: it need not be the most that any order could hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from megatron.early_exit.schedules.builders import one_f_one_b_passes
from megatron.early_exit.schedules.messages import STEP, with_messages
from megatron.early_exit.schedules.plan import Action, Kind, Plan
from megatron.early_exit.schedules.stage_costs import StageCosts

_Passes = list[list[Action]]  # of each stage, in order
_PassKey = tuple[int, Kind, int]  # stage, kind, microbatch
_Ends = dict[_PassKey, float]
_TOLERANCE = 1e-9  # of the iteration time: sums of times in another order differ in the last digits


@dataclass(frozen=True)
class PassTimes:
    """What a microbatch takes on each stage; any unit, the same for all."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    """Time of a backward with the losses and gradients of the stage's exits."""
    communication: float = 0.0
    """Time from the end of a pass until the neighbour has what it returned."""

    def __post_init__(self) -> None:
        if len(self.forward) != len(self.backward):
            raise ValueError(f"times of {len(self.forward)} forwards and {len(self.backward)} backwards: one a stage")
        if min(self.forward + self.backward, default=0) <= 0 or self.communication < 0:
            raise ValueError(f"times of passes must be above 0, and of communication not below: {self}")

    def of(self, kind: Kind) -> tuple[float, ...]:
        return self.forward if kind == Kind.FORWARD else self.backward

    @classmethod
    def uniform(cls, num_stages: int, backward_forward_ratio: float = 2.0) -> PassTimes:
        """Equal stages; a forward takes 1."""
        return cls((1.0,) * num_stages, (float(backward_forward_ratio),) * num_stages)

    @classmethod
    def by_layers(cls, layers_per_stage: Sequence[int], backward_forward_ratio: float = 2.0) -> PassTimes:
        """Stages whose times go with their layers; a forward takes 1 on the average."""
        mean = sum(layers_per_stage) / len(layers_per_stage)
        forward = tuple(count / mean for count in layers_per_stage)
        return cls(forward, tuple(time * backward_forward_ratio for time in forward))

    @classmethod
    def from_costs(cls, costs: Sequence[StageCosts]) -> PassTimes:
        """Times from the costs of all stages, exits in the backward."""
        return cls(
            tuple(cost.forward_sec for cost in costs),
            tuple(cost.backward_sec + cost.exit_sec for cost in costs),
            max(cost.communication_sec for cost in costs),
        )


def with_filled_bubbles(
    num_ranks: int,
    num_microbatches: int,
    exit_stages: Collection[int],
    times: PassTimes | None = None,
    num_fill_warmup: int | None = None,
    num_fill_cooldown: int | None = None,
) -> Plan:
    """1F1B with fill microbatches that do not lengthen the iteration.

    exit_stages: stages that own exits. times: by default equal stages whose backward takes twice as long as a forward.
    num_fill_warmup, num_fill_cooldown: by default as many as cost nothing, at most num_ranks - 1 of each; where both
    compete for the same time (fewer microbatches than stages), warmup fill comes first. Raises ValueError where more
    are asked for, with the largest number that works, and for warmup fill without exits, which would train nothing.
    """
    _check_arguments(num_ranks, num_microbatches, exit_stages, times, num_fill_warmup, num_fill_cooldown)
    times = PassTimes.uniform(num_ranks) if times is None else times
    builder = _FillBuilder(num_ranks, num_microbatches, times)
    fill = builder.add_warmup(_Fill(), sorted(exit_stages), num_fill_warmup)
    fill = builder.add_cooldown(fill, num_fill_cooldown)
    return Plan(
        "1F1B with filled bubbles", with_messages(builder.passes(fill)), num_microbatches,
        len(fill.last_stages), len(fill.first_backward_stages),
    )  # fmt: skip


def _check_arguments(
    num_ranks: int,
    num_microbatches: int,
    exit_stages: Collection[int],
    times: PassTimes | None,
    num_fill_warmup: int | None,
    num_fill_cooldown: int | None,
) -> None:
    counts = {"num_fill_warmup": num_fill_warmup, "num_fill_cooldown": num_fill_cooldown}
    for name, count, least in [("num_ranks", num_ranks, 1), ("num_microbatches", num_microbatches, 1)] + [
        (name, count, 0) for name, count in counts.items() if count is not None
    ]:
        if count < least:
            raise ValueError(f"{name} = {count}: must be at least {least}")
    if times is not None and len(times.forward) != num_ranks:
        raise ValueError(f"times of {len(times.forward)} stages are given for {num_ranks} ranks")
    for stage in sorted(exit_stages):
        if not 0 <= stage < num_ranks:
            raise ValueError(f"exits on stage {stage}: the plan's stages are 0 to {num_ranks - 1}")
    if not exit_stages and num_fill_warmup != 0:
        asked = "as many as fit" if num_fill_warmup is None else num_fill_warmup
        raise ValueError(
            f"--num-fill-warmup-microbatches {asked}: these run through the first stages only and train what their "
            "exits give gradients to, but the model has no exits; add exits, or use 0"
        )


@dataclass(frozen=True)
class _Fill:
    """Which fills there are, how far each goes and where its forward stands."""

    last_stages: tuple[int, ...] = ()
    """Stages of warmup fills where the forward ends and the backward begins. Not increasing."""
    forwards_before: tuple[int, ...] = ()
    """Regular forwards before the warmup fill's. Not decreasing."""
    first_backward_stages: tuple[int, ...] = ()
    """Stages of cooldown fills with which their backward ends. Not decreasing."""


class _FillBuilder:
    """Adds fills one by one, each as far as it goes without making the iteration longer.

    Only what a fill changes is timed again: the warmup up to the first backwards, the cooldown from the last forwards.
    """

    def __init__(self, num_ranks: int, num_microbatches: int, times: PassTimes) -> None:
        self.num_ranks, self.num_microbatches, self.times = num_ranks, num_microbatches, times
        plain = self.passes(_Fill())
        self._ends = end_times(plain, times)
        self._ends_backwards = end_times(plain, times, reverse=True)
        self._tolerance = max(self._ends.values()) * _TOLERANCE
        self._time_limit = max(self._ends.values()) + self._tolerance

    def passes(self, fill: _Fill, skipped: int = 0) -> _Passes:
        """Forwards and backwards of each stage, in order. skipped: regular microbatches left out at the beginning."""
        passes = []
        for stage in range(self.num_ranks):
            actions = self._continued(fill, stage, skipped)
            if not skipped:
                num_forwards = self._num_forwards_before_backward(fill, stage)
                actions = self._warmup(fill, stage, actions[:num_forwards]) + actions[num_forwards:]
            passes.append(actions)
        return passes

    @property
    def _world(self) -> str:
        return f"{self.num_ranks} stages and {self.num_microbatches} microbatches"

    # -- Warmup

    def add_warmup(self, fill: _Fill, exit_stages: Sequence[int], number: int | None) -> _Fill:
        candidates = list(exit_stages)  # where the next fill may end, the deepest last
        while candidates and len(fill.last_stages) != number:
            more = self._with_warmup_fill(fill, candidates[-1])
            if more is not None and self._is_free_in_warmup(more):
                fill = more
            else:
                candidates.pop()
        found = len(fill.last_stages)
        if number is not None and found < number:
            raise ValueError(
                f"--num-fill-warmup-microbatches {number}: with {self._world}, {found} fit before the first backward "
                f"of the stages up to one with an exit ({', '.join(map(str, exit_stages))}); more would lengthen the "
                f"iteration. Use at most {found}"
            )
        return fill

    def _with_warmup_fill(self, fill: _Fill, last_stage: int) -> _Fill | None:
        """One more fill that goes up to `last_stage`, its forward as early as the regular ones behind it allow."""
        earliest = max(fill.forwards_before, default=1)
        for before in range(earliest, self._num_forwards_before_backward(fill, last_stage) + 1):
            num_ahead = before + len(fill.last_stages) + 1  # forwards ahead of regular forward number `before`
            if all(self._has_slack(stage, before, num_ahead) for stage in range(last_stage + 1)):
                return replace(
                    fill,
                    last_stages=(*fill.last_stages, last_stage),
                    forwards_before=(*fill.forwards_before, before),
                )
        return None

    def _has_slack(self, stage: int, microbatch: int, num_ahead: int) -> bool:
        """May a stage run this regular forward after `num_ahead` others without making the iteration longer?"""
        forward = (stage, Kind.FORWARD, microbatch)
        if forward not in self._ends:
            return True
        time = self.times.forward[stage]
        first_start = self._ends[stage, Kind.FORWARD, 0] - time
        return first_start + (num_ahead + 1) * time <= self._latest_end(forward)

    def _latest_end(self, key: _PassKey) -> float:
        """Time by which a regular pass must have ended for the iteration not to become longer."""
        stage, kind, _ = key
        return self._time_limit - self._ends_backwards[key] + self.times.of(kind)[stage]

    def _is_free_in_warmup(self, fill: _Fill) -> bool:
        """No regular pass ends too late for the iteration, and no stage's first backward later than without fill."""
        passes = []
        for stage in range(self.num_ranks):
            num_forwards = self._num_forwards_before_backward(fill, stage)
            forwards = [Action(Kind.FORWARD, microbatch) for microbatch in range(num_forwards)]
            passes.append([*self._warmup(fill, stage, forwards), Action(Kind.BACKWARD, 0)])
        if not _fits_in_memory(passes):
            return False
        ends = end_times(passes, self.times)
        firsts = [(stage, Kind.BACKWARD, 0) for stage in range(self.num_ranks)]
        return all(ends[first] <= self._ends[first] + self._tolerance for first in firsts) and all(
            end <= self._latest_end(key) for key, end in ends.items() if key in self._ends
        )

    def _num_forwards_before_backward(self, fill: _Fill, stage: int) -> int:
        return min(self.num_ranks - stage, self.num_microbatches + len(fill.first_backward_stages))

    def _warmup(self, fill: _Fill, stage: int, forwards: list[Action]) -> list[Action]:
        """A stage's forwards before its first backward, with the fills that reach it."""
        reaching = [k for k, last_stage in enumerate(fill.last_stages) if stage <= last_stage]
        numbers = [self.num_microbatches + k for k in reaching]
        return _warmup_with_fill(forwards, self.num_ranks - stage, numbers, [fill.forwards_before[k] for k in reaching])

    # -- Cooldown

    def add_cooldown(self, fill: _Fill, number: int | None) -> _Fill:
        num_warmup, ends = len(fill.last_stages), end_times(self.passes(fill), self.times)
        while len(fill.first_backward_stages) != number:
            more = self._with_cooldown_fill(fill, ends)
            if more is None or max(self._cooldown_ends(more, ends).values()) > self._time_limit:
                break
            if self.num_microbatches < self.num_ranks and not _fits_in_memory(self.passes(more)):
                break  # with more microbatches 1F1B goes on, which keeps to the limit
            fill = more
        found = len(fill.first_backward_stages)
        if number is not None and found < number:
            raise ValueError(
                f"--num-fill-cooldown-microbatches {number}: with {self._world} and {num_warmup} in the warmup, "
                f"{found} fit behind the last stage's last backward; more would lengthen the iteration. Use at most "
                f"{found}"
            )
        return fill

    def _with_cooldown_fill(self, fill: _Fill, ends: _Ends) -> _Fill | None:
        """One more fill, with backwards on the stages where they end in time; None if there are none."""
        everywhere = replace(fill, first_backward_stages=(*fill.first_backward_stages, 0))
        new_ends = self._cooldown_ends(everywhere, ends)
        number = self.num_microbatches + len(fill.last_stages) + len(fill.first_backward_stages)
        late = [s for s in range(self.num_ranks) if new_ends[s, Kind.BACKWARD, number] > self._time_limit]
        first = max([stage + 1 for stage in late] + [*fill.first_backward_stages, 0])
        if first == self.num_ranks:
            return None
        return replace(fill, first_backward_stages=(*fill.first_backward_stages, first))

    def _cooldown_ends(self, fill: _Fill, ends: _Ends) -> _Ends:
        """Times at which the passes after the last regular forwards end. ends: of all passes, without cooldown fill."""
        last = self.num_microbatches - 1
        passes: _Passes = []
        known: _Ends = {}
        for stage, actions in enumerate(self.passes(fill, skipped=max(0, self.num_microbatches - 2 * self.num_ranks))):
            start = actions.index(Action(Kind.FORWARD, last)) + 1
            known |= {(stage, a.kind, a.microbatch): ends[stage, a.kind, a.microbatch] for a in actions[:start]}
            passes.append(actions[start:])
        starts = [ends[stage, Kind.FORWARD, last] for stage in range(self.num_ranks)]
        return end_times(passes, self.times, known=known, starts=starts)

    def _continued(self, fill: _Fill, stage: int, skipped: int) -> list[Action]:
        """1F1B with the cooldown fills behind the regular microbatches; backwards that come too late left out."""
        num_regular, num_cooldown = self.num_microbatches - skipped, len(fill.first_backward_stages)
        passes = []
        for action in one_f_one_b_passes(self.num_ranks, stage, num_regular + num_cooldown):
            k = action.microbatch - num_regular
            if k < 0:
                passes.append(Action(action.kind, action.microbatch + skipped) if skipped else action)
            elif action.kind == Kind.FORWARD or stage >= fill.first_backward_stages[k]:
                number = self.num_microbatches + len(fill.last_stages) + k
                passes.append(Action(action.kind, number, is_partial=True))
        return passes


def _fits_in_memory(passes: _Passes) -> bool:
    """Has no stage p of P more than P - p microbatches in flight? So many has 1F1B if there are enough.

    Where a stage has a forward of a microbatch but no backward, it keeps nothing.
    """
    for stage, actions in enumerate(passes):
        kept = {a.microbatch for a in actions if not a.is_partial}
        kept |= {a.microbatch for a in actions if a.kind == Kind.BACKWARD}
        in_flight = 0
        for action in actions:
            if action.microbatch in kept:
                in_flight += STEP[action.kind]
            if in_flight > len(passes) - stage:
                return False
    return True


def _warmup_with_fill(
    forwards: list[Action], num_gaps: int, fills: list[int], forwards_before: list[int]
) -> list[Action]:
    """The passes of a stage before its first backward.

    forwards: of regular microbatches. num_gaps: places for backwards, one before each forward of 1F1B's warmup, whether
    there are as many microbatches or not. fills: numbers of the microbatches that fill. forwards_before: for each, how
    many regular forwards come before its own.
    """
    inserted: list[list[Action]] = [[] for _ in range(len(forwards) + 1)]  # before each regular forward, and at the end
    for fill, place in zip(fills, forwards_before):
        inserted[place].append(Action(Kind.FORWARD, fill, is_partial=True))
    # The last fill's backward comes first: it begins on an earlier stage. Fill 1's is in the last gap.
    place = 0
    for k, fill in reversed(list(enumerate(fills, start=1))):
        place = max(place, min(num_gaps - k, len(forwards)), forwards_before[k - 1])
        inserted[place].append(Action(Kind.BACKWARD, fill, is_partial=True))
    passes = []
    for place, forward in enumerate(forwards):
        passes += [*inserted[place], forward]
    return passes + inserted[-1]


def end_times(
    passes: Sequence[Sequence[Action]],
    times: PassTimes,
    reverse: bool = False,
    known: _Ends | None = None,
    starts: Sequence[float] | None = None,
) -> _Ends:
    """Time at which each pass ends if all start as early as they can. Sends are asynchronous, receives block.

    reverse: time runs from the end of the iteration back, so that a pass's value is how long before the end it must
    start. known, starts: ends of passes that came before these, and when each stage is done with them. Raises
    ValueError if passes wait for each other forever.
    """
    ends: _Ends = dict(known or {})
    present = {(stage, a.kind, a.microbatch) for stage, actions in enumerate(passes) for a in actions} | ends.keys()
    queues = [list(actions) if reverse else list(actions)[::-1] for actions in passes]  # the next is the last
    now = [0.0] * len(passes) if starts is None else list(starts)
    stages = list(range(len(passes)))
    while stages:
        stage = stages.pop()
        while queues[stage]:
            action = queues[stage][-1]
            step = -STEP[action.kind] if reverse else STEP[action.kind]
            source = (stage - step, action.kind, action.microbatch)
            if source in present:
                if source not in ends:
                    break
                now[stage] = max(now[stage], ends[source] + times.communication)
            queues[stage].pop()
            now[stage] += times.of(action.kind)[stage]
            ends[stage, action.kind, action.microbatch] = now[stage]
            if 0 <= stage + step < len(passes):
                stages.append(stage + step)
    if any(queues):
        raise ValueError("passes wait for each other: " + ", ".join(str(q[-1]) for q in queues if q))
    return ends


def uniform_fill(num_ranks: int, backward_forward_ratio: float) -> int:
    """Largest number of fills of either kind where all stages take equal time: floor((P - 1) r / (1 + r))."""
    return math.floor((num_ranks - 1) * backward_forward_ratio / (1 + backward_forward_ratio) + _TOLERANCE)
