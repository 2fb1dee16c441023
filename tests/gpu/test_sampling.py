"""A GPU draws what a CPU does: the noise is the same, and so are ties."""

from __future__ import annotations

import pytest
import torch

from megatron.early_exit.inference.params import SamplingSettings
from megatron.early_exit.inference.worker import sampling
from megatron.early_exit.inference.worker.head_output import HeadOutput
from megatron.early_exit.inference.worker.sampling import Draw
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]
SETTINGS = [
    {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 40}, {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 3.0, "top_p": 0.95}, {"temperature": 2.0, "top_k": 900, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.02}, {"repetition_penalty": 1.4}, {"temperature": 1.0, "frequency_penalty": 0.7},
]  # fmt: skip


def heads(device: str) -> HeadOutput:
    """The last row is flat, the one before it has many equal values."""
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(4)) * 3
    logits[2], logits[3] = logits[2].round(), 0.0
    return HeadOutput(logits.to(device), vocab_size=3000, tp=TensorParallel())


def test_random_bits() -> None:
    starts, ids = torch.tensor([[0], [2**62 + 7], [-5]]), torch.arange(100000)
    on_gpu = sampling._random_bits(starts.cuda(), ids.cuda())
    assert torch.equal(on_gpu.cpu(), sampling._random_bits(starts, ids))


def test_draws_and_ties() -> None:
    cpu, gpu = heads("cpu"), heads("cuda")
    settings = [SamplingSettings(seed=seed, **one) for seed, one in enumerate(SETTINGS * 8)]
    draws = [Draw(i % 4, one, i, [8, 15, 8, 1502, 8, 2999], 2) for i, one in enumerate(settings)]
    ours, theirs = gpu.draw(draws), cpu.draw(draws)
    assert [token for token, _ in ours] == [token for token, _ in theirs]
    assert [log_prob for _, log_prob in ours] == pytest.approx([log_prob for _, log_prob in theirs], abs=1e-5)
    assert [gpu.token(row) for row in range(4)] == [cpu.token(row) for row in range(4)]
    tops = [[[token for token, _ in row] for row in one.top(range(4), 20)] for one in (gpu, cpu)]
    assert tops[0] == tops[1]
