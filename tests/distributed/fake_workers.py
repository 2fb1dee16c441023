"""Workers without a model, for tests of executors: they echo tokens and misbehave when they are told to."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.protocol import (
    FINAL_HEAD,
    Admit,
    DrawnToken,
    ExitDescription,
    Pass,
    Prediction,
    Rows,
    RowsOutput,
    SlotOperation,
    StageInput,
    StageRows,
    Step,
    WorkerDescription,
)
from megatron.early_exit.inference.worker.placement import Placement

DESCRIPTION = WorkerDescription(
    num_layers=4, hidden_size=8, vocab_size=1000, exits=(ExitDescription(2, 2, False),), num_slots=4, num_positions=64
)
COSTS = StepCosts((1.0,) * 6, (2.0,) * 6, (3.0,) * 6, (4.0,) * 6)


class StageOutput(NamedTuple):
    """`worker.stage.StageOutput`, without torch."""

    following: StageInput | None
    hidden: Any
    credit: int
    num_rows: int = 0


MISBEHAVE = 900
"""Ids from here on tell a rank to do what `MISDEEDS` lists. The rank: the request's slot."""


def _fill_the_output() -> None:
    """Nothing by itself: see `FakeWorker.execute`."""


def _raise() -> None:
    raise RuntimeError("the fake worker broke")


MISDEEDS: tuple[Callable[[], Any], ...] = (
    _raise,
    lambda: os._exit(7),
    lambda: time.sleep(1000),
    lambda: ctypes.string_at(0),
    lambda: os.kill(os.getpid(), signal.SIGKILL),
    _fill_the_output,
    lambda: os.kill(os.getpid(), signal.SIGSTOP),
    lambda: ctypes.PyDLL(None).sleep(1000),  # no other thread runs meanwhile
)
RAISE, EXIT, HANG, CRASH, KILL, FLOOD, SUSPEND, FREEZE = range(MISBEHAVE, MISBEHAVE + len(MISDEEDS))


class FakeWorker:
    """Gives each row's last token plus one, and reports what it has seen."""

    description = DESCRIPTION

    def __init__(self, rank: int, sum_over_ranks: Callable[[int], int]) -> None:
        self.rank, self._sum_over_ranks = rank, sum_over_ranks
        self.numbers: list[int] = []
        self.seeds: dict[int, int] = {}

    def execute(self, step: Step) -> list[RowsOutput]:
        self.numbers.append(step.number)
        self.seeds |= {one.slot: one.sampling.seed for one in step.operations if isinstance(one, Admit)}
        for rows in step.rows:
            if rows.tokens[-1] >= MISBEHAVE and rows.slot == self.rank:
                MISDEEDS[rows.tokens[-1] - MISBEHAVE]()
        # As ranks that share weights do: they wait for each other, and notice who is gone.
        seen = self._sum_over_ranks(len(self.numbers))
        return [
            RowsOutput(
                rows.request_id, rows.slot, rows.generation, rows.epoch, rows.stop, tokens=_next_token(rows),
                layer_passes=seen, layer_runs=self.seeds.get(rows.slot, 0), complete_to=rows.stop,
                error="x" * (1 << 28) if rows.tokens[-1] == FLOOD else None,
            )
            for rows in step.rows
        ]  # fmt: skip

    def measure_costs(self) -> StepCosts:
        return COSTS


def _next_token(rows: Rows) -> tuple[DrawnToken, ...]:
    if rows.sample_from is None:
        return ()
    token = rows.tokens[-1] + 1
    return (DrawnToken(token, -0.5, 0.25, FINAL_HEAD, (Prediction(FINAL_HEAD, token, 0.25),)),)


