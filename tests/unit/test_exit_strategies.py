"""What becomes of an exit that a forward pass reaches, by each strategy; a head of one weight, gradients by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.model.cross_entropy import LossSums, Teacher
from megatron.early_exit.model.exit_losses import ExitLosses, ReachedExit
from megatron.early_exit.model.exit_strategies import Capture, Deferred, Evaluation, Postponed, Tuning

WEIGHT = 0.5
"""Of the exit's loss in the objective."""


class Head:
    """An exit head whose loss is the sum of squares of `weight * hidden states`, and of what a teacher's differ."""

    def __init__(self) -> None:
        self.spec, self.config = SimpleNamespace(exit_index=0), SimpleNamespace(sequence_parallel=False)
        self.weight = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
        self.num_losses = 0

    def loss(
        self, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor, gradient_scale: Tensor, **arguments: Any
    ) -> LossSums:
        self.num_losses += 1
        output, teacher = self.weight * hidden_states, arguments["teacher"]
        objective = (output**2).sum() if teacher is None else ((output - teacher.hidden_states) ** 2).sum()
        return LossSums(objective, torch.stack([objective.detach(), loss_mask.sum(), labels.sum(), objective * 0]))


@pytest.fixture
def head() -> Head:
    return Head()


@pytest.fixture
def losses() -> ExitLosses:
    losses = ExitLosses(ExitConfig(exit_layer_nums=(1,)), calculate_per_token_loss=False, device=torch.device("cpu"))
    losses.begin_iteration(num_microbatches=2, weights=(WEIGHT,))
    return losses


def reached(head: Any, num_tokens: int = 4) -> ReachedExit:
    labels = torch.arange(num_tokens)[None]
    return ReachedExit(head, "layer_1_output", labels, torch.ones(1, num_tokens), {})


def hidden_states() -> Tensor:
    return torch.tensor([[[1.0, 2.0, 3.0]], [[-1.0, 0.0, 2.0]]], requires_grad=True)


def expected_gradients(head: Head, x: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Of the hidden states, which the gradient `above` reaches as well, and of the head's weight, by hand."""
    scale = WEIGHT / (4 * 2)  # tokens, microbatches
    of_weight = (2 * head.weight * x**2).sum((0, 1)) * scale
    return above + 2 * head.weight**2 * x * scale, of_weight


def test_deferred(head: Head, losses: ExitLosses) -> None:
    """Nothing is computed before the backward, which adds the exit's gradient to that from above."""
    x, above = hidden_states(), torch.full((2, 1, 3), 0.25)
    output = Deferred(losses).at_exit(x, reached(head))
    assert torch.equal(output, x) and head.num_losses == 0 and head.weight.grad is None
    output.backward(above)
    of_x, of_weight = expected_gradients(head, x.detach(), above)
    assert torch.allclose(x.grad, of_x) and torch.allclose(head.weight.grad, of_weight)
    assert head.num_losses == 1 and losses.statistics[0, 1] == 4


def test_an_action_of_a_plan_runs_a_deferred_exit(head: Head, losses: ExitLosses) -> None:
    """The backward then only adds what is there."""
    x, above = hidden_states(), torch.full((2, 1, 3), 0.25)
    postponed = Postponed(Deferred(losses))
    output = postponed.at_exit(x, reached(head))
    (pending,) = postponed.exits
    pending.run()
    of_x, of_weight = expected_gradients(head, x.detach(), above)
    assert torch.allclose(head.weight.grad, of_weight) and x.grad is None
    output.backward(above)
    assert torch.allclose(x.grad, of_x) and torch.allclose(head.weight.grad, of_weight)
    assert head.num_losses == 1
    with pytest.raises(AssertionError, match="learns once"):
        pending.run()


def test_tuning(head: Head, losses: ExitLosses) -> None:
    """Gradients are taken at once, and none leaves the exit."""
    x = hidden_states()
    with torch.no_grad():
        output = Tuning(losses).at_exit(x, reached(head))
    assert output is x and x.grad is None
    assert torch.allclose(head.weight.grad, expected_gradients(head, x.detach(), torch.zeros(()))[1])
    assert losses.statistics[0, 1] == 4


def test_tuning_of_a_head_without_parameters(head: Head, losses: ExitLosses) -> None:
    head.weight.requires_grad_(False)
    Tuning(losses).at_exit(hidden_states(), reached(head))
    assert losses.statistics[0, 1] == 4


def test_distillation(head: Head) -> None:
    """Exits wait for an action, which brings what they follow; they do not run without."""
    losses = ExitLosses(ExitConfig(exit_layer_nums=(1,)), False, torch.device("cpu"), distillation_share=1.0)
    losses.begin_iteration(num_microbatches=1, weights=(1.0,))
    postponed, x = Postponed(Tuning(losses)), hidden_states()
    assert postponed.at_exit(x, reached(head)) is x
    (pending,) = postponed.exits
    followed = torch.full_like(x, 3.0)
    pending.run(Teacher(followed, torch.zeros(1, 3), share=1.0))
    of_weight = (2 * (head.weight * x - followed) * x).detach().sum((0, 1)) / 4
    assert torch.allclose(head.weight.grad, of_weight) and x.grad is None
    with pytest.raises(AssertionError, match="before the final head"):
        Tuning(losses).at_exit(x, reached(head))


def test_evaluation(head: Head, losses: ExitLosses) -> None:
    """Losses are counted without gradients, of all heads."""
    x = hidden_states()
    assert Evaluation(losses).at_exit(x, reached(head)) is x
    final = LossSums(torch.tensor(7.0), torch.tensor([7.0, 4.0, 1.0, 0.0]))
    assert Evaluation(losses).at_final_head(x, lambda: final) is final.objective
    assert head.num_losses == 1 and head.weight.grad is None and x.grad is None
    assert losses.statistics[:, 1].tolist() == [4, 4] and losses.statistics[1, 0] == 7


def test_capture(head: Head) -> None:
    """Nothing is computed; what heads read is handed on under its name."""
    captured: dict[str, Tensor] = {}
    capture, x, y = Capture(captured.__setitem__), hidden_states(), hidden_states()
    assert capture.at_exit(x, reached(head)) is x
    assert capture.at_final_head(y, lambda: pytest.fail("computed")) == 0
    assert captured == {"layer_1_output": x, "final": y} and head.num_losses == 0


def test_strategies_take_turns(losses: ExitLosses) -> None:
    """One that is set inside another takes its place until it ends, by an error as well."""
    outer, inner = Deferred(losses), Evaluation(losses)
    with losses.handled_by(outer):
        with pytest.raises(KeyError), losses.handled_by(inner):
            assert losses.strategy is inner
            raise KeyError
        assert losses.strategy is outer
    with pytest.raises(AssertionError, match="outside of `handled_by`"):
        _ = losses.strategy
