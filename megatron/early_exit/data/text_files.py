"""The one way in which text is read: UTF-8 lines and JSON from files, pipes and standard input.

Lines end at \\n or \\r\\n and nowhere else (not at U+2028, form feed and the like), a byte-order mark is not text, and
what cannot be read is a ValueError that says where: FILE:LINE. It knows bytes and text, not tokens.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # the only way in which JSON in UTF-8 can have one

# Files that Windows programs write; their bytes are no UTF-8.
_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Line(NamedTuple):
    """One line of a file."""

    location: str
    """FILE:LINE, counted from 1, for messages."""

    raw: bytes
    """Its bytes, with the line's end."""

    @property
    def content(self) -> bytes:
        """Its bytes without the line's end."""
        return self.raw.removesuffix(b"\n").removesuffix(b"\r")

    @property
    def is_blank(self) -> bool:
        return not self.raw.removeprefix(codecs.BOM_UTF8).strip()


def split_lines(stream: IO[bytes], name: str | Path) -> Iterator[Line]:
    """Lines of `stream`, which stands at its beginning and is called `name` in messages."""
    for number, line in enumerate(stream, start=1):
        yield Line(f"{name}:{number}", line)


def decode(content: bytes, location: str) -> str:
    """Text of UTF-8 bytes, without a byte-order mark. Raises ValueError with the location."""
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "UTF-16; convert it with iconv" if content.startswith(_UTF_16_MARKS) else str(error)
        raise ValueError(f"{location}: not UTF-8 text ({hint})") from error


def parse_json(content: bytes, location: str) -> Any:
    """The JSON value that `content` holds, with half surrogate pairs as `replace_surrogates` leaves them.

    Raises ValueError with the location for bad UTF-8 and for what is no JSON."""
    text = decode(content, location)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        start = text.strip()[:80]
        raise ValueError(f"{location}: bad JSON: {error.msg} (column {error.colno}): {start!r}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise ValueError(f"{location}: JSON that cannot be read: {error}") from error
    return _without_surrogates(value) if _ESCAPED_SURROGATE.search(content) else value


def replace_surrogates(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair, which is no character and which no tokenizer takes.

    JSON has them where text was cut in the middle of an emoji, command lines where bytes are not UTF-8."""
    return _SURROGATE.sub("\ufffd", text)


def read_text_lines(path: str | Path) -> list[str]:
    """The lines of a text file or pipe that are not blank.

    Raises ValueError with FILE:LINE for bad UTF-8, OSError if it cannot be opened."""
    with Path(path).open("rb") as stream:
        return [decode(line.content, line.location) for line in split_lines(stream, path) if not line.is_blank]


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {replace_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value
