"""A pipeline of stages in one process: everything that is sent waits, and chance chooses what arrives or runs next.

Links between two ranks keep their order, as sockets do; nothing else is certain. What waits is encoded, as on the wire.
The stages and their decoders are real. While it runs, it checks what every order must keep: see `StageRecord` for rows
and layers, `SimulatedPipeline` for answers and credit.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import msgspec
import torch
from torch import Tensor

from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.protocol import (
    Admit,
    Free,
    Gather,
    Pass,
    RowsOutput,
    StageInput,
    StageRows,
    Step,
    WorkerDescription,
)
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.stage import FlowControl, Stage, StageOutput
from megatron.early_exit.inference.worker.worker import Worker

MOST_EVENTS = 50_000
"""Between two outputs; more of them are taken for a pipeline that goes round in circles."""

Part = int | tuple[str, int]
"""A layer, from 0, or ("block", exit index)."""

_encode = msgspec.msgpack.encode


class StageRecord:
    """Which rows have run which layers and exit blocks of one rank.

    A layer runs each row of a slot once, in order and without gaps: attention would else read keys that are not there.
    Rows run again from where a new epoch begins."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.num_rows: dict[Part, Counter[int]] = {
            **{layer: Counter() for layer in range(decoder.first_layer, decoder.last_layer)},
            **{("block", one.index): Counter() for one in decoder.exits if one.block is not None},
        }
        """Rows of each slot that have run each part, in the order of the cache."""
        self.num_passes = 0
        self._epochs: Counter[int] = Counter()
        self._taken_back: dict[int, set[int]] = defaultdict(set)
        """By slot: where newer epochs begin."""
        run_layers, run_exit_block = type(decoder).run_layers, type(decoder).run_exit_block

        def recorded_layers(hidden: Tensor, attention: object, first: int, last: int) -> tuple[Tensor, Tensor]:
            for layer in range(first, last):
                self._note(layer, attention.segments)
            return run_layers(decoder, hidden, attention, first, last)

        def recorded_block(exit_index: int, hidden: Tensor, attention: object) -> Tensor:
            self._note(("block", exit_index), attention.segments)
            return run_exit_block(decoder, exit_index, hidden, attention)

        decoder.run_layers, decoder.run_exit_block = recorded_layers, recorded_block

    def receive(self, message: Step | StageInput) -> None:
        """What a message changes."""
        for operation in message.operations:
            if isinstance(operation, Admit):
                self._epochs[operation.slot] = 0
                self._taken_back[operation.slot].clear()
                for counter in self.num_rows.values():
                    counter[operation.slot] = len(operation.prefix)
            elif isinstance(operation, Gather):
                for counter, slot in itertools.product(self.num_rows.values(), range(len(operation.sources))):
                    counter[slot] = operation.count
        for one in message.rows:
            rows = one.rows if isinstance(one, StageRows) else one
            if rows.epoch > self._epochs[rows.slot]:
                self._epochs[rows.slot] = rows.epoch
                self._taken_back[rows.slot].add(one.first)

    def _note(self, part: Part, segments: Sequence) -> None:
        self.num_passes += 1
        counter = self.num_rows[part]
        for slot, first, count in segments:
            is_again = first < counter[slot] and first in self._taken_back[slot]
            assert first == counter[slot] or is_again, (
                f"{part} has run {counter[slot]} rows of slot {slot}, not {first}"
            )
            counter[slot] = first + count


@dataclass
class SimulatedRank:
    """One rank of a stage, and what is on its way to it."""

    stage: Stage
    record: StageRecord
    inputs: deque[tuple[bytes, Tensor | None]] = field(default_factory=deque)
    """Sent, not yet here."""
    kept_back: deque[tuple[bytes, Tensor | None]] = field(default_factory=deque)
    """Here; the rank does not choose passes, and the next one does not know of them."""
    passes: deque[tuple[bytes, StageOutput, list[bytes]]] = field(default_factory=deque)
    """That the leader has chosen, with what became of them there."""

    def receive(self, kind: type, message: tuple[bytes, Tensor | None]) -> None:
        decoded = msgspec.msgpack.decode(message[0], type=kind)
        self.record.receive(decoded)
        self.stage.receive(decoded, message[1])


