"""Log-probabilities, in the form of completions and in that of chats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TypedDict

from pydantic import BaseModel

from megatron.early_exit.data.token_text import TokenTexts
from megatron.early_exit.inference.results import GeneratedToken, PromptToken
from megatron.early_exit.server.answer_fields import computed, finite


class CompletionLogProbs(BaseModel):
    """Four lists with one entry for each token."""

    tokens: list[str]
    """Special tokens by their names; bytes that are no whole characters as `bytes:\\xe2`."""
    token_logprobs: list[float | None]
    """None for the first token of a prompt."""
    top_logprobs: list[dict[str, float] | None]
    """The most probable tokens, and the token itself. Of tokens with equal texts the more probable one."""
    text_offset: list[int]
    """Where in the text each token begins."""


class TokenLogProb(BaseModel):
    """One token of a chat."""

    token: str
    logprob: float
    bytes: list[int] | None
    """Of its text in UTF-8, which may be a part of a character; null for special tokens, which have no text."""


class _TokenFields(TypedDict):
    """Those of `TokenLogProb`."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogProb(TokenLogProb):
    """A token of the answer."""

    top_logprobs: list[TokenLogProb]


class ChatLogProbs(BaseModel):
    """One entry for each token."""

    content: list[ChosenLogProb]
    refusal: None = None


class LogProbWriter:
    """Writes log-probabilities of tokens."""

    def __init__(self, texts: TokenTexts, as_token_ids: bool) -> None:
        """as_token_ids: write tokens as `token_id:N`."""
        self._texts, self._as_token_ids = texts, as_token_ids

    def completion(
        self, tokens: Sequence[PromptToken | GeneratedToken], pieces: Sequence[str], offset: int
    ) -> CompletionLogProbs:
        """pieces: of text, one a token. offset: where the first begins."""
        offsets = list(accumulate(map(len, pieces), initial=offset))[:-1]
        return CompletionLogProbs(
            tokens=[self._name(one.token) for one in tokens],
            token_logprobs=[None if one.log_prob is None else finite(one.log_prob) for one in tokens],
            top_logprobs=[None if one.log_prob is None else self._top(one, one.log_prob) for one in tokens],
            text_offset=offsets,
        )

    def chat(self, tokens: Iterable[GeneratedToken], num_top: int) -> ChatLogProbs:
        """num_top: most probable tokens beside each."""
        content = [
            ChosenLogProb(
                **self._one(token.token, computed(token.log_prob)),
                top_logprobs=[TokenLogProb(**self._one(*pair)) for pair in token.top_log_probs[:num_top]],
            )
            for token in tokens
        ]
        return ChatLogProbs(content=content, refusal=None)

    def _one(self, token: int, log_prob: float) -> _TokenFields:
        content = self._texts[token].content
        return {
            "token": self._name(token), "logprob": finite(log_prob), "bytes": None if content is None else [*content],
        }  # fmt: skip

    def _top(self, chosen: PromptToken | GeneratedToken, log_prob: float) -> dict[str, float]:
        by_id = {**dict(chosen.top_log_probs), chosen.token: log_prob}
        by_name: dict[str, float] = {}
        for token, log_prob in sorted(by_id.items(), key=lambda pair: -pair[1]):
            by_name.setdefault(self._name(token), finite(log_prob))
        return by_name

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_token_ids else self._texts[token].text
