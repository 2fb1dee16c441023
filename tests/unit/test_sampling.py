"""Tokens that a head draws, against probabilities worked out by hand or in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from megatron.early_exit.inference.params import SamplingSettings
from megatron.early_exit.inference.worker.head_output import HeadOutput
from megatron.early_exit.inference.worker.sampling import Draw
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel

PROBS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = PROBS.log()


def head(logits: torch.Tensor, **columns: object) -> HeadOutput:
    logits = logits[None] if logits.dim() == 1 else logits
    return HeadOutput(logits.clone(), vocab_size=logits.size(1), tp=TensorParallel(), **columns)


def draw(
    logits: torch.Tensor,
    indices: Sequence[int] = (0,),
    history: Sequence[int] = (),
    num_prompt_tokens: int = 0,
    batch: int = 500,
    **settings: object,
) -> list[int]:
    """One token for each index, from [vocabulary] logits."""
    output, chosen, tokens = head(logits), SamplingSettings(**settings), []
    for first in range(0, len(indices), batch):
        draws = [Draw(0, chosen, index, history, num_prompt_tokens) for index in indices[first : first + batch]]
        tokens += [token for token, _ in output.draw(draws)]
    return tokens


def frequencies(logits: torch.Tensor, draws: int = 4000, **settings: object) -> torch.Tensor:
    return torch.bincount(torch.tensor(draw(logits, range(draws), **settings)), minlength=logits.numel()) / draws


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 5.0, "top_k": 1}, {"temperature": 1e-3}, {"temperature": 9e-6}, {"top_k": 3, "top_p": 0.9}],
)
def test_greedy(settings: dict) -> None:
    assert frequencies(LOGITS, draws=20, **settings)[1] == 1.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        # at temperature 0.5 probabilities are squared: 0.01, 0.16, 0.0025, 0.0625, 0.04 of 0.275
        ({"temperature": 0.5}, [0.0364, 0.5818, 0.0091, 0.2273, 0.1455]),
        ({"temperature": 1.0, "top_k": 2}, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]),
        # 0.4 + 0.25 = 0.65 does not reach 0.7; with 0.2 it does
        ({"temperature": 1.0, "top_p": 0.7}, [0.0, 0.4 / 0.85, 0.0, 0.25 / 0.85, 0.2 / 0.85]),
        # of the three largest (0.85), 0.4 and 0.25 are 0.76 of the mass
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]),
        ({"temperature": 1.0, "top_p": 0.01}, [0.0, 1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 99}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        # at least 0.55 * 0.4 = 0.22
        ({"temperature": 1.0, "min_p": 0.55}, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]),
        ({"temperature": 1.0, "min_p": 1.0}, [0.0, 1.0, 0.0, 0.0, 0.0]),
        # the three largest, of them at least 0.55 * 0.4
        ({"temperature": 1.0, "top_k": 3, "min_p": 0.55}, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]),
        # the two that reach 0.6 of everything, though min-p would leave out one of the others
        ({"temperature": 1.0, "top_p": 0.6, "min_p": 0.3}, [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]),
    ],
)
def test_frequencies(settings: dict, expected: list[float]) -> None:
    seen = frequencies(LOGITS, **settings)
    expected = torch.tensor(expected)
    assert torch.equal(seen == 0, expected == 0)
    assert torch.allclose(seen, expected, atol=0.03)  # four standard deviations of 4000 draws
