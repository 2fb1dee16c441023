"""Global batch sizes, constant and ramping up."""

from __future__ import annotations

import sys

import pytest

from megatron.early_exit.config.optimization import TrainingConfig
from megatron.early_exit.training.microbatches import Microbatches


def test_constant() -> None:
    microbatches = Microbatches(TrainingConfig(seq_length=8, micro_batch_size=2, global_batch_size=24), 3)
    assert (microbatches.count, microbatches.global_batch_size) == (4, 24)


def test_default_is_one_microbatch_on_each_replica() -> None:
    microbatches = Microbatches(TrainingConfig(seq_length=8, micro_batch_size=2), 3)
    assert (microbatches.count, microbatches.global_batch_size) == (1, 6)


def test_rampup_by_hand() -> None:
    """From 4 by 4 to 12 over 100 samples: two increments of 50 samples."""
    training = TrainingConfig(seq_length=8, micro_batch_size=2, global_batch_size=12, rampup_batch_size=(4, 4, 100))
    microbatches = Microbatches(training, 2)
    seen = []
    for consumed in (0, 49, 50, 99, 100, 101, 5000):
        microbatches.update(consumed)
        seen.append((microbatches.global_batch_size, microbatches.count))
    assert seen == [(4, 1), (4, 1), (8, 2), (8, 2), (12, 3), (12, 3), (12, 3)]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="core 0.19, the one for Python 3.12, has no ramp-up any more")
def test_rampup_equals_cores() -> None:
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    training = TrainingConfig(seq_length=8, micro_batch_size=1, global_batch_size=36, rampup_batch_size=(6, 5, 1000))
    ours = Microbatches(training, 1)
    cores = RampupBatchsizeNumMicroBatchesCalculator(36, 1, 1, False, 1, 6, 5, 1000)
    for consumed in range(0, 1500, 7):
        ours.update(consumed)
        cores.update(consumed, consistency_check=True)
        assert ours.global_batch_size == cores.get_current_running_global_batch_size(), consumed
