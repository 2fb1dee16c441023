"""Answers that tasks of lm-eval ask for: their generation arguments as settings of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from megatron.early_exit.evaluation.lm_eval.texts import TextRules
from megatron.early_exit.inference.params import (
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    GenerationParams,
    SamplingSettings,
)

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""Generation arguments of tasks that say how tokens are drawn."""


class AnswerRequest:
    """One request for an answer, as the engine takes it, and its text."""

    def __init__(
        self,
        texts: TextRules,
        params: GenerationParams,
        context: str,
        arguments: Mapping[str, Any],
        max_length: int,
        default_tokens: int,
    ) -> None:
        """params: of the mode. arguments: of the task. max_length: tokens of a sequence. default_tokens: of an answer.

        Raises ValueError for generation arguments that are not known, and for answers that leave no room."""
        given = dict(normalize_gen_kwargs(dict(arguments), default_tokens))
        self._texts, self._ends = texts, texts.end_strings(given.pop("until", None))
        max_tokens = given.pop("max_gen_toks")
        self.room = _room(max_tokens, max_length)
        """Tokens of a prompt beside which the answer fits."""
        ids = texts.prompt_ids(context)
        self.prompt, self.prompt_length = ids[-self.room :], len(ids)
        # Of more strings or longer ones than the engine looks for, the rest is found in the finished text.
        watched = [text for text in self._ends if len(text) <= MAX_STOP_CHARACTERS][:MAX_STOP_STRINGS]
        self.params: GenerationParams = replace(
            params,
            max_tokens=max_tokens,
            sampling=_sampling(given),
            stop=tuple(watched),
            stop_tokens=texts.end_tokens(self._ends),
        )

    def text(self, ids: list[int]) -> str:
        """The answer, without what ended it."""
        whole = self._texts.detokenize(ids)
        text: str = postprocess_generated_text(whole, self._ends, think_end_token=None)
        return text


def _room(max_tokens: int, max_length: int) -> int:
    if max_tokens >= max_length:
        raise ValueError(
            f"an answer may have {max_tokens} tokens (max_gen_toks), but the model takes {max_length} in all "
            "(max_length); it needs a model of longer sequences, or a task with a smaller max_gen_toks"
        )
    return max_length - max_tokens


def _sampling(arguments: dict[str, Any]) -> SamplingSettings:
    """Raises ValueError for arguments that are not known."""
    values = {name: arguments.pop(name) for name in _SAMPLING if name in arguments}
    if not arguments.pop("do_sample"):
        values["temperature"] = 0.0
    if arguments:
        names = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise ValueError(
            f"generation arguments that the model early-exit does not know: {names}; it knows until, max_gen_toks, "
            f"do_sample, {', '.join(_SAMPLING)}"
        )
    return SamplingSettings(**values)
