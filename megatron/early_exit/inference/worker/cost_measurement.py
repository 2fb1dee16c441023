"""What a layer and a head cost on this machine, by the number of rows: measured once, when something depends on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron.early_exit.inference.costs import MEASURED_SLOTS, ROW_COUNTS, StepCosts
from megatron.early_exit.inference.params import SamplingSettings
from megatron.early_exit.inference.protocol import Admit, Rows, StageRows
from megatron.early_exit.inference.worker.attention import AttentionMetadata, Segment
from megatron.early_exit.inference.worker.certified_head import CertifiedHead
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.head_output import HeadOutput
from megatron.early_exit.inference.worker.scheduled_rows import ScheduledRows
from megatron.early_exit.inference.worker.slot_state import SlotState
from megatron.early_exit.inference.worker.stage_runner import StageRunner

_ROWS_BEFORE = 64
"""That the rows which are timed attend to, where sequences may be so long."""
_UNEVEN_SLOTS, _UNEVEN_ROWS = 8, (1, 5)
"""Where calls of attention are split: rows of the first slot, the second one, the first again."""

_HOST_STEPS = 8
"""That follow each other, as in decoding."""

Action = Callable[[], object]


@torch.inference_mode()
def measure_costs(decoder: Decoder, repetitions: int = 5) -> StepCosts:
    """Time the decoder's layers and heads; what it does not have takes no time. It writes to the first `MEASURED_SLOTS`
    slots, which must be free.

    Every layer runs in turn, so that weights come from memory as they do when decoding; and everything is timed in turn
    several times, so that a slow moment of the machine does not meet one part alone. All tensor-parallel ranks call it
    together and get rank 0's numbers, since they must draw the same conclusions."""
    num_slots = min(decoder.cache.num_slots, MEASURED_SLOTS)
    uneven = [_UNEVEN_ROWS[slot % 2] for slot in range(min(num_slots, _UNEVEN_SLOTS))]
    actions: dict[tuple[str, int], Action] = {}
    for rows in ROW_COUNTS:
        actions |= {(name, rows): action for name, action in _of_rows(decoder, rows).items()}
    actions["slots", num_slots] = _layers(decoder, [1] * num_slots)
    actions["uneven", sum(uneven)] = _layers(decoder, uneven)
    actions |= {("host", rows): _host(decoder, rows) for rows in (1, num_slots)}
    for action in actions.values():  # warm up
        action()
    # A processor that computes alone waits for nobody, so what other programs take meanwhile is left out.
    is_alone = decoder.weights.device.type == "cpu" and decoder.weights.tp.size == 1
    clock = time.thread_time if is_alone else time.perf_counter
    seconds = torch.tensor(
        [[_seconds(action, clock) for action in actions.values()] for _ in range(repetitions)], dtype=torch.float64
    )
    measured = decoder.weights.tp.gather(seconds.amin(0).to(decoder.weights.device))[0].tolist()
    found = dict(zip(actions, measured, strict=True))
    of = lambda name: tuple(found.get((name, rows), 0.0) for rows in ROW_COUNTS)
    num_layers = decoder.last_layer - decoder.first_layer
    further = lambda seconds, count: max(seconds, 0.0) / count if count else 0.0
    costs = StepCosts(
        layer_seconds=tuple(value / num_layers for value in of("layers")),
        approximate_seconds=of("approximate"),
        exit_head_seconds=of("exit head"),
        final_head_seconds=of("final head"),
        batch_seconds=found["host", 1] / _HOST_STEPS,
        row_seconds=further(found["host", num_slots] - found["host", 1], num_slots - 1) / _HOST_STEPS,
        has_approximate_heads=decoder.has_approximate_heads,
        probe_seconds=of("probe"),
        exit_saved_seconds=_saved(decoder.exits[0].certified if decoder.exits else None),
        final_saved_seconds=_saved(None if decoder.weights.final is None else decoder.weights.final.certified),
    )
    of_slots = found["slots", num_slots] / num_layers - costs.layer(num_slots)
    costs = replace(costs, slot_seconds=further(of_slots, num_slots - 1))
    of_calls = found["uneven", sum(uneven)] / num_layers - costs.layer(sum(uneven), len(uneven))
    return replace(costs, call_seconds=further(of_calls, len(uneven) - 1))


