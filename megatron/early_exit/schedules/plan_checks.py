"""Does a plan compute what it says, and do its ranks never wait forever?

Communication model: a send returns at once and its message arrives some time later; a receive blocks until it has.
Between two neighbours there is one channel per direction of the pipeline, and messages of a channel arrive in the order
in which they were sent. So a valid plan runs on a communicator whose sends do not block; one that holds a sender until
its message is received may come to a halt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple, NoReturn

from megatron.early_exit.schedules.messages import CHANNELS, MESSAGE_AFTER, MESSAGE_BEFORE, STEP
from megatron.early_exit.schedules.plan import Action, Kind, Plan
from megatron.early_exit.schedules.simulate import simulate
from megatron.early_exit.schedules.stage_costs import StageCosts

_BEFORE_ON_A_STAGE = (
    (Kind.RECEIVE_FORWARD, Kind.FORWARD),
    (Kind.FORWARD, Kind.SEND_FORWARD),
    (Kind.FORWARD, Kind.EXIT),
    (Kind.FORWARD, Kind.BACKWARD),
    (Kind.EXIT, Kind.BACKWARD),
    (Kind.RECEIVE_BACKWARD, Kind.BACKWARD),
    (Kind.BACKWARD, Kind.SEND_BACKWARD),
    (Kind.FORWARD, Kind.SEND_TEACHER),
    (Kind.RECEIVE_TEACHER, Kind.SEND_TEACHER),
    (Kind.RECEIVE_TEACHER, Kind.EXIT),
)
"""What must come first, of one microbatch on one stage."""


def validate(plan: Plan, exit_stages: Collection[int] = ()) -> None:
    """Raise ValueError that names the first action that is wrong or missing, with its rank, index (from 0) and reason.

    exit_stages: stages that own exits. A plan without any backward is taken for forward-only tuning. Checked:
    every microbatch of the batch runs forward and backward once on each stage; those that fill bubbles run where their
    kind may; exits run at most once, between forward and backward; each receive has one send, in the same order on both
    sides; passes come after the receives that they need and before the sends of what they make; no deadlock.
    """
    _Validator(plan, frozenset(exit_stages)).run()


class _Key(NamedTuple):
    """What an action is, wherever it stands."""

    stage: int
    kind: Kind
    microbatch: int


class _Place(NamedTuple):
    """Where an action stands."""

    rank: int
    position: int


class _Validator:
    def __init__(self, plan: Plan, exit_stages: frozenset[int]) -> None:
        self.plan, self.exit_stages = plan, exit_stages
        self.places: dict[_Key, _Place] = {}
        self.stages: dict[tuple[Kind, int], list[int]] = defaultdict(list)  # that have this action of a microbatch
        self.is_training = any(action.kind == Kind.BACKWARD for actions in plan.ranks for action in actions)

    def run(self) -> None:
        self._check_numbers()
        for rank, actions in enumerate(self.plan.ranks):
            for index, action in enumerate(actions):
                self._locate(_Place(rank, index), action)
        for microbatch in range(self.plan.num_microbatches):
            self._check_regular(microbatch)
        for microbatch in self.plan.fill_warmup:
            self._check_warmup_fill(microbatch)
        for microbatch in self.plan.fill_cooldown:
            self._check_cooldown_fill(microbatch)
        self._check_exits()
        self._check_ends_of_messages()
        self._check_ends_of_teacher_messages()
        self._check_order_on_stages()
        self._check_order_of_messages()
        simulate(self.plan, [StageCosts(0.0, 0.0)] * self.plan.num_stages)  # raises where ranks wait forever

    # -- What there is

    def _check_numbers(self) -> None:
        plan = self.plan
        for name in ("num_ranks", "num_chunks", "num_microbatches"):
            if getattr(plan, name) < 1:
                raise ValueError(f"{plan.name}: {name} = {getattr(plan, name)}, must be at least 1")
        if not self.is_training and (plan.num_fill or not self.exit_stages):
            what = f"{plan.num_fill} microbatches fill bubbles" if plan.num_fill else "there are no exits to tune"
            raise ValueError(f"{plan.name}: nothing runs backward, and {what}")
        for stage in sorted(self.exit_stages):
            if not 0 <= stage < plan.num_stages:
                raise ValueError(f"exits on stage {stage}: the stages of {plan.name} are 0 to {plan.num_stages - 1}")

    def _locate(self, place: _Place, action: Action) -> None:
        plan = self.plan
        if action.chunk >= plan.num_chunks:
            self._refuse(place, f"chunk {action.chunk} of a plan of {_count(plan.num_chunks, 'chunk')}")
        total = plan.num_microbatches + plan.num_fill
        if action.microbatch >= total:
            self._refuse(place, f"microbatch {action.microbatch} of a plan of {_count(total, 'microbatch', 'es')}")
        if action.is_partial != (action.microbatch >= plan.num_microbatches):
            numbers = f"microbatches from {plan.num_microbatches} on fill bubbles"
            self._refuse(place, f"{'marked' if action.is_partial else 'not marked'} as partial, but only {numbers}")
        key = _Key(action.chunk * plan.num_ranks + place.rank, action.kind, action.microbatch)
        if key in self.places:
            self._refuse(place, f"was there before, as action {self.places[key].position}")
        self.places[key] = place
        self.stages[action.kind, action.microbatch].append(key.stage)

    def _stages_of(self, kind: Kind, microbatch: int) -> list[int]:
        return sorted(self.stages[kind, microbatch])

    # -- Which passes a microbatch needs

    def _check_regular(self, microbatch: int) -> None:
        for stage in range(self.plan.num_stages):
            self._require(_Key(stage, Kind.FORWARD, microbatch), "every microbatch runs forward on each stage")
            if self.is_training:
                self._require(_Key(stage, Kind.BACKWARD, microbatch), "every microbatch runs backward on each stage")

    def _check_warmup_fill(self, microbatch: int) -> None:
        forwards = self._require_some(Kind.FORWARD, microbatch)
        last = forwards[-1]
        for stage in range(last):
            self._require(
                _Key(stage, Kind.FORWARD, microbatch), f"stage {last} runs it forward, so all stages before have to"
            )
        if last not in self.exit_stages:
            place = self.places[_Key(last, Kind.FORWARD, microbatch)]
            self._refuse(place, f"the warmup fill ends here, but stage {last} has no exit: nothing gives it a gradient")
        for stage in range(last + 1):
            self._require(
                _Key(stage, Kind.BACKWARD, microbatch), "a warmup fill runs backward through all stages that it reached"
            )
        self._refuse_outside(Kind.BACKWARD, microbatch, forwards, "a backward on a stage that had no forward of it")

    def _check_cooldown_fill(self, microbatch: int) -> None:
        for stage in range(self.plan.num_stages):
            self._require(_Key(stage, Kind.FORWARD, microbatch), "a cooldown fill runs forward on each stage")
        first = self._require_some(Kind.BACKWARD, microbatch)[0]
        for stage in range(first, self.plan.num_stages):
            self._require(
                _Key(stage, Kind.BACKWARD, microbatch), f"stage {first} runs it backward, so all stages after have to"
            )

    def _check_exits(self) -> None:
        last_regular = self.plan.num_microbatches - 1
        for key, place in self.places.items():
            if key.kind != Kind.EXIT:
                continue
            if key.stage not in self.exit_stages:
                self._refuse(place, f"stage {key.stage} has no exit")
            if key.microbatch > last_regular:
                self._refuse(place, "exits of a microbatch that fills a bubble run in its backward")
            if self.is_training:
                self._check_synchronisation(key, place)
        if not self.is_training:
            for stage in sorted(self.exit_stages):
                for microbatch in range(self.plan.num_microbatches):
                    self._require(
                        _Key(stage, Kind.EXIT, microbatch), "without a backward, exits need a step of their own"
                    )

    def _check_synchronisation(self, exit_key: _Key, place: _Place) -> None:
        """Gradients are synchronised from a stage's last backward on, or from its exits if these come before it."""
        backwards = {
            other.microbatch: where for other, where in self.places.items()
            if other.stage == exit_key.stage and other.kind == Kind.BACKWARD
        }  # fmt: skip
        last = max(backwards, key=backwards.__getitem__)
        later = sorted(where for microbatch, where in backwards.items() if microbatch != last and where > place)
        if exit_key.microbatch == last and later:
            action = self.plan.ranks[place.rank][later[0].position]
            self._refuse(
                place,
                "gradients are synchronised from the exits of the stage's last backward on, so these must come after "
                f"{action}, which is action {later[0].position}",
            )

    # -- Messages

    def _check_ends_of_messages(self) -> None:
        """A message is there exactly where a pass goes on to another stage, and has both ends."""
        for direction, step in STEP.items():
            send, receive = MESSAGE_AFTER[direction], MESSAGE_BEFORE[direction]
            for microbatch in range(self.plan.num_microbatches + self.plan.num_fill):
                stages = self._stages_of(direction, microbatch)
                makers = [stage for stage in stages if stage + step in stages]
                for stage in makers:
                    why = f"stage {stage + step} needs what {direction}{microbatch} of stage {stage} returns"
                    self._require(_Key(stage, send, microbatch), why)
                    self._require(_Key(stage + step, receive, microbatch), why)
                self._refuse_outside(send, microbatch, makers, "no stage goes on with what it sends")
                takers = [stage + step for stage in makers]
                self._refuse_outside(receive, microbatch, takers, "no stage makes what it waits for")

    def _check_ends_of_teacher_messages(self) -> None:
        """Where there are any, those of every microbatch go from the last stage to the first one with exits."""
        messages = [key for key in self.places if key.kind in (Kind.SEND_TEACHER, Kind.RECEIVE_TEACHER)]
        if self.is_training and messages:
            self._refuse(self.places[messages[0]], "exits follow the final head only where nothing runs backward")
        if not messages:
            return
        first = min(self.exit_stages)
        senders, receivers = range(first + 1, self.plan.num_stages), range(first, self.plan.num_stages - 1)
        for microbatch in range(self.plan.num_microbatches):
            why = f"what the final head reads of it has to come to stage {first}, the first with exits"
            for kind, stages in ((Kind.SEND_TEACHER, senders), (Kind.RECEIVE_TEACHER, receivers)):
                for stage in stages:
                    self._require(_Key(stage, kind, microbatch), why)
                self._refuse_outside(kind, microbatch, stages, "no stage makes it, or none needs it")

    def _check_order_of_messages(self) -> None:
        for channel in CHANNELS:
            for sender in range(self.plan.num_ranks):
                receiver = (sender + channel.step) % self.plan.num_ranks
                sent = self._messages(sender, channel.send)
                received = self._messages(receiver, channel.receive)
                for (send, send_place), (receive, place) in zip(sent, received):
                    if send != (receive[0] - channel.step, receive[1]):
                        action = self.plan.ranks[sender][send_place.position]
                        self._refuse(
                            place,
                            f"messages of rank {sender} arrive in the order in which they were sent, and this one is "
                            f"{action} (action {send_place.position} there)",
                        )

    def _messages(self, rank: int, kind: Kind) -> list[tuple[tuple[int, int], _Place]]:
        """((stage, microbatch), place) of a rank's messages of one kind, in order."""
        return [
            ((action.chunk * self.plan.num_ranks + rank, action.microbatch), _Place(rank, index))
            for index, action in enumerate(self.plan.ranks[rank])
            if action.kind == kind
        ]

    # -- Order

    def _check_order_on_stages(self) -> None:
        for key, place in self.places.items():
            for earlier, later in _BEFORE_ON_A_STAGE:
                if key.kind == later:
                    other = self.places.get(key._replace(kind=earlier))
                    if other is not None and other > place:
                        action = self.plan.ranks[other.rank][other.position]
                        self._refuse(place, f"must come after {action}, which is action {other.position}")

    # -- Messages for people

    def _require(self, key: _Key, why: str) -> None:
        if key not in self.places:
            chunk, rank = divmod(key.stage, self.plan.num_ranks)
            action = Action(key.kind, key.microbatch, chunk, key.microbatch >= self.plan.num_microbatches)
            raise ValueError(f"{self.plan.name}: rank {rank}: {action} is missing: {why}")

    def _require_some(self, kind: Kind, microbatch: int) -> list[int]:
        stages = self._stages_of(kind, microbatch)
        if not stages:
            raise ValueError(f"{self.plan.name}: {kind}{microbatch}p is missing on all ranks")
        return stages

    def _refuse_outside(self, kind: Kind, microbatch: int, allowed: Sequence[int], why: str) -> None:
        for stage in self._stages_of(kind, microbatch):
            if stage not in allowed:
                self._refuse(self.places[_Key(stage, kind, microbatch)], why)

    def _refuse(self, place: _Place, why: str) -> NoReturn:
        action = self.plan.ranks[place.rank][place.position]
        raise ValueError(f"{self.plan.name}: rank {place.rank}, action {place.position} ({action}): {why}")


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
