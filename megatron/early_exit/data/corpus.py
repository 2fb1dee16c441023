"""A corpus of real text that every machine has: sources and documentation of the running Python's standard library.

Run as `tools/stdlib_corpus.py`. Documents are whole source files and, from `pydoc_data`, the English help topics; what
is there several times, as packages carry copies of others, is one document. The same Python always gives the same file;
another version gives another, so losses compare only within one.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from megatron.early_exit.platform.command_line import run_program
from megatron.early_exit.platform.program_flags import Parser, parse_flags, parser_of

Content = Literal["all", "source", "prose"]

SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "ensurepip",
    "pydoc_data",  # read by `_topics`
}  # fmt: skip
DOCUMENTED_NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
TOPICS_FILE = Path("pydoc_data", "topics.py")


class CorpusDocument(NamedTuple):
    """One line of the corpus."""

    source: str
    """Path below the standard library, with `#topic` for a help topic."""

    text: str


class CorpusSummary(NamedTuple):
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of text."""


def write_stdlib_corpus(
    output: str | Path, *, content: Content = "all", max_mb: float | None = None, library: str | Path | None = None
) -> CorpusSummary:
    """Write `{"text": ..., "source": ...}` lines to `output`, at most `max_mb` million bytes of text.

    content: `source` is whole .py files; `prose` is their docstrings and comments, help topics and text files; `all` is
    whole .py files, help topics and text files. Raises ValueError if there is no text or `max_mb` is not positive.
    """
    if max_mb is not None and max_mb <= 0:
        raise ValueError(f"--max-mb {max_mb} must be positive")
    folder = Path(library or sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise ValueError(f"--folder {folder} is no folder")
    documents = _limited(stdlib_documents(folder, content), None if max_mb is None else int(max_mb * 1e6))
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    num_documents = num_bytes = 0
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for document in documents:
                stream.write(json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False) + "\n")
                num_documents += 1
                num_bytes += len(document.text.encode())
        if not num_documents:
            raise ValueError(f"no text found in {folder} (--content {content}, --max-mb {max_mb})")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return CorpusSummary(num_documents, num_bytes)


def stdlib_documents(folder: Path, content: Content = "all") -> list[CorpusDocument]:
    """Documents below `folder`, in an order that is mixed but fixed.

    Mixed, because datasets are split by position and a limited size should not stop at the letter c.
    """
    documents = list(_topics(folder / TOPICS_FILE)) if content != "source" else []
    for path in _text_files(folder):
        source = path.relative_to(folder).as_posix()
        text = _read(path)
        if text is None or (path.suffix != ".py" and content == "source"):
            continue
        if path.suffix == ".py" and content == "prose":
            text = docstrings_and_comments(text)
        if text.strip():
            documents.append(CorpusDocument(source, text))
    different = {document.text: document for document in reversed(documents)}  # of equal ones the first
    return sorted(different.values(), key=lambda document: hashlib.sha256(document.source.encode()).digest())


def docstrings_and_comments(source: str) -> str:
    """English text of a Python file: its docstrings, then its comments. Empty if the file is not valid Python."""
    try:
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED_NODES)]
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return ""
    docstrings = [text for node in nodes if (text := ast.get_docstring(node))]
    comments = [token.string.lstrip("#").strip() for token in tokens if token.type == tokenize.COMMENT]
    return "\n\n".join([*docstrings, "\n".join(comment for comment in comments if comment)]).strip()


def _topics(path: Path) -> Iterator[CorpusDocument]:
    """Help topics, read without running the file; none if this Python has no such file."""
    text = _read(path) if path.is_file() else None
    if text is None:
        return
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, topic in ast.literal_eval(node.value).items():
                yield CorpusDocument(f"{TOPICS_FILE.as_posix()}#{name}", topic)


def _text_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        kept = (name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(("config-", ".")))
        folders[:] = sorted(kept)  # in place: this is what os.walk goes on with
        yield from (Path(parent, name) for name in sorted(names) if name.endswith((".py", ".rst", ".txt")))


def _read(path: Path) -> str | None:
    """Text in the encoding that the file declares; None if it cannot be read as text."""
    try:
        with tokenize.open(path) as stream:
            return stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _limited(documents: list[CorpusDocument], max_bytes: int | None) -> Iterator[CorpusDocument]:
    left = max_bytes
    for document in documents:
        if left is not None:
            size = len(document.text.encode())
            if size > left:  # a smaller one further on may still fit
                continue
            left -= size
        yield document


@dataclass(frozen=True, kw_only=True)
class CorpusFlags:
    """Write sources and documentation of Python's standard library, or of packages, as a JSONL corpus."""

    output: str
    """JSONL file to write"""

    content: Content = "all"
    """default: sources and prose"""

    folder: Annotated[str, "DIR"] | None = None
    """another folder of Python sources, installed packages for instance"""

    max_mb: float | None = None
    """stop at so many million bytes of text"""


def build_parser() -> Parser:
    return parser_of(CorpusFlags, "stdlib_corpus.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit status."""
    flags = parse_flags(build_parser(), CorpusFlags, argv)
    try:
        summary = write_stdlib_corpus(flags.output, content=flags.content, max_mb=flags.max_mb, library=flags.folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{flags.output}: {summary.num_documents:,} documents, {summary.num_bytes / 1e6:.1f} MB of text")
    return 0


def run() -> int:
    """The console command `early-exit-stdlib-corpus`."""
    return run_program(main)
