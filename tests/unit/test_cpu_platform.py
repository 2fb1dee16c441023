"""Core's CUDA calls have their CPU meaning, and nobody else notices."""

from __future__ import annotations

import pytest
import torch

from megatron.early_exit.platform.cpu import adapt_core_to_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with a GPU core stays as it is")


def test_core_creates_tensors_on_the_cpu() -> None:
    adapt_core_to_cpu()
    from megatron.core.optimizer.grad_scaler import ConstantGradScaler

    assert ConstantGradScaler(2.0).scale.device.type == "cpu"


def test_type_names_change_for_core_only() -> None:
    adapt_core_to_cpu()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    asked_by_core = {"__name__": "megatron.core.optimizer.clip_grads", "torch": torch}
    assert eval("torch.zeros(1).type()", asked_by_core) == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_the_random_state_tracker_forks_the_one_generator() -> None:
    adapt_core_to_cpu()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("model-parallel-rng", 5)
    before = torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with tracker.fork():
        second = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.cat([first, second]), torch.rand(6))
