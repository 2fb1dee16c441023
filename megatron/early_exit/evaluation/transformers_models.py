"""A model in `transformers`, to be compared with ours: greedy answers and how fast they come."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.early_exit.evaluation.decoding import Ids, Run
from megatron.early_exit.platform.device import device, use_cuda


class TransformersModel:
    """A folder that `transformers` loads, with its own code alone."""

    def __init__(self, folder: Path, dtype: torch.dtype, ends: Collection[int], vocab_size: int) -> None:
        """ends: ids that end an answer; none: answers are as long as asked for. vocab_size: of our model.

        Raises ValueError if it cannot be loaded, or has fewer ids than ours."""
        import transformers

        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give one that transformers' from_pretrained loads")
        try:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, trust_remote_code=False, local_files_only=True
            ).to(device())
        except Exception as error:  # whatever their library finds
            raise ValueError(f"{folder} cannot be loaded by transformers: {error}") from error
        num_ids = self.model.get_input_embeddings().num_embeddings
        if num_ids < vocab_size:
            raise ValueError(
                f"{folder} has {num_ids} ids, fewer than the {vocab_size} of the checkpoint: another model"
            )
        self.model.eval()
        # What a folder says of sampling or of ends must not get into greedy answers that end where ours do.
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=False, pad_token_id=0, eos_token_id=sorted(ends) or None
        )

    @torch.inference_mode()
    def answers(self, prompts: Sequence[Ids], num_tokens: int, **settings: Any) -> tuple[tuple[int, ...], ...]:
        """Up to `num_tokens` of each prompt; prompts of unequal length are filled up on the left. settings: of
        `generate`."""
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(ids)) + list(ids) for ids in prompts]
        counted = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        ids, mask = (torch.tensor(rows, device=device()) for rows in (padded, counted))
        answered = self.model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, **settings)
        return tuple(self._cut(answer) for answer in answered[:, longest:].tolist())

    def _cut(self, answer: list[int]) -> tuple[int, ...]:
        """Up to the token that ends it; others of the batch may have gone on."""
        ends = self.model.generation_config.eos_token_id or ()
        stop = next((place for place, token in enumerate(answer) if token in ends), len(answer) - 1)
        return tuple(answer[: stop + 1])

    def decode(self, prompts: Sequence[Ids], num_tokens: int, **settings: Any) -> Run:
        """A `Way`: what comes behind the first token, or behind the first draft, counts."""
        clock = _first_token_clock()
        begun = _now()
        answers = self.answers(prompts, num_tokens, stopping_criteria=[clock], **settings)
        ended, num_first = _now(), clock.length - max(map(len, prompts))
        num_decoded = sum(max(len(answer) - num_first, 0) for answer in answers)
        return Run(answers, num_decoded, ended - clock.seconds, first_token_seconds=clock.seconds - begun)


def _first_token_clock() -> Any:
    """What `generate` asks after each step whether to stop: it never does, and keeps when it was first asked."""
    import transformers

    class Clock(transformers.StoppingCriteria):
        """seconds: of the clock; length: of the sequences then."""

        seconds: float | None = None
        length = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            if self.seconds is None:
                self.seconds, self.length = _now(), input_ids.shape[1]
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return Clock()


def _now() -> float:
    if use_cuda():
        torch.cuda.synchronize()
    return time.perf_counter()
