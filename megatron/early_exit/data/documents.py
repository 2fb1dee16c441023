"""Reads documents from JSONL and plain text files, one at a time, in a fixed order.

It knows files and lines, not tokens. Files that end in `.gz` are read through gzip.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

InputFormat = Literal["auto", "jsonl", "text"]
SplitBy = Literal["file", "blank-line", "line"]

JSONL_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt", ".md", ".rst")


class Document(NamedTuple):
    """One document as it stands in its file."""

    location: str
    """FILE:LINE where it starts, for messages."""

    content: bytes
    """A line of JSON, or text; UTF-8."""

    is_json: bool

    read_bytes: int
    """Bytes of the file (compressed, if it is) consumed for this document."""


def find_input_files(inputs: Sequence[str]) -> list[Path]:
    """Files named by `inputs`: files, glob patterns, and folders (searched for text and JSONL), sorted within each.

    Raises ValueError if an input names nothing or every file is empty.
    """
    files: list[Path] = []
    for pattern in inputs:
        # A name that exists is taken literally, even with [ or * in it.
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        matches = [Path(name) for name in names]
        found = [file for match in matches for file in (_files_in(match) if match.is_dir() else [match])]
        if not found:
            suffixes = ", ".join(JSONL_SUFFIXES + TEXT_SUFFIXES)
            raise ValueError(f"--input {pattern}: no such file, or a folder without {suffixes} files")
        files += found
    files = list(dict.fromkeys(files))  # a file named twice is read once
    if not any(path.stat().st_size for path in files):
        raise ValueError(f"all {len(files)} input files are empty: {', '.join(map(str, files[:5]))}")
    return files


def is_jsonl(path: Path, input_format: InputFormat) -> bool:
    """Whether `path` is read as JSON lines; `auto` goes by the suffix."""
    if input_format != "auto":
        return input_format == "jsonl"
    return _suffix(path) in JSONL_SUFFIXES


def read_documents(path: Path, input_format: InputFormat = "auto", split_by: SplitBy = "file") -> Iterator[Document]:
    """Documents of one file: its non-blank lines for JSONL; for text the file, its paragraphs or its lines.

    Raises ValueError for a damaged gzip file; JSON is not parsed here.
    """
    with path.open("rb") as raw:
        stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            if is_jsonl(path, input_format):
                yield from _read_lines(path, raw, stream, is_json=True)
            elif split_by == "line":
                yield from _read_lines(path, raw, stream, is_json=False)
            elif split_by == "blank-line":
                yield from _read_paragraphs(path, raw, stream)
            else:
                yield Document(f"{path}:1", stream.read(), False, raw.tell())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error})") from error


def document_texts(document: Document, json_keys: Sequence[str]) -> dict[str, str]:
    """Text of `document` for each key; plain text counts as key `text`.

    Raises ValueError with FILE:LINE for bad UTF-8, bad JSON, a missing key, or a value that is not a string.
    """
    try:
        content = document.content.decode("utf-8-sig")  # a byte-order mark at the start of a file is not text
    except UnicodeDecodeError as error:
        raise ValueError(f"{document.location}: not UTF-8 text ({error})") from error
    if not document.is_json:
        return {"text": content}
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        start = content.strip()[:80]
        raise ValueError(f"{document.location}: bad JSON: {error.msg} (column {error.colno}): {start!r}") from error
    if problem := _record_problem(record, json_keys):
        raise ValueError(f"{document.location}: {problem}")
    return {key: record[key] for key in json_keys}


def _record_problem(record: Any, json_keys: Sequence[str]) -> str | None:
    if not isinstance(record, dict):
        return f"each line must be a JSON object, this is a {type(record).__name__}"
    for key in json_keys:
        if key not in record:
            return f"no key {key!r}; it has {sorted(record)}; choose with --json-keys"
        if not isinstance(record[key], str):
            return f"the value of {key!r} is a {type(record[key]).__name__}, not a string"
    return None


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _files_in(folder: Path) -> list[Path]:
    candidates = (path for path in folder.rglob("*") if path.is_file())
    known = (path for path in candidates if _suffix(path) in JSONL_SUFFIXES + TEXT_SUFFIXES)
    return sorted(path for path in known if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _read_lines(path: Path, raw: IO[bytes], stream: IO[bytes], is_json: bool) -> Iterator[Document]:
    position = 0
    for line_number, line in enumerate(stream, start=1):
        if line.strip():
            now = raw.tell()
            yield Document(f"{path}:{line_number}", line if is_json else line.rstrip(b"\r\n"), is_json, now - position)
            position = now


def _read_paragraphs(path: Path, raw: IO[bytes], stream: IO[bytes]) -> Iterator[Document]:
    position, start, lines = 0, 1, []
    for line_number, line in enumerate(stream, start=1):
        if line.strip():
            start = start if lines else line_number
            lines.append(line)
        elif lines:
            now = raw.tell()
            yield Document(f"{path}:{start}", b"".join(lines), False, now - position)
            position, lines = now, []
    if lines:
        yield Document(f"{path}:{start}", b"".join(lines), False, raw.tell() - position)