class SimulatedPipeline:
    """An executor. Checks that every `Rows` of a request that has not ended is answered once, that fill rows stay
    within their credit, that all credit comes back, that followers do what their leader does, and that something can
    always happen while something is waited for."""

    def __init__(
        self,
        decoders: Sequence[Sequence[Decoder]],
        description: WorkerDescription,
        choices: Random,
        flow: FlowControl,
    ) -> None:
        """decoders: of each rank of each stage; their caches are cleared."""
        layers = tuple(ranks[0].last_layer - ranks[0].first_layer for ranks in decoders)
        self.description = msgspec.structs.replace(description, layers_per_stage=layers)
        self.flow, self.choices = flow, choices
        self.stages = [
            [self._make_rank(decoder, number, len(decoders)) for decoder in ranks]
            for number, ranks in enumerate(decoders)
        ]
        self.num_fill_sent: Counter[int] = Counter()
        """Fill rows sent to each stage."""
        self.num_fill_out: Counter[int] = Counter()
        """Of them, those for which it has given no credit back."""
        self.most_fill_out: Counter[int] = Counter()
        self.owed: Counter[tuple[int, int]] = Counter()
        """`Rows` of each (slot, epoch) that are not answered, of requests that have not ended."""
        self.kept_to: Counter[int] = Counter()
        """Of each slot, the most rows that a request has left there."""
        self._generations: dict[int, int] = {}
        self.met: Counter[str] = Counter()
        """How often something came that not every order has."""
        self._answers: list[deque[bytes]] = [deque() for _ in decoders]
        """Of each stage, on their way to the engine."""
        self._credits: list[deque[int]] = [deque() for _ in decoders]
        """On their way to each stage."""
        self._may_choose = [False] * len(decoders)
        self._delivered: list[RowsOutput] = []
        self._weights: dict[tuple[str, int, int], int] = {}
        self._is_even = choices.randrange(2) == 0

    def _make_rank(self, decoder: Decoder, number: int, num_stages: int) -> SimulatedRank:
        decoder.cache._cache.zero_()
        worker = Worker(decoder)
        return SimulatedRank(Stage(worker, number, num_stages, self.flow), StageRecord(decoder))

    @property
    def ranks(self) -> list[SimulatedRank]:
        return [rank for ranks in self.stages for rank in ranks]

    # What the engine calls.

    @property
    def can_submit(self) -> bool:
        return True

    def submit(self, step: Step) -> None:
        for operation in step.operations:
            if isinstance(operation, Admit):
                self.met["slot used again"] += operation.generation > 1
                self.met["shared prefix"] += len(operation.prefix) > 0
                self._generations[operation.slot] = operation.generation
            elif isinstance(operation, Free):
                self._generations.pop(operation.slot)
                self.kept_to[operation.slot] = max(self.kept_to[operation.slot], operation.complete_to)
                self._forget(operation.slot)
        for rows in step.rows:
            self.met[rows.phase] += 1
            self.met["new epoch"] += self._forget(rows.slot, rows.epoch)
            self.met["prefill in flight"] += rows.phase == "prefill" and self.owed[rows.slot, rows.epoch] > 0
            self.owed[rows.slot, rows.epoch] += 1
        self._send(0, _encode(step), None)

    def poll(self, timeout: float | None = None) -> list[RowsOutput]:
        for _ in range(MOST_EVENTS):
            if self._delivered and self.choices.randrange(4) != 1:  # several may come at once
                break
            if timeout == 0 and self.choices.randrange(4) == 1:
                break
            if not self._let_something_happen():
                assert self._delivered or timeout == 0, f"nothing can happen, and {+self.owed} are to be answered"
                break
        else:
            raise AssertionError("many things happen, and no output comes")
        outputs, self._delivered = self._delivered, []
        return outputs

    def measure_costs(self) -> StepCosts:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def drain(self) -> None:
        """Go on until nothing can happen."""
        for _ in range(MOST_EVENTS):
            if not self._let_something_happen():
                break
        else:
            raise AssertionError("the pipeline does not come to rest")
        assert not +self.owed, f"{+self.owed} are not answered"
        assert not +self.num_fill_out or not self.flow.fill_credit, "credit has not come back"

    def deliver_what_is_kept_back(self) -> None:
        """Give followers what they have got behind their leader's last pass."""
        for number, (_, *followers) in enumerate(self.stages):
            for rank in followers:
                while rank.kept_back:
                    rank.receive(self._input_type(number), rank.kept_back.popleft())

    # What can happen.

    def _let_something_happen(self) -> bool:
        events = list(self._events())
        if not events:
            return False
        weights = [self._weight(event[:3]) for event in events]
        if not any(weights):
            weights = [1] * len(events)
        point = self.choices.randrange(sum(weights))
        index = next(i for i, total in enumerate(itertools.accumulate(weights)) if point < total)
        events[index][3]()
        return True

    def _events(self) -> list[tuple[str, int, int, Callable[[], None]]]:
        """(kind, stage, rank, what happens)"""
        events = []
        for number, ranks in enumerate(self.stages):
            for index, rank in enumerate(ranks):
                if rank.inputs:
                    events.append(("input", number, index, lambda n=number, i=index: self._arrive(n, i)))
                if rank.passes and self._can_follow(rank):
                    events.append(("follow", number, index, lambda n=number, i=index: self._follow(n, i)))
            if self._may_choose[number]:
                events.append(("pass", number, 0, lambda n=number: self._choose(n)))
            if self._answers[number]:
                events.append(("answer", number, 0, lambda n=number: self._answer(n)))
            if self._credits[number]:
                events.append(("credit", number, 0, lambda n=number: self._credit(n)))
        return events

    def _weight(self, event: tuple[str, int, int]) -> int:
        """Half of the time some events happen seldom, or only when nothing else can: a stage starves, answers late."""
        if self._is_even:
            return 1
        if event not in self._weights:
            self._weights[event] = (8, 1, 0)[self.choices.randrange(3)]
        return self._weights[event]

    def _send(self, number: int, message: bytes, hidden: Tensor | None) -> None:
        """To one stage, from the engine: all its ranks get it."""
        for rank in self.stages[number]:
            rank.inputs.append((message, hidden))

    def _arrive(self, number: int, index: int) -> None:
        rank = self.stages[number][index]
        message = rank.inputs.popleft()
        if index > 0:
            rank.kept_back.append(message)
            return
        rank.receive(self._input_type(number), message)
        self._may_choose[number] = True

    @staticmethod
    def _input_type(number: int) -> type:
        return Step if number == 0 else StageInput

    def _choose(self, number: int) -> None:
        """The leader of a stage runs a pass, and hands it to the others."""
        leader, *followers = self.stages[number]
        chosen = leader.stage.choose()
        if chosen is None:
            self._may_choose[number] = False
            return
        encoded, answers = _encode(chosen), []
        output = leader.stage.run(chosen, lambda outputs: answers.append(_encode(outputs)))
        for answer in answers:
            self._note_answers(msgspec.msgpack.decode(answer, type=list[RowsOutput]))
        self._answers[number] += answers
        for follower in followers:
            follower.passes.append((encoded, output, answers))
        self._hand_on(number, 0, output)
        if output.credit:
            self._note_credit(number, output.credit)
            self._credits[number - 1].append(output.credit)

    def _can_follow(self, rank: SimulatedRank) -> bool:
        chosen = msgspec.msgpack.decode(rank.passes[0][0], type=Pass)
        return chosen.num_inputs <= rank.stage.num_inputs + len(rank.kept_back)

    def _follow(self, number: int, index: int) -> None:
        """Another rank of a stage does the leader's pass, with what had come to the leader then."""
        rank = self.stages[number][index]
        encoded, expected, expected_answers = rank.passes.popleft()
        chosen = msgspec.msgpack.decode(encoded, type=Pass)
        while rank.stage.num_inputs < chosen.num_inputs:
            rank.receive(self._input_type(number), rank.kept_back.popleft())
        answers: list[bytes] = []
        output = rank.stage.run(chosen, lambda outputs: answers.append(_encode(outputs)))
        assert answers == expected_answers, "a follower answers what its leader does not"
        assert output.following == expected.following, "a follower hands on what its leader does not"
        if expected.hidden is not None:
            assert torch.equal(output.hidden, expected.hidden)
        self._hand_on(number, index, output)

    def _hand_on(self, number: int, index: int, output: StageOutput) -> None:
        if output.following is None:
            return
        following, hidden = output.following, output.hidden
        assert number + 1 < len(self.stages), "the last stage hands something on"
        num_rows = sum(len(one.tokens) for one in following.rows)
        assert num_rows == (0 if hidden is None else len(hidden))
        assert len({one.rows.slot for one in following.rows}) == len(following.rows), "a slot has rows twice"
        if index == 0:
            self._note_fill(number + 1, sum(len(one.tokens) for one in following.rows if one.is_fill))
        message = _encode(following), None if hidden is None else hidden.clone()
        self.stages[number + 1][index].inputs.append(message)

    def _answer(self, number: int) -> None:
        self._delivered += msgspec.msgpack.decode(self._answers[number].popleft(), type=list[RowsOutput])

    def _credit(self, number: int) -> None:
        self.stages[number][0].stage.add_credit(self._credits[number].popleft())
        self._may_choose[number] = True

    # What must hold.

    def _forget(self, slot: int, epoch: int | None = None) -> bool:
        """Nothing is owed any more, or nothing of other epochs. Returns whether there were some."""
        stale = [key for key in self.owed if key[0] == slot and key[1] != epoch]
        for key in stale:
            del self.owed[key]
        return bool(stale)

    def _note_answers(self, outputs: list[RowsOutput]) -> None:
        for output in outputs:
            key = output.slot, output.epoch
            if output.generation == self._generations.get(output.slot) and key in self.owed:
                self.owed[key] -= output.answers
                assert output.answers >= 0 and self.owed[key] >= 0, f"{key} is answered more often than it asked"

    def _note_fill(self, number: int, count: int) -> None:
        self.num_fill_sent[number] += count
        self.num_fill_out[number] += count
        self.most_fill_out[number] = max(self.most_fill_out[number], self.num_fill_out[number])

    def _note_credit(self, number: int, count: int) -> None:
        self.num_fill_out[number] -= count
        assert count > 0 and self.num_fill_out[number] >= 0, f"stage {number} gives more credit than it had fill rows"
