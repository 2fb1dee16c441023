"""Global batch size and number of microbatches of an iteration, constant or ramping up.

Written out here because core 0.19 no longer has the ramp-up of core 0.16 (`--rampup-batch-size`, Megatron's meaning).
"""

from __future__ import annotations

from megatron.early_exit.config.optimization import TrainingConfig


class Microbatches:
    """How many microbatches each replica runs; call `update` before an iteration."""

    def __init__(self, training: TrainingConfig, data_parallel_size: int) -> None:
        self._training = training
        self._unit = training.micro_batch_size * data_parallel_size
        self.target_global_batch_size = training.global_batch_size or self._unit
        self.global_batch_size = self.target_global_batch_size
        """Sequences of this iteration over all replicas."""
        self.update(0)

    def update(self, consumed_samples: int) -> None:
        """Set the batch size of the iteration that starts after `consumed_samples` sequences."""
        self.global_batch_size = self._at(consumed_samples)

    def _at(self, consumed_samples: int) -> int:
        if not self._training.rampup_batch_size:
            return self.target_global_batch_size
        start, increment, samples = self._training.rampup_batch_size
        num_increments = (self.target_global_batch_size - start) // increment
        if consumed_samples > samples or num_increments == 0:
            return self.target_global_batch_size
        reached = int(consumed_samples * num_increments / samples)
        return min(start + reached * increment, self.target_global_batch_size)

    @property
    def count(self) -> int:
        """Microbatches of one replica in this iteration."""
        return self.global_batch_size // self._unit
