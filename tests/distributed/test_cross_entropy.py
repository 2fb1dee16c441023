"""The chunked vocabulary-parallel cross-entropy against PyTorch's on full logits."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from torch.nn import functional as F

from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.model.cross_entropy import Teacher, chunk_size, cross_entropy_sums
from megatron.early_exit.platform.distributed import initialize_model_parallel
from tests.distributed.workers import run_distributed


def compare(
    tp_size: int, chunk_tokens: int, temperature: float, weigh: bool, gradient_scale: float, dtype: str
) -> None:
    initialize_model_parallel(ParallelConfig(tensor_model_parallel_size=tp_size), num_layers=1, seed=1)
    generator = torch.Generator().manual_seed(3)
    s, b, h, vocabulary = 7, 3, 10, 26
    hidden = torch.randn(s, b, h, generator=generator).to(getattr(torch, dtype)).requires_grad_()
    full = torch.randn(vocabulary, h, generator=generator).to(getattr(torch, dtype)).requires_grad_()
    labels = torch.randint(0, vocabulary, (b, s), generator=generator)
    mask = (torch.rand(b, s, generator=generator) > 0.3).float()
    labels[mask == 0] = -100  # what is masked may hold anything

    logits = (hidden.float() @ full.float().t() / temperature).transpose(0, 1)  # [b, s, vocabulary]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none").view(b, s)
    weights = logits.softmax(-1).amax(-1).detach() if weigh else torch.ones(b, s)
    expected = (mask * weights * losses).sum()
    hidden_grad, weight_grad = torch.autograd.grad(expected * 0.5, [hidden, full])

    rank = parallel_state.get_tensor_model_parallel_rank()
    mine = full.detach().chunk(tp_size)[rank].clone().requires_grad_()
    leaf = hidden.detach().clone().requires_grad_()
    sums = cross_entropy_sums(
        leaf, mine, labels, mask, tp_group=parallel_state.get_tensor_model_parallel_group(),
        temperature=temperature, weigh_by_confidence=weigh, gradient_scale=torch.tensor(gradient_scale),
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    (sums.objective * 0.5).backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(sums.objective, expected, **tolerance)
    torch.testing.assert_close(leaf.grad, hidden_grad, **tolerance)
    torch.testing.assert_close(mine.grad, weight_grad.chunk(tp_size)[rank], **tolerance)
    correct = ((logits.argmax(-1) == labels) * mask).sum()
    plain = torch.stack([(mask * losses).sum(), mask.sum(), correct, torch.zeros(())]).double()
    torch.testing.assert_close(sums.statistics, plain, check_dtype=False, **tolerance)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(("chunk_tokens", "temperature", "weigh", "gradient_scale", "dtype"), [
    (1, 1.0, False, 1.0, "float32"),
    (5, 1.0, False, 1.0, "float32"),
    (21, 0.7, True, 0.5, "float32"),
    (1000, 2.0, True, 1024.0, "float32"),
    (4, 1.0, True, 3.0, "bfloat16"),
])  # fmt: skip
def test_equals_cross_entropy_of_full_logits(
    tp_size: int, chunk_tokens: int, temperature: float, weigh: bool, gradient_scale: float, dtype: str
) -> None:
    run_distributed(tp_size, compare, tp_size=tp_size, chunk_tokens=chunk_tokens, temperature=temperature, weigh=weigh,
                    gradient_scale=gradient_scale, dtype=dtype)  # fmt: skip


def compare_with_teacher(tp_size: int, share: float, temperature: float, dtype: str) -> None:
    initialize_model_parallel(ParallelConfig(tensor_model_parallel_size=tp_size), num_layers=1, seed=1)
    generator = torch.Generator().manual_seed(3)
    s, b, h, vocabulary = 7, 3, 10, 26
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(getattr(torch, dtype))
    hidden, full = draw(s, b, h).requires_grad_(), draw(vocabulary, h).requires_grad_()
    their_hidden, their_weight = draw(s, b, h), draw(vocabulary, h)
    labels = torch.randint(0, vocabulary, (b, s), generator=generator)
    mask = (torch.rand(b, s, generator=generator) > 0.3).float()

    logits = (hidden.float() @ full.float().t() / temperature).transpose(0, 1)
    theirs = (their_hidden.float() @ their_weight.float().t()).transpose(0, 1).log_softmax(-1)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(b, s)
    divergence = F.kl_div(logits.log_softmax(-1), theirs, log_target=True, reduction="none").sum(-1)
    expected = (mask * ((1 - share) * losses + share * divergence)).sum()
    hidden_grad, weight_grad = torch.autograd.grad(expected, [hidden, full])

    rank = parallel_state.get_tensor_model_parallel_rank()
    part = lambda weight: weight.detach().chunk(tp_size)[rank].clone()
    mine, leaf = part(full).requires_grad_(), hidden.detach().clone().requires_grad_()
    sums = cross_entropy_sums(
        leaf, mine, labels, mask, tp_group=parallel_state.get_tensor_model_parallel_group(), temperature=temperature,
        chunk_tokens=4, teacher=Teacher(their_hidden, part(their_weight), share),
    )  # fmt: skip
    sums.objective.backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(sums.objective, expected, **tolerance)
    torch.testing.assert_close(leaf.grad, hidden_grad, **tolerance)
    torch.testing.assert_close(mine.grad, weight_grad.chunk(tp_size)[rank], **tolerance)
    plain = torch.stack([(mask * losses).sum(), (mask * divergence).sum()]).double()
    torch.testing.assert_close(sums.statistics[[0, 3]], plain, check_dtype=False, **tolerance)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("share", "temperature", "dtype"), [(1.0, 1.0, "float32"), (0.3, 0.7, "float32"), (0.5, 1.0, "bfloat16")]
)
def test_distance_to_a_teacher_equals_plain_autograd(
    tp_size: int, share: float, temperature: float, dtype: str
) -> None:
    run_distributed(tp_size, compare_with_teacher, tp_size=tp_size, share=share, temperature=temperature, dtype=dtype)


def nothing_is_kept_without_gradients() -> None:
    initialize_model_parallel(ParallelConfig(), num_layers=1, seed=1)
    weight = torch.randn(8, 4, requires_grad=True)
    with torch.no_grad():
        sums = cross_entropy_sums(
            torch.randn(2, 1, 4), weight, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )  # fmt: skip
    assert sums.objective.grad_fn is None and not sums.objective.requires_grad


def test_no_gradients_are_computed_in_validation() -> None:
    run_distributed(1, nothing_is_kept_without_gradients)


def test_chunks_fit_their_memory_and_are_not_tiny() -> None:
    assert chunk_size(50_000, is_gpu=False) * 50_000 * 4 <= 64 * 2**20
    assert chunk_size(1_000_000, is_gpu=False) == 128
    assert chunk_size(50_000, is_gpu=False) % 128 == 0
    assert chunk_size(50_000, is_gpu=True) == 2048
    assert chunk_size(256_000, is_gpu=True) * 256_000 * 4 <= 2**30
    assert chunk_size(1_000, is_gpu=True) == chunk_size(1_000, is_gpu=False)
