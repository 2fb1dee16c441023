"""Workers without a model, for tests of executors: they echo tokens and misbehave when they are told to."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import msgspec

from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.protocol import (
    FINAL_HEAD,
    Admit,
    DrawnToken,
    ExitDescription,
    Prediction,
    Rows,
    RowsOutput,
    Step,
    WorkerDescription,
)
from megatron.early_exit.inference.worker.placement import Placement

DESCRIPTION = WorkerDescription(
    num_layers=4, hidden_size=8, vocab_size=1000, exits=(ExitDescription(2, 2, False),), num_slots=4, num_positions=64
)
COSTS = StepCosts((1.0,) * 5, (2.0,) * 5, (3.0,) * 5, (4.0,) * 5)

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


def make_fake(
    placement: Placement,
    ranks_differ: bool = False,
    fails: str | None = None,
    failing_rank: int = 0,
    uses_collectives: bool = False,
    agrees: bool = False,
) -> tuple[FakeWorker, str]:
    """A factory for `WorkerFactory`. fails: how `failing_rank` fails in start-up."""
    rank = int(os.environ["RANK"])
    if rank == failing_rank and fails is not None:
        if fails == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"value": ValueError, "file": FileNotFoundError, "runtime": RuntimeError}[fails](f"rank {rank} is unwell")
    add_up = _sums(placement.join()) if uses_collectives else lambda value: value
    worker = FakeWorker(rank, add_up)
    if agrees:
        slots, positions = placement.smallest(10 + rank), placement.smallest(64 - rank)
        worker.description = msgspec.structs.replace(DESCRIPTION, num_slots=slots, num_positions=positions)
    return worker, f"checkpoint {rank if ranks_differ else 0}"


def _sums(tensor_parallel: Any) -> Callable[[int], int]:
    import torch

    def add_up(value: int) -> int:
        tensor = torch.tensor([value])
        tensor_parallel.sum(tensor)
        return int(tensor)

    return add_up
