"""Commands on pages of the documentation: in blocks of shell, and as quoted words that begin with a program."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_BLOCK = re.compile(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(r"(?<!`)`((?:python|torchrun|bash|make|early-exit-[\w-]+|(?:tools/)?\w+\.py) [^`]+)`(?!`)")
_VARIABLE = re.compile(r"\$\{?\w+\}?")
_SEPARATORS = {"|", "||", "&&", "&", ";"}
_REDIRECTIONS = {">", ">>", "<"}
LEFT_OUT = "..."
"""Stands on pages for words that are left out."""


@dataclass(frozen=True)
class Command:
    """One program's words as a page has them, without comments, pipes and redirections."""

    words: tuple[str, ...]
    environment: dict[str, str]
    """What is set in front of the program."""
    is_fragment: bool
    """Whether words are left out, so that required ones may be missing."""

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands_of(page: str) -> Iterator[Command]:
    """The commands of all `sh` blocks, of lines of blocks without a language that begin with Python, bash or make, and
    of quoted words in the text (fragments). page: Markdown."""
    for language, block in _BLOCK.findall(page):
        if language == "sh":
            yield from _of_shell(block)
        elif not language:
            lines = re.findall(r"^(?:python|bash|make) (?:.*\\\n)*.*$", block, re.MULTILINE)
            yield from _of_shell("\n".join(lines))
    for text in _QUOTED.findall(_BLOCK.sub("", page)):
        yield from _of_line(" ".join(text.split()), is_fragment=True)


def _of_shell(block: str) -> Iterator[Command]:
    line = ""
    for part in block.replace("\\\n", " ").splitlines():
        line += part + "\n"
        try:
            _words(line)
        except ValueError:  # a quotation that goes on in the next line
            continue
        yield from _of_line(line)
        line = ""
    assert not line, f"a quotation does not end: {line}"


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    return list(lexer)


def _of_line(line: str, is_fragment: bool = False) -> Iterator[Command]:
    words: list[str] = []
    for word in [*_words(line), ";"]:
        if word not in _SEPARATORS:
            words.append(word)
        elif words:
            yield _command(words, is_fragment)
            words = []


def _command(words: list[str], is_fragment: bool) -> Command:
    kept: list[str] = []
    environment: dict[str, str] = {}
    is_file = False
    for word in words:
        if word in _REDIRECTIONS:
            is_file = True
        elif is_file:
            is_file = False
        elif not kept and re.fullmatch(r"[A-Z_]+=.*", word):
            name, _, value = word.partition("=")
            environment[name] = value
        elif word != LEFT_OUT:
            kept.append(_VARIABLE.sub("1", word))
    return Command(tuple(kept), environment, is_fragment or LEFT_OUT in words)
