"""What the benchmark of drafts counts, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speculation_acceptance import bound, draws, goals, overlap, share_of_equal, summary
from megatron.early_exit.inference.worker.head_output import HeadOutput
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel

P = torch.tensor([0.5, 0.2, 0.3])
Q = torch.tensor([0.1, 0.6, 0.3])


def shared(p: torch.Tensor, q: torch.Tensor, samples: int = 4000) -> float:
    heads = [HeadOutput(one.log()[None], vocab_size=len(one), tp=TensorParallel()) for one in (p, q)]
    return share_of_equal(*(draws(head, 0, 1.0, samples) for head in heads))


def test_overlap_and_bound() -> None:
    assert overlap(P.log(), Q.log(), 1.0) == pytest.approx(0.1 + 0.2 + 0.3)
    # At temperature 0.5 probabilities are squared: .25, .04, .09 of .38 and .01, .36, .09 of .46
    assert overlap(P.log(), Q.log(), 0.5) == pytest.approx(0.01 / 0.46 + 0.04 / 0.38 + 0.09 / 0.46, abs=1e-6)
    assert bound(0.6) == pytest.approx(0.6 / 1.4)


def test_heads_that_share_their_noise_often_draw_the_same() -> None:
    assert shared(P, P) == 1.0
    # Both draw i with probability 1 / sum_j max(p_j / p_i, q_j / q_i):
    # 1 / (1 + 6 + 3), 1 / (2.5 + 1 + 1.5), 1 / (5/3 + 2 + 1)
    assert shared(P, Q) == pytest.approx(1 / 10 + 1 / 5 + 3 / 14, abs=0.032)  # four standard deviations
    assert shared(P, P.flip(0)) < 1.0


def test_summary_and_goals() -> None:
    positions = [
        {"rejection": 0.5, "shared": 0.4, "bound": bound(0.5)},
        {"rejection": 1.0, "shared": 1.0, "bound": 1.0},
    ]
    row = summary(positions)
    assert (row["shared noise"], row["rejection"]) == (0.7, 0.75)
    assert row["shared / rejection"] == pytest.approx(0.7 / 0.75)
    assert row["difference"] == pytest.approx(-0.05) and row["standard error"] == pytest.approx(0.05)
    assert all(one["met"] for one in goals([row]).values())
    assert [one["met"] for one in goals([row | {"shared noise": 0.1}]).values()] == [False, True]
    assert [one["met"] for one in goals([row | {"difference": 0.2}]).values()] == [True, False]
