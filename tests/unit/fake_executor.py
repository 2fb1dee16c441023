"""An executor without a model: it answers any step by arithmetic on token ids, and keeps the protocol's rules.

Its keys and values are the token ids themselves, and which exits' blocks saw them. So it notices a row that attends to
another request's tokens, a shared row that was never computed in all layers, a slot that two requests use at once."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.protocol import (
    FINAL_HEAD,
    Admit,
    CopyPrefix,
    DrawnToken,
    ExitDescription,
    Free,
    Gather,
    HeadScores,
    Rows,
    RowsOutput,
    SlotOperation,
    Step,
    WorkerDescription,
)

NUM_LAYERS = 6
EXITS = ExitConfig(exit_layer_nums=(2, 4))
COSTS = StepCosts((1.0,) * 6, (1.0,) * 6, (1.0,) * 6, (1.0,) * 6)


def predict(ids: Sequence[int], exit_index: int, vocab_size: int) -> tuple[int, float]:
    """(token, confidence) of a head behind these tokens. Exits agree with the final head two times of three."""
    chance = random.Random(hash((17, *ids)))
    token, of_head = chance.randrange(vocab_size), random.Random(hash((exit_index, *ids)))
    if exit_index != FINAL_HEAD and of_head.random() < 1 / 3:
        token = (token + 1) % vocab_size
    return token, of_head.random()


def answer_of(prompt: Sequence[int], params: GenerationParams, vocab_size: int, num_positions: int) -> list[int]:
    """What a model of its own would answer: a plain loop over tokens."""
    policy, ids = params.exit_policy(EXITS), list(prompt)
    for _ in range(min(params.max_tokens, num_positions - len(prompt) + 1)):
        token, _ = predict(ids, FINAL_HEAD, vocab_size)
        for layer, threshold in () if policy is None else zip(policy.exit_layers, policy.thresholds, strict=True):
            of_exit, confidence = predict(ids, EXITS.index_of(layer), vocab_size)
            if confidence >= threshold:
                token = of_exit
                break
        ids.append(token)
    return ids[len(prompt) :]


class Cell(NamedTuple):
    """What one position of a slot holds."""

    token: int
    blocks: frozenset[int]
    is_complete: bool


@dataclass
class _Slot:
    """A slot's request and its rows. Cells stay when the request ends."""

    cells: list[Cell] = field(default_factory=list)
    request: Admit | None = None
    epoch: int = 0
    num_rows: int = 0
    complete_to: int = 0

    @property
    def ids(self) -> list[int]:
        return [cell.token for cell in self.cells[: self.num_rows]]


