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
def measure_costs(decoder: Decoder, slot: int = 0, repetitions: int = 5) -> StepCosts:
    """Time the decoder's layers and heads. It writes to `slot`, which must be free.

    Every layer runs in turn, so that weights come from memory as they do when decoding; and everything is timed in turn
    several times, so that a slow moment of the machine does not meet one part alone. All tensor-parallel ranks call it
    together and get rank 0's numbers, since they must draw the same conclusions."""
    actions: list[Callable[[], object]] = []
    for rows in (min(rows, decoder.num_positions) for rows in ROW_COUNTS):
        layout = decoder.layout([Segment(slot, 0, rows)])
        hidden = decoder.embed([0] * rows, layout)
        nothing = lambda: None
        actions += [
            lambda h=hidden, la=layout: decoder.run_layers(h, la, 0, decoder.num_layers),
            (lambda h=hidden: decoder.ask_exit(0, h)) if decoder.exits else nothing,
            (lambda h=hidden: decoder.exit_output(0, h)) if decoder.exits else nothing,
            lambda h=hidden: decoder.final_output(h),
            lambda n=rows: decoder.embed([0] * n, decoder.layout([Segment(slot, 0, n)])),
        ]
    for action in actions:  # warm up
        action()
    seconds = torch.tensor([[_seconds(action) for action in actions] for _ in range(repetitions)], dtype=torch.float64)
    seconds = seconds.amin(0).view(len(ROW_COUNTS), -1).t().to(decoder.weights.device)
    group = decoder.weights.tp_group
    if group.size() > 1:
        seconds = seconds.contiguous()
        torch.distributed.broadcast(seconds, src=torch.distributed.get_global_rank(group, 0), group=group)
    layers, asks, exits, final, batches = (tuple(row) for row in seconds.tolist())
    layers = tuple(value / decoder.num_layers for value in layers)
    if not decoder.exits:
        asks = exits = (0.0,) * len(ROW_COUNTS)
    return StepCosts(layers, asks, exits, final, batches[0], decoder.is_asking_cheap)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started
