"""Prompts from --prompt-file and from standard input, for all programs that take them."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron.early_exit.data.text_files import read_text_lines, split_lines


def prompts_of_file(path: Path | None) -> list[str]:
    """The prompts of a file or pipe, one a line; none without a path. Raises ValueError if there are none, or one is
    not text."""
    if path is None:
        return []
    try:
        lines = read_text_lines(path)
    except OSError as error:
        raise ValueError(f"--prompt-file {path} cannot be read: {error.strerror}") from error
    if not lines:
        raise ValueError(f"--prompt-file {path} holds no prompt: all lines are empty")
    return lines


def typed_prompts() -> Iterator[str]:
    """The lines of standard input but blank ones. Bytes that are not UTF-8 become what Python makes of them in
    arguments, and the prompt is refused like those."""
    if not sys.stdin.isatty():
        for line in split_lines(sys.stdin.buffer, "standard input"):
            if not line.is_blank:
                yield line.content.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            typed = input("prompt> ")
        except EOFError:
            return
        if typed.strip():
            yield typed
