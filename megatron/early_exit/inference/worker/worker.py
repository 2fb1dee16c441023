"""Runs steps: operations on slots, then rows through the layers and heads of one decoder."""

from __future__ import annotations

import logging

import torch

from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.protocol import (
    Admit,
    CopyPrefix,
    ExitDescription,
    Free,
    Gather,
    Rows,
    RowsOutput,
    SlotOperation,
    Step,
    WorkerDescription,
)
from megatron.early_exit.inference.worker.cost_measurement import measure_costs
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.slot_state import SlotState
from megatron.early_exit.inference.worker.stage_runner import ScheduledRows, StageRunner
from megatron.early_exit.platform.device import to_device

log = logging.getLogger(__name__)


class Worker:
    """Weights, keys and values, deferred rows and sampling of one rank. Tensor-parallel ranks run the same steps."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.slots: dict[int, SlotState] = {}
        self._runner = StageRunner(decoder)

    @property
    def description(self) -> WorkerDescription:
        decoder = self.decoder
        return WorkerDescription(
            num_layers=decoder.num_layers,
            hidden_size=decoder.weights.config.hidden_size,
            vocab_size=decoder.vocab_size,
            exits=tuple(
                ExitDescription(one.layer_number, one.depth, has_block=one.block is not None) for one in decoder.exits
            ),
            num_slots=decoder.cache.num_slots,
            num_positions=decoder.num_positions,
            bytes_per_token=decoder.cache.size.bytes_per_token,
            has_approximate_heads=decoder.has_approximate_heads,
        )

    @torch.inference_mode()
    def execute(self, step: Step) -> list[RowsOutput]:
        """Run a step; one output for each of its rows, in the order of slots.

        What fails for one request is in its output. What fails for all rows is in all outputs; a tensor-parallel rank
        raises it, since the others may not have failed."""
        for operation in step.operations:
            self._operate(operation)
        scheduled = [self._schedule(rows) for rows in sorted(step.rows, key=lambda rows: rows.slot)]
        if scheduled:
            try:
                self._runner.run(scheduled)
            except Exception as error:
                if self.decoder.weights.tp.size > 1:
                    raise
                log.warning("step %d failed", step.number, exc_info=True)
                for one in scheduled:
                    one.error = f"the step that it was part of failed ({type(error).__name__}: {error})"
        for one in scheduled:
            # Rows that ran behind a gap of others do not count: what a scoring request skipped, for instance.
            if one.is_complete and one.first <= one.slot.complete_to:
                one.slot.complete_to = one.stop
        return [one.output() for one in scheduled]

    def _schedule(self, rows: Rows) -> ScheduledRows:
        slot = self.slots[rows.slot]
        slot.begin(rows.first, rows.tokens)
        return ScheduledRows(rows, slot, {one.exit: one for one in rows.exits}, rows.first)

    def _operate(self, operation: SlotOperation) -> None:
        cache = self.decoder.cache
        if isinstance(operation, Admit):
            prefix = list(operation.prefix)
            self.slots[operation.slot] = SlotState(operation, prefix, len(prefix))
        elif isinstance(operation, CopyPrefix):
            cache.copy_slot(operation.source, operation.target, operation.count)
        elif isinstance(operation, Free):
            self.slots.pop(operation.slot, None)
            if operation.clear:
                cache.clear_slot(operation.slot)
        elif isinstance(operation, Gather):
            self._gather(operation)

    def _gather(self, operation: Gather) -> None:
        sources = to_device(operation.sources, self.decoder.weights.device)
        self.decoder.cache.gather_slots(0, sources, operation.count)
        ids = [self.slots[source].ids[: operation.count] for source in operation.sources]
        for slot, of_source in enumerate(ids):
            self.slots[slot].ids = list(of_source)
            self.slots[slot].complete_to = operation.count

    def measure_costs(self) -> StepCosts:
        """Time layers and heads. Overwrites slot 0."""
        return measure_costs(self.decoder)
