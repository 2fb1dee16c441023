"""What a layer and a head cost on this machine, by the number of rows: measured once, when something depends on it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts
from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.inference.worker.decoder import Decoder


@torch.inference_mode()
def measure_costs(decoder: Decoder, slot: int = 0, repetitions: int = 5) -> StepCosts:
    """Time the decoder's layers and heads. It writes to `slot`, which must be free.

    Every layer runs in turn, so that weights come from memory as they do when decoding; and everything is timed in turn
    several times, so that a slow moment of the machine does not meet one part alone. All tensor-parallel ranks call it
    together and get rank 0's numbers, since they must draw the same conclusions."""
    actions: list[Callable[[], object]] = []
    for rows in (min(rows, decoder.num_positions) for rows in ROW_COUNTS):
        attention = decoder.attention_metadata([Segment(slot, 0, rows)])
        hidden = decoder.embed([0] * rows, attention)
        nothing = lambda: None
        actions += [
            lambda h=hidden, la=attention: decoder.run_layers(h, la, 0, decoder.num_layers),
            (lambda h=hidden: decoder.probe_exit(0, h)) if decoder.exits else nothing,
            (lambda h=hidden: decoder.exit_output(0, h)) if decoder.exits else nothing,
            lambda h=hidden: decoder.final_output(h),
            lambda n=rows: decoder.embed([0] * n, decoder.attention_metadata([Segment(slot, 0, n)])),
        ]
    for action in actions:  # warm up
        action()
    seconds = torch.tensor([[_seconds(action) for action in actions] for _ in range(repetitions)], dtype=torch.float64)
    seconds = seconds.amin(0).view(len(ROW_COUNTS), -1).t().to(decoder.weights.device)
    seconds = decoder.weights.tp.gather(seconds)[0]
    layers, asks, exits, final, batches = (tuple(row) for row in seconds.tolist())
    layers = tuple(value / decoder.num_layers for value in layers)
    if not decoder.exits:
        asks = exits = (0.0,) * len(ROW_COUNTS)
    return StepCosts(layers, asks, exits, final, batches[0], decoder.has_approximate_heads)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started
