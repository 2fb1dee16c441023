"""What a layer and a head cost on this machine, by the number of rows: measured once, when something depends on it."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron.early_exit.inference.decoder import Decoder
from megatron.early_exit.inference.rows import Segment

ROW_COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class StepCosts:
    """Seconds, each measured for `ROW_COUNTS` rows of one slot. Exits: of the first; zeros if the model has none."""

    layer_seconds: tuple[float, ...]
    ask_seconds: tuple[float, ...]
    """What is asked of every row: the cheap head if there is one, else the exit's own."""
    exit_head_seconds: tuple[float, ...]
    final_head_seconds: tuple[float, ...]
    batch_seconds: float = 0.0
    """To set up a batch of rows: once a step, and again where rows leave."""
    is_asking_cheap: bool = False
    """Whether the exit's own head is needed as well when a token leaves."""

    def layer(self, rows: float) -> float:
        return _interpolate(self.layer_seconds, rows)

    def ask(self, rows: float) -> float:
        return _interpolate(self.ask_seconds, rows)

    def exit_head(self, rows: float) -> float:
        return _interpolate(self.exit_head_seconds, rows)

    def final_head(self, rows: float) -> float:
        return _interpolate(self.final_head_seconds, rows)


def _interpolate(seconds: tuple[float, ...], rows: float) -> float:
    """Between the measured row counts, and proportional beyond the last."""
    if rows <= ROW_COUNTS[0]:
        return seconds[0]
    if rows >= ROW_COUNTS[-1]:
        return seconds[-1] * rows / ROW_COUNTS[-1]
    above = bisect_left(ROW_COUNTS, rows)
    if ROW_COUNTS[above] == rows:
        return seconds[above]
    low, high = ROW_COUNTS[above - 1], ROW_COUNTS[above]
    share = (rows - low) / (high - low)
    return seconds[above - 1] * (1 - share) + seconds[above] * share


@torch.inference_mode()
def measure_costs(decoder: Decoder, slot: int = 0, repetitions: int = 3) -> StepCosts:
    """Time the decoder's layers and heads. It writes to `slot`, which must be free.

    Every layer runs in turn, so that weights come from memory as they do when decoding. All tensor-parallel ranks call
    it together and get rank 0's numbers, since they must draw the same conclusions."""
    layers, asks, exits, final, batches = [], [], [], [], []
    for rows in ROW_COUNTS:
        rows_that_fit = min(rows, decoder.num_positions)
        layout = decoder.layout([Segment(slot, 0, rows_that_fit)])
        hidden = decoder.embed([0] * rows_that_fit, layout)
        set_up = lambda n=rows_that_fit: decoder.embed([0] * n, decoder.layout([Segment(slot, 0, n)]))
        batches.append(_seconds(set_up, repetitions))
        run_all = lambda h=hidden, la=layout: decoder.run_layers(h, la, 0, decoder.num_layers)
        layers.append(_seconds(run_all, repetitions) / decoder.num_layers)
        final.append(_seconds(lambda h=hidden: decoder.final_output(h), repetitions))
        exits.append(_seconds(lambda h=hidden: decoder.exit_output(0, h), repetitions) if decoder.exits else 0.0)
        asks.append(_seconds(lambda h=hidden: decoder.ask_exit(0, h), repetitions) if decoder.exits else 0.0)
    numbers = torch.tensor([layers, asks, exits, final, batches], dtype=torch.float64, device=decoder.weights.device)
    group = decoder.weights.tp_group
    if group.size() > 1:
        torch.distributed.broadcast(numbers, src=torch.distributed.get_global_rank(group, 0), group=group)
    *by_rows, batches = (tuple(row) for row in numbers.tolist())
    return StepCosts(*by_rows, batch_seconds=batches[0], is_asking_cheap=decoder.is_asking_cheap)


def _seconds(action: Callable[[], object], repetitions: int) -> float:
    """The fastest of some runs after one that warms up."""
    times = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        action()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
