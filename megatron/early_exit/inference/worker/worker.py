"""One rank's decoder, slots and deferred rows; runs steps of a model that is not spread over pipeline stages."""

from __future__ import annotations

import torch

from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.protocol import (
    Admit,
    CopyPrefix,
    ExitDescription,
    Free,
    Gather,
    RowsOutput,
    SlotOperation,
    StageRows,
    Step,
    WorkerDescription,
)
from megatron.early_exit.inference.worker.cost_measurement import measure_costs
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.kv_cache import largest_bytes_per_token
from megatron.early_exit.inference.worker.scheduled_rows import ScheduledRows
from megatron.early_exit.inference.worker.slot_state import SlotState
from megatron.early_exit.inference.worker.stage_runner import StageRunner
from megatron.early_exit.platform.device import to_device


class Worker:
    """Weights, keys and values, deferred rows and sampling of one rank. Tensor-parallel ranks run the same steps."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.runner = decoder, StageRunner(decoder)
        self.slots: dict[int, SlotState] = {}

    @property
    def description(self) -> WorkerDescription:
        """Of the whole model: it is the same on all ranks of all stages."""
        decoder, weights = self.decoder, self.decoder.weights
        exits = weights.description.exits
        return WorkerDescription(
            num_layers=decoder.num_layers,
            hidden_size=weights.description.model.hidden_size,
            vocab_size=decoder.vocab_size,
            exits=tuple(
                ExitDescription(number, exits.depth_of(number), exits.head_of(index).block, exits.use_of(index))
                for index, number in enumerate(exits.exit_layer_nums)
            ),
            num_slots=decoder.cache.num_slots,
            num_positions=decoder.num_positions,
            bytes_per_token=largest_bytes_per_token(
                weights.description, weights.tp.size, weights.dtype.itemsize, decoder.layers_per_stage
            ),
            has_approximate_heads=decoder.has_approximate_heads,
            has_probes=decoder.has_probes,
            layers_per_stage=decoder.layers_per_stage,
        )

    @torch.inference_mode()
    def execute(self, step: Step) -> list[RowsOutput]:
        """Run a step of the whole model; one output for each of its rows, in the order of slots."""
        for operation in step.operations:
            self.operate(operation)
        in_order = sorted(step.rows, key=lambda rows: rows.slot)
        scheduled = [self.schedule(StageRows.of(rows)) for rows in in_order]
        if scheduled:
            self.runner.run(scheduled)
        return [one.output(one.answers) for one in scheduled]

    def schedule(self, rows: StageRows) -> ScheduledRows:
        """Note the rows with their slot, which has a request."""
        slot = self.slots[rows.rows.slot]
        slot.begin(rows.first, rows.tokens)
        return ScheduledRows(rows, slot)

    def operate(self, operation: SlotOperation) -> None:
        """Do what is to be done to slots."""
        cache = self.decoder.cache
        if isinstance(operation, Admit):
            prefix = list(operation.prefix)
            self.slots[operation.slot] = SlotState(operation, prefix, len(prefix), written_to=len(prefix))
        elif isinstance(operation, CopyPrefix):
            cache.copy_slot(operation.source, operation.target, operation.count)
        elif isinstance(operation, Free):
            freed = self.slots.pop(operation.slot, None)
            if freed is not None and freed.written_to > operation.complete_to:
                cache.clear(operation.slot, operation.complete_to, freed.written_to)
        elif isinstance(operation, Gather):
            self._gather(operation)

    def _gather(self, operation: Gather) -> None:
        sources = to_device(operation.sources, self.decoder.weights.device)
        self.decoder.cache.gather_slots(0, sources, operation.count)
        ids = [self.slots[source].ids[: operation.count] for source in operation.sources]
        for slot, of_source in enumerate(ids):
            self.slots[slot].ids = list(of_source)
            self.slots[slot].complete_to = operation.count
            self.slots[slot].written_to = max(self.slots[slot].written_to, operation.count)

    def measure_costs(self) -> StepCosts:
        """Time layers and heads. Overwrites slot 0."""
        return measure_costs(self.decoder)
