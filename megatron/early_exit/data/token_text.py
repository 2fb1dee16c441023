"""What one token is by itself, for lists of log-probabilities: its text behind other text, and its bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.early_exit.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_BYTE_LEVEL_SPACE = "\u0120"


@dataclass(frozen=True)
class TokenText:
    """One token."""

    text: str
    """Of a special token its name; of bytes that are no whole characters `bytes:\\xe2\\x82`."""
    content: bytes | None
    """What it adds to a text in UTF-8; None if that is nothing: special tokens."""


class TokenTexts:
    """The texts of a tokenizer's ids, each made once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.tokenize("0")  # a number, which tokenizers of numbers know as well
        self._known: dict[int, TokenText] = {}

    def __getitem__(self, token: int) -> TokenText:
        if token not in self._known:
            self._known[token] = self._make(token)
        return self._known[token]

    def _make(self, token: int) -> TokenText:
        text, spelling = self._behind_others(token), self._tokenizer.library.spelling(token)
        if not text:
            return TokenText(spelling, None)
        if _REPLACEMENT not in text:
            return TokenText(text, text.encode())
        content = _bytes_of_spelling(spelling)
        if content is None:
            return TokenText(text, text.encode())
        return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in content), content)

    def _behind_others(self, token: int) -> str:
        """The first token of a text may lose its space."""
        before, whole = (self._tokenizer.detokenize(ids) for ids in (self._before, [*self._before, token]))
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.detokenize([token])


def segments(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Ids as the vocabulary spells them, special tokens too: "▁the" of SentencePiece; of byte-level vocabularies the
    text, with U+FFFD for bytes that are none."""
    spellings = [tokenizer.library.spelling(token) for token in ids]
    if not any(_BYTE_LEVEL_SPACE in tokenizer.library.spelling(token) for token in tokenizer.tokenize("0 0")):
        return spellings
    contents = [_bytes_of_spelling(spelling) for spelling in spellings]
    return [
        spelling if content is None else content.decode(errors="replace")
        for spelling, content in zip(spellings, contents, strict=True)
    ]


def _bytes_of_spelling(spelling: str) -> bytes | None:
    if match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", spelling):
        return bytes([int(match[1], 16)])
    if all(character in _BYTE_OF for character in spelling):
        return bytes(_BYTE_OF[character] for character in spelling)
    return None


def _byte_alphabet() -> dict[str, int]:
    """The characters for bytes in byte-level vocabularies: those that can be seen stand for themselves, the others
    come one after the other from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
