"""Ids to text as they come, and stop strings."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron.early_exit.data.tokenizer import Tokenizer

# Ids that a piece of text is decoded with: what comes before decides on spaces, and one character may take several ids.
_CONTEXT_IDS = 8
_MAX_IDS = 64


class TextStream:
    """Turns ids into text as they come; a character that needs several ids appears with the last of them."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_IDS:])
        self._shown = tokenizer.detokenize(self._ids)

    def add(self, token: int) -> str:
        """The text that `token` completes; empty if a character is unfinished."""
        self._ids.append(token)
        text = self._tokenizer.detokenize(self._ids)
        return "" if text.endswith("\ufffd") else self._show(text)

    def finish(self) -> str:
        """What is left: a replacement character for one that was never finished."""
        return self._show(self._tokenizer.detokenize(self._ids))

    def _show(self, text: str) -> str:
        piece = text[len(os.path.commonprefix([self._shown, text])) :]
        if len(self._ids) > _MAX_IDS:
            self._ids = self._ids[-_CONTEXT_IDS:]
            text = self._tokenizer.detokenize(self._ids)
        self._shown = text
        return piece


def pieces(tokenizer: Tokenizer, prompt_ids: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """The text of each id; together they continue the prompt's text."""
    stream = TextStream(tokenizer, prompt_ids)
    texts = [stream.add(token) for token in tokens]
    if texts:
        texts[-1] += stream.finish()
    return texts


class StopStrings:
    """Cuts text before the first stop string, and holds back what may become the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_found = False

    def add(self, piece: str) -> str:
        """The text that may be shown after `piece` has come; nothing more once a stop string is found."""
        if self.is_found or not self._stops:
            return "" if self.is_found else piece
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.is_found, self._held = True, ""
            return text[: min(found)]
        keep = max(
            (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return "" if self.is_found else held
