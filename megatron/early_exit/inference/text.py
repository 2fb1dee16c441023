"""Ids to text as they come, and stop strings. Both take time linear in the answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from megatron.early_exit.data.tokenizer import Tokenizer

MAX_HELD_IDS = 3
"""Ids whose text may be held. A character has at most four bytes in UTF-8, each of which may have an id of its own."""

# Ids that a piece of text is decoded with: what comes before decides on spaces. One more is tried where the text would
# begin inside of a character, many where these have no text.
_CONTEXT_SIZES = (8, 9, 10, 11, 32)
_MAX_IDS = 64
"""Decoded at once; a few more while ids are held."""
_REPLACEMENT = "\ufffd"
"""What bytes that are no character are decoded to."""
_LONGEST_CLEAN_UP = 4
"""Characters, as in " n't", that decoding with `cleans_up_spaces` looks at to remove a space."""


class TextStream:
    """Turns ids into text as they come. Text that the next ids may change is held: bytes that may become a character, a
    space that decoding may remove again. When it has been held for more than `MAX_HELD_IDS` ids, that of the oldest one
    is given out as it is, so U+FFFD for a byte that is no text."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = list(prompt_ids[-_CONTEXT_SIZES[-1] :])
        self._shown = self._decode(self._ids)
        """What has been given out of the text of `_ids`; the prompt's counts as given out."""
        self.num_held = 0
        """The last ids, whose text has not been given out, or only in part."""
        self._shorten()

    def add(self, token: int) -> str:
        """The text that `token` completes, of the ids held before it as well; empty if all is held."""
        self._ids.append(token)
        self.num_held += 1
        piece = self._show(len(self._ids), may_change=True)
        if self.num_held > MAX_HELD_IDS:
            piece += self._show(len(self._ids) - MAX_HELD_IDS, may_change=False)
        if len(self._ids) > _MAX_IDS:
            self._shorten()
        return piece

    def finish(self) -> str:
        """What is held: a replacement character for one that was never finished."""
        return self._show(len(self._ids), may_change=False)

    def _show(self, count: int, may_change: bool) -> str:
        """The text that the first `count` ids add. may_change: hold what the next id may change."""
        num_left = len(self._ids) - count
        text = self._decode(self._ids[:count])
        settled = self._settled(text) if may_change else text
        if not self._shown.startswith(settled) and not self._continues(settled):
            # The decoder makes something else of earlier ids now (one bad byte spoils those before it): they are done.
            self._restart()
            text = self._decode(self._ids[: len(self._ids) - num_left])
            settled = self._settled(text) if may_change else text
        piece = settled[len(os.path.commonprefix([self._shown, settled])) :]
        if not self._shown.startswith(settled):
            self._shown = settled
        if settled == text:
            self.num_held = num_left
        elif piece:
            self.num_held = 1  # what is held stands behind text of the newest id
        return piece

    def _continues(self, settled: str) -> bool:
        # Replacement characters at the end of a prompt may become a character.
        return settled.startswith(self._shown.rstrip(_REPLACEMENT))

    def _settled(self, text: str) -> str:
        """The part of `text` that no id can change."""
        if text.endswith(_REPLACEMENT):
            return text.rstrip(_REPLACEMENT)
        if self._tokenizer.cleans_up_spaces:
            space = text.rfind(" ", max(len(text) - _LONGEST_CLEAN_UP + 1, 0))
            return text if space < 0 else text[:space]
        return text

    def _restart(self) -> None:
        """Keep the ids that are held, with no context."""
        self._ids, self._shown = self._ids[len(self._ids) - self.num_held :], ""

    def _shorten(self) -> None:
        """Keep the last few ids as context, and those that are held."""
        text = self._decode(self._ids)
        if not text.startswith(self._shown):  # the next ids will tell
            if len(self._ids) > 2 * _MAX_IDS:
                self._restart()
            return
        held = text[len(self._shown) :]
        for size in _CONTEXT_SIZES:
            ids = self._ids[-size - self.num_held :]
            context = self._decode(ids)
            if context.endswith(held) and len(context) > len(held) and not context.startswith(_REPLACEMENT):
                break
        self._ids = ids
        self._shown = context.removesuffix(held)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.detokenize(ids)


def pieces(tokenizer: Tokenizer, prompt_ids: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """The text of each id; together they continue the prompt's text."""
    stream = TextStream(tokenizer, prompt_ids)
    texts = [stream.add(token) for token in tokens]
    if texts:
        texts[-1] += stream.finish()
    return texts


class FoundStop(NamedTuple):
    """A stop string that a text holds."""

    text: str
    at: int
    """Characters of the text before it."""


class StopStrings:
    """Finds the first stop string in a text that comes piece by piece: the one that is complete first, the longest of
    those that end there. A character takes three comparisons with each string on average, whatever the strings are
    (Knuth, Morris and Pratt)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._searches = [_Search(stop) for stop in stops]
        self._num_characters = 0
        self.found: FoundStop | None = None
        """Once one is found; what comes after it is ignored."""

    @property
    def num_settled(self) -> int:
        """Characters that no stop string can take back: those before one, or before what may be its beginning."""
        if self.found is not None:
            return self.found.at
        return self._num_characters - max((search.matched for search in self._searches), default=0)

    def add(self, piece: str, may_end: bool = True) -> None:
        """Look at the text that follows. may_end: whether a string that is complete in it counts."""
        if self.found is not None:
            return
        if not self._searches:
            self._num_characters += len(piece)
            return
        for character in piece:
            self._num_characters += 1
            complete = [search.stop for search in self._searches if search.add(character)]
            if complete and may_end:
                text = max(complete, key=len)
                self.found = FoundStop(text, self._num_characters - len(text))
                return


class _Search:
    """The search for one string."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        """Characters of the string that the text ends with, fewer than it has."""
        self._shorter = [0, 0]
        """For each number of matched characters: the next smaller one that the text then ends with as well."""
        for character in stop[1:]:
            length = self._step(self._shorter[-1], character)
            self._shorter.append(length)

    def add(self, character: str) -> bool:
        """Whether the text ends with the string now."""
        self.matched = self._step(self.matched, character)
        is_complete = self.matched == len(self.stop)
        if is_complete:
            self.matched = self._shorter[-1]
        return is_complete

    def _step(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.stop[matched] == character)