class FakeStage:
    """A stage whose layers add one each to hidden states that begin as the token, and count themselves. The only exit
    is at the end of stage 0. Ranks that share a stage find out if they do not do the same."""

    def __init__(
        self, rank: int, stage: int, num_stages: int, sum_over_ranks: Callable[[int], int], dtype: str | None
    ) -> None:
        """dtype: of hidden states; None: there are none."""
        self.rank, self.stage, self.num_stages, self._dtype = rank, stage, num_stages, dtype
        self._sum_over_ranks, self._num_ranks = sum_over_ranks, sum_over_ranks(1)
        # What differs between stages of one model: the engine needs the largest.
        self.description = msgspec.structs.replace(
            DESCRIPTION, layers_per_stage=(2,) * num_stages, num_layers=2 * num_stages, bytes_per_token=10 + stage,
            has_approximate_heads=stage == 1,
        )  # fmt: skip
        self.num_inputs = self.credit = self.num_waiting_rows = 0
        self._came: list[tuple[StageRows, Any]] = []
        self._num_taken = 0
        self._operations: list[SlotOperation] = []

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def receive(self, message: StageInput | Step, hidden: Any = None) -> None:
        self.num_inputs += 1
        self._operations += message.operations
        for index, one in enumerate(message.rows):
            if isinstance(one, Rows):
                self._came.append((StageRows(one, one.first, one.tokens), self._embed(one.tokens[-1])))
            else:
                self._came.append((one, None if hidden is None else hidden[index : index + 1]))

    def _embed(self, token: int) -> Any:
        if self._dtype is None:
            return None
        import torch

        return torch.full((1, DESCRIPTION.hidden_size), float(token), dtype=getattr(torch, self._dtype))

    def add_credit(self, rows: int) -> None:
        self.credit += rows

    def choose(self) -> Pass | None:
        numbers = tuple(range(self._num_taken, len(self._came)))
        return Pass(self.num_inputs, numbers, fill_budget=64) if numbers or self._operations else None

    def run(self, chosen: Pass, answer: Callable[[list[RowsOutput]], None]) -> StageOutput:
        assert self.num_inputs == chosen.num_inputs
        operations, self._operations = tuple(self._operations), []
        taken = [self._came[number] for number in chosen.rows]
        self._num_taken += len(taken)
        for one, _ in taken:
            if one.rows.tokens[-1] >= MISBEHAVE and one.rows.slot == self.rank:
                MISDEEDS[one.rows.tokens[-1] - MISBEHAVE]()
        checksum = 1000 * self.num_inputs + sum(chosen.rows)
        if self._sum_over_ranks(checksum) != checksum * self._num_ranks:
            raise RuntimeError("the ranks of a stage run different passes")
        following, hidden = [], []
        for one, states in taken:
            following.append(self._run_one(one, answer))
            hidden.append(None if states is None else states + 2)
        if self.is_last:
            for one, states in zip(following, hidden, strict=True):
                token = one.rows.tokens[-1] + 2 * self.num_stages if states is None else int(states[0, -1])
                answer([_output(one, token, FINAL_HEAD, self.credit)])
            return StageOutput(None, None, credit=len(taken))
        states = None
        if taken and self._dtype is not None:
            import torch

            states = torch.cat(hidden)
        return StageOutput(StageInput(operations, tuple(following)), states, credit=len(taken))

    def _run_one(self, one: StageRows, answer: Callable[[list[RowsOutput]], None]) -> StageRows:
        one = msgspec.structs.replace(one, layer_passes=one.layer_passes + 2)
        if self.stage == 0 and one.rows.exits:
            answer([_output(one, one.rows.tokens[-1] + 1, 0, self.credit)])
            one = msgspec.structs.replace(one, answers=0)
        return one

    def measure_costs(self) -> StepCosts:
        self._sum_over_ranks(1)
        zeros = (0.0,) * 6
        exits = ((2.0,) * 6, (3.0,) * 6) if self.stage == 0 else (zeros, zeros)
        final = (4.0,) * 6 if self.is_last else zeros
        return StepCosts((1.0 + self.stage,) * 6, *exits, final, batch_seconds=0.1 * (1 + self.stage))


def _output(one: StageRows, token: int, head: int, credit: int) -> RowsOutput:
    rows, drawn = one.rows, DrawnToken(token, -0.5, 0.25, head, (Prediction(head, token, 0.25),))
    return RowsOutput(
        rows.request_id, rows.slot, rows.generation, rows.epoch, rows.stop, (drawn,) if one.answers else (),
        layer_passes=one.layer_passes, layer_runs=credit, complete_to=rows.stop if head == FINAL_HEAD else 0,
        answers=one.answers, error="x" * (1 << 28) if rows.tokens[-1] == FLOOD else None,
    )  # fmt: skip


def make_fake(
    placement: Placement,
    ranks_differ: bool = False,
    fails: str | None = None,
    failing_rank: int = 0,
    uses_collectives: bool = False,
    agrees: bool = False,
    num_stages: int = 1,
    dtype: str | None = None,
) -> tuple[FakeWorker | FakeStage, str]:
    """A factory for `WorkerFactory`. fails: how `failing_rank` fails in start-up. dtype: of hidden states."""
    rank = int(os.environ["RANK"])
    if rank == failing_rank and fails is not None:
        if fails == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"value": ValueError, "file": FileNotFoundError, "runtime": RuntimeError}[fails](f"rank {rank} is unwell")
    add_up = _sums(placement.join()) if uses_collectives else lambda value: value
    if num_stages > 1:
        worker = FakeStage(rank, placement.stage, num_stages, add_up, dtype)
    else:
        worker = FakeWorker(rank, add_up)
    if agrees:
        slots, positions = placement.smallest(10 + rank), placement.smallest(64 - rank)
        worker.description = msgspec.structs.replace(worker.description, num_slots=slots, num_positions=positions)
    return worker, f"checkpoint {rank if ranks_differ else 0}"


def _sums(tensor_parallel: Any) -> Callable[[int], int]:
    import torch

    def add_up(value: int) -> int:
        tensor = torch.tensor([value])
        tensor_parallel.sum(tensor)
        return int(tensor)

    return add_up