class FakeExecutor:
    """Outputs of a step come when `lag` more steps have been submitted, or when nothing else is to be done."""

    def __init__(
        self,
        num_slots: int = 4,
        num_positions: int = 64,
        vocab_size: int = 50,
        has_blocks: bool = False,
        lag: int = 0,
        spoil: Callable[[Rows, RowsOutput], RowsOutput] = lambda rows, output: output,
    ) -> None:
        """spoil: changes outputs."""
        self.description = WorkerDescription(
            num_layers=NUM_LAYERS,
            hidden_size=8,
            vocab_size=vocab_size,
            exits=tuple(ExitDescription(layer, layer, has_blocks) for layer in EXITS.exit_layer_nums),
            num_slots=num_slots,
            num_positions=num_positions,
        )
        self.steps: list[Step] = []
        self.has_ended = False
        self._slots = [_Slot() for _ in range(num_slots)]
        self._outputs: deque[list[RowsOutput]] = deque()
        self._lag, self._spoil = lag, spoil

    @property
    def can_submit(self) -> bool:
        return len(self._outputs) <= self._lag

    def submit(self, step: Step) -> None:
        if self.has_ended:
            raise ExecutorError("rank 1 has ended")
        assert self.can_submit
        self.steps.append(step)
        for operation in step.operations:
            self._operate(operation)
        assert len({rows.slot for rows in step.rows}) == len(step.rows), "a slot has rows twice in a step"
        self._outputs.append([self._spoil(rows, self._run(rows)) for rows in step.rows])

    def poll(self, timeout: float | None = None) -> list[RowsOutput]:
        if self.has_ended:
            raise ExecutorError("rank 1 has ended")
        return self._outputs.popleft() if self._outputs else []

    def measure_costs(self) -> StepCosts:
        if self.has_ended:
            raise ExecutorError("rank 1 has ended")
        self._slots[0] = _Slot()
        return COSTS

    def close(self) -> None:
        self.has_ended = True

    def _operate(self, operation: SlotOperation) -> None:
        if isinstance(operation, Admit):
            slot = self._slots[operation.slot]
            before = slot.request
            assert before is None, f"slot {operation.slot} is request {before and before.request_id}'s"
            count, blocks = len(operation.prefix), self._blocks(operation)
            assert tuple(cell.token for cell in slot.cells[:count]) == operation.prefix, "rows of other tokens"
            for cell in slot.cells[:count]:
                assert cell.is_complete, "a shared row has not run all layers"
                assert blocks <= cell.blocks, "a block has not seen a shared row"
            assert count < operation.num_prompt_tokens
            slot.request, slot.epoch, slot.num_rows, slot.complete_to = operation, 0, count, count
        elif isinstance(operation, CopyPrefix):
            source, target = self._slots[operation.source], self._slots[operation.target]
            assert target.request is None and 0 < operation.count <= len(source.cells)
            target.cells[: operation.count] = source.cells[: operation.count]
        elif isinstance(operation, Free):
            slot = self._slots[operation.slot]
            slot.request, slot.cells = None, slot.cells[: operation.complete_to]
        elif isinstance(operation, Gather):
            found = [self._slots[source].cells[: operation.count] for source in operation.sources]
            for slot, cells in zip(self._slots, found, strict=False):
                slot.cells, slot.num_rows = list(cells), operation.count

    def _blocks(self, request: Admit) -> frozenset[int]:
        return frozenset(index for index in request.exits if self.description.exits[index].has_block)

    def _run(self, rows: Rows) -> RowsOutput:
        slot = self._slots[rows.slot]
        request = slot.request
        assert request is not None and rows.tokens
        assert (request.request_id, request.generation) == (rows.request_id, rows.generation)
        assert rows.stop <= self.description.num_positions
        # Rows go back behind rejected drafts alone, and a new epoch says so.
        assert rows.first == slot.num_rows if rows.epoch == slot.epoch else rows.first <= slot.num_rows
        assert rows.epoch >= slot.epoch
        blocks = self._blocks(request)
        slot.cells[rows.first : rows.stop] = [Cell(token, blocks, False) for token in rows.tokens]
        slot.epoch, slot.num_rows = rows.epoch, rows.stop
        slot.complete_to = min(slot.complete_to, rows.first)
        tokens, is_deferred = self._draw(rows, slot)
        is_short = rows.phase == "score" and rows.score_heads[-1] != FINAL_HEAD
        if not is_deferred and not is_short and rows.first <= slot.num_rows:
            slot.cells[: rows.stop] = [cell._replace(is_complete=True) for cell in slot.cells[: rows.stop]]
            slot.complete_to = rows.stop
        return RowsOutput(
            request_id=rows.request_id, slot=rows.slot, generation=rows.generation, epoch=rows.epoch, stop=rows.stop,
            tokens=tokens, scores=tuple(self._score(head, rows, slot) for head in rows.score_heads),
            layer_passes=NUM_LAYERS * len(rows.tokens), layer_runs=NUM_LAYERS, complete_to=slot.complete_to,
        )  # fmt: skip

    def _draw(self, rows: Rows, slot: _Slot) -> tuple[tuple[DrawnToken, ...], bool]:
        """(tokens, whether the rows are deferred)"""
        ids = slot.ids
        for one in rows.exits:
            token, confidence = predict(ids, one.exit, self.description.vocab_size)
            if rows.phase == "draft" or confidence >= one.threshold:
                num_deferred = slot.num_rows - slot.complete_to
                is_deferred = rows.phase == "draft" or num_deferred <= slot.request.max_deferred
                return (DrawnToken(token, -1.0, confidence, one.exit, caught_up=not is_deferred),), is_deferred
        start = rows.stop if rows.sample_from is None else rows.sample_from
        drawn = [
            predict(ids[: position + 1], FINAL_HEAD, self.description.vocab_size)
            for position in range(start, rows.stop)
        ]
        return tuple(DrawnToken(token, -1.0, confidence, FINAL_HEAD) for token, confidence in drawn), False

    def _score(self, head: int, rows: Rows, slot: _Slot) -> HeadScores:
        """The log-probability of a target says at which position it was scored."""
        ids, positions = slot.ids, range(max(rows.score_from, rows.first), rows.stop)
        predictions = [predict(ids[: position + 1], head, self.description.vocab_size) for position in positions]
        return HeadScores(
            exit=head,
            tokens=[token for token, _ in predictions],
            confidences=[confidence for _, confidence in predictions],
            log_probs=[-float(position) for position, _ in zip(positions, rows.targets, strict=False)],
            top_log_probs=[],
        )
