"""What a layer and a head cost on this machine, by the number of rows: measured once, when something depends on it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts
from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.inference.worker.certified_head import CertifiedHead
from megatron.early_exit.inference.worker.decoder import Decoder


@torch.inference_mode()
def measure_costs(decoder: Decoder, slot: int = 0, repetitions: int = 5) -> StepCosts:
    """Time the decoder's layers and heads; what it does not have takes no time. It writes to `slot`, which must be
    free.

    Every layer runs in turn, so that weights come from memory as they do when decoding; and everything is timed in turn
    several times, so that a slow moment of the machine does not meet one part alone. All tensor-parallel ranks call it
    together and get rank 0's numbers, since they must draw the same conclusions."""
    actions = [_actions(decoder, slot, min(rows, decoder.num_positions)) for rows in ROW_COUNTS]
    in_turn = [action for of_rows in actions for action in of_rows if action is not None]
    for action in in_turn:  # warm up
        action()
    seconds = torch.tensor([[_seconds(action) for action in in_turn] for _ in range(repetitions)], dtype=torch.float64)
    measured = decoder.weights.tp.gather(seconds.amin(0).to(decoder.weights.device))[0].tolist()
    remaining = iter(measured)
    parts = zip(*([0.0 if action is None else next(remaining) for action in of_rows] for of_rows in actions))
    layers, approximate, exits, final, batches, probes = parts
    layers = tuple(value / (decoder.last_layer - decoder.first_layer) for value in layers)
    of_exit = decoder.exits[0].certified if decoder.exits else None
    saved = [_saved(head) for head in (of_exit, decoder.weights.certified_output)]
    return StepCosts(layers, approximate, exits, final, batches[0], decoder.has_approximate_heads, probes, *saved)


def _saved(head: CertifiedHead | None) -> tuple[float, ...]:
    """Seconds, as measured when it was loaded; the same on all ranks."""
    return tuple(0.0 if head is None else head.saved_seconds(rows) for rows in ROW_COUNTS)


def _actions(decoder: Decoder, slot: int, rows: int) -> list[Callable[[], object] | None]:
    """What is timed for this many rows: all layers, the first exit's approximate and own head, the final head, setting
    up a batch, the first probe. None: not here."""
    segments, tokens = [Segment(slot, 0, rows)], [0] * rows
    attention, weights = decoder.attention_metadata(segments), decoder.weights
    first_exit = decoder.exits[0].index if decoder.exits else None
    # Exits that only draft have none.
    first_probe = next((one.index for one in decoder.exits if one.probe is not None), None)
    hidden = torch.zeros(rows, weights.description.model.hidden_size, dtype=weights.dtype, device=weights.device)
    if weights.embedding is None:
        set_up = lambda: decoder.attention_metadata(segments)
    else:
        hidden = decoder.embed(tokens, attention)
        set_up = lambda: decoder.embed(tokens, decoder.attention_metadata(segments))
    return [
        lambda: decoder.run_layers(hidden, attention, decoder.first_layer, decoder.last_layer),
        None if first_exit is None else lambda: decoder.approximate_output(first_exit, hidden),
        None if first_exit is None else lambda: decoder.exit_output(first_exit, hidden),
        None if weights.output is None else lambda: decoder.final_output(hidden),
        set_up,
        None if first_probe is None else lambda: decoder.probe_scores(first_probe, hidden),
    ]


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started
