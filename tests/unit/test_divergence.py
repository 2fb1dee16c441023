"""Training that has diverged ends with a word, before its weights are saved."""

from __future__ import annotations

import math

import pytest

from megatron.early_exit.training.divergence import check_gradients, check_loss_scale, check_losses
from megatron.early_exit.training.metrics import HeadMetrics, LossMetrics


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_gradients(norm: float) -> None:
    check_gradients(1e30, 1)
    check_gradients(None, 1)
    with pytest.raises(FloatingPointError, match=f"norm of iteration 7 is {norm}"):
        check_gradients(norm, 7)


def test_fp16_skips_iterations_only_while_the_scale_can_fall() -> None:
    check_loss_scale(2.0, 1.0, 1)
    with pytest.raises(FloatingPointError, match="--min-loss-scale 1: .*--bf16"):
        check_loss_scale(1.0, 1.0, 1)


def test_losses_of_heads_that_saw_tokens() -> None:
    good, bad, unseen = HeadMetrics(2.0, 0.5, 10), HeadMetrics(math.nan, 0.0, 10), HeadMetrics(math.nan, math.nan, 0)
    check_losses(LossMetrics(unseen, {2: good, 4: unseen}), 3)
    with pytest.raises(FloatingPointError, match="loss of the exit at layer 4 is nan by iteration 3"):
        check_losses(LossMetrics(good, {2: good, 4: bad}), 3)
    with pytest.raises(FloatingPointError, match="loss of the final head is nan"):
        check_losses(LossMetrics(bad, {}), 3)
