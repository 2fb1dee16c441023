"""Ids to text as they come, and stop strings."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron.early_exit.data.tokenizer import Tokenizer

# Ids that a piece of text is decoded with: what comes before decides on spaces.
_CONTEXT_IDS = 8
_MAX_IDS = 64
_MAX_BYTES = 4
"""Of one character in UTF-8, each of which may have an id of its own."""
_REPLACEMENT = "\ufffd"
"""What an unfinished character is decoded to."""


class TextStream:
    """Turns ids into text as they come; a character that needs several ids appears with the last of them."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids, self._shown = self._context(list(prompt_ids))
        self._num_held = 0

    def add(self, token: int) -> str:
        """The text that `token` completes; empty if a character is unfinished."""
        self._ids.append(token)
        self._num_held += 1
        text = self._tokenizer.detokenize(self._ids)
        return self._show(text, held_back=self._unsettled(text))

    def finish(self) -> str:
        """What is left: a replacement character for one that was never finished."""
        return self._show(self._tokenizer.detokenize(self._ids), held_back="")

    def _unsettled(self, text: str) -> str:
        """The end of `text` that the next id may change."""
        if text.endswith(_REPLACEMENT):
            if self._num_held < _MAX_BYTES:
                return text[len(os.path.commonprefix([self._shown, text])) :]
            # No character is so long: what stands before the last bytes is no text and will not become one.
            settled = text.rstrip(_REPLACEMENT)
            return text[max(len(settled), len(text) - _MAX_BYTES + 1) :]
        if self._tokenizer.cleans_up_spaces and " " in text:
            return text[text.rindex(" ") :]
        return ""

    def _show(self, text: str, held_back: str) -> str:
        settled = text[: len(text) - len(held_back)]
        piece = settled[len(os.path.commonprefix([self._shown, settled])) :]
        if not self._shown.startswith(settled):
            self._shown = settled
        if piece or not held_back:
            self._num_held = 0
        if len(self._ids) > _MAX_IDS and self._shown == settled:
            ids, context = self._context(self._ids)
            if context and context.endswith(held_back):
                self._ids, self._shown = ids, context[: len(context) - len(held_back)]
        return piece

    def _context(self, ids: list[int]) -> tuple[list[int], str]:
        """The last few of `ids` and their text, cut where no character is."""
        for count in range(_CONTEXT_IDS, _CONTEXT_IDS + _MAX_BYTES):
            text = self._tokenizer.detokenize(ids[-count:])
            if not text.startswith(_REPLACEMENT):
                return ids[-count:], text
        return ids[-_CONTEXT_IDS:], self._tokenizer.detokenize(ids[-_CONTEXT_IDS:])


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