def _saved(head: CertifiedHead | None) -> tuple[float, ...]:
    """Seconds, as measured when it was loaded; the same on all ranks."""
    return tuple(0.0 if head is None else head.saved_seconds(rows) for rows in ROW_COUNTS)


def _of_rows(decoder: Decoder, rows: int) -> dict[str, Action]:
    """What is timed for this many rows of a slot; what is not here is left out. Exits: the first, and the first that
    has a probe, which those that only draft have not."""
    hidden, exits = _hidden(decoder, _attention(decoder, [rows])), [one.index for one in decoder.exits]
    probed = [one.index for one in decoder.exits if one.probe is not None]
    actions: dict[str, Action] = {"layers": _layers(decoder, [rows])}
    if exits:
        actions["approximate"] = lambda: decoder.approximate_output(exits[0], hidden)
        actions["exit head"] = lambda: decoder.exit_output(exits[0], hidden)
    if probed:
        actions["probe"] = lambda: decoder.probe_scores(probed[0], hidden)
    if decoder.weights.final is not None:
        actions["final head"] = lambda: decoder.final_output(hidden)
    return actions


def _hidden(decoder: Decoder, attention: AttentionMetadata) -> Tensor:
    """Of all rows of a batch. [rows, h]"""
    weights, rows = decoder.weights, attention.num_rows
    if weights.embedding is not None:
        return decoder.embed([0] * rows, attention)
    return torch.zeros(rows, weights.description.model.hidden_size, dtype=weights.dtype, device=weights.device)


def _segments(decoder: Decoder, counts: Sequence[int]) -> list[Segment]:
    """So many rows of each slot, at most as many as it has positions."""
    counts = [min(count, decoder.num_positions) for count in counts]
    first = min(_ROWS_BEFORE, decoder.num_positions - max(counts))
    return [Segment(slot, first, count) for slot, count in enumerate(counts)]


def _attention(decoder: Decoder, counts: Sequence[int]) -> AttentionMetadata:
    return decoder.attention_metadata(_segments(decoder, counts))


def _layers(decoder: Decoder, counts: Sequence[int]) -> Action:
    """All layers over so many rows of each slot."""
    attention = _attention(decoder, counts)
    hidden = _hidden(decoder, attention)
    return lambda: decoder.run_layers(hidden, attention, decoder.first_layer, decoder.last_layer)


def _host(decoder: Decoder, num_slots: int) -> Action:
    """Steps with a row of each slot that gives a token, without layers and heads."""
    hidden = _hidden(decoder, _attention(decoder, [1] * num_slots))
    output = None if decoder.weights.final is None else decoder.final_output(hidden)
    runner = StageRunner(_WithoutLayers(decoder, output))
    first = _segments(decoder, [1])[0].first
    slots = [
        SlotState(Admit(slot, slot, 0, first + 1, (), SamplingSettings()), [0] * first, first)
        for slot in range(num_slots)
    ]
    rows = [Rows(slot, slot, 0, 0, "decode", first, (0,), sample_from=first) for slot in range(num_slots)]

    def step() -> None:
        for slot, one in zip(slots, rows, strict=True):
            slot.begin(first, one.tokens)
        scheduled = [ScheduledRows(StageRows.of(one), slot) for one, slot in zip(rows, slots, strict=True)]
        runner.run(scheduled, None if decoder.weights.embedding is not None else hidden)
        for each in scheduled:
            each.output(each.answers)

    def steps() -> None:
        for _ in range(_HOST_STEPS):
            step()

    return steps


class _WithoutLayers(Decoder):
    """A decoder whose layers and final head take no time. Everything else is that of another one."""

    def __init__(self, decoder: Decoder, output: HeadOutput | None) -> None:
        """output: of the final head, if it is here."""
        vars(self).update(vars(decoder))
        self._final_output = output

    def run_layers(self, hidden: Tensor, attention: AttentionMetadata, first: int, last: int) -> tuple[Tensor, Tensor]:
        if self.graphs is None:
            attention.prepare()
        return hidden, hidden

    def final_output(self, hidden: Tensor, *, tokens_only: bool = False) -> HeadOutput:
        assert self._final_output is not None, "the last layer of the model is not here"
        return self._final_output


def _seconds(action: Action, clock: Callable[[], float]) -> float:
    started = clock()
    action()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - started
