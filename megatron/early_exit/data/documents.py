"""Reads documents from JSONL and plain text files, one at a time, in a fixed order.

It knows files and lines, not tokens. Compressed files (gzip) and pipes are read as they come.
"""

from __future__ import annotations

import glob
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

from megatron.early_exit.data.text_files import decode, parse_json, split_lines

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

InputFormat = Literal["auto", "jsonl", "text"]
SplitBy = Literal["file", "blank-line", "line"]

JSONL_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt", ".md", ".rst")

STANDARD_INPUT = "/dev/stdin"

_HEAD_BYTES = 4096  # what is looked at to tell what a file is
_BUFFER_BYTES = 1 << 17
_GZIP_MAGIC = b"\x1f\x8b"
_OTHER_COMPRESSIONS = (
    (rb"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
    (rb"\xfd7zXZ\x00", "xz", "xz -dc"),
    (rb"BZh[1-9]1AY&SY", "bzip2", "bzip2 -dc"),
    (rb"PK\x03\x04", "zip", "unzip -p"),
)
"""First bytes, name, and the command that writes the text to its standard output."""
_JQ = "`jq -c '.[]' FILE` makes lines of a list, `jq -c . FILE` of an object"
_JSON_BEGINNING = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"')


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
    """Files named by `inputs`: files, pipes, glob patterns, and folders (searched for text and JSONL), sorted within
    each; `-` is standard input.

    Raises ValueError if an input names nothing or every file is empty.
    """
    files: list[Path] = []
    for pattern in inputs:
        # A name that exists is taken literally, even with [ or * in it.
        pattern = STANDARD_INPUT if pattern == "-" else pattern
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        matches = [Path(name) for name in names]
        found = [file for match in matches for file in (_files_in(match) if match.is_dir() else [match])]
        if not found:
            suffixes = ", ".join(JSONL_SUFFIXES + TEXT_SUFFIXES)
            raise ValueError(f"--input {pattern}: no such file, or a folder without {suffixes} files")
        files += found
    files = list(dict.fromkeys(files))  # a file named twice is read once
    if all(file_bytes(path) == 0 for path in files):
        raise ValueError(f"all {len(files)} input files are empty: {', '.join(map(str, files[:5]))}")
    return files


def file_bytes(path: Path) -> int | None:
    """Size of a regular file; None for a pipe, whose size nobody knows."""
    return path.stat().st_size if path.is_file() else None


def holds_json_lines(path: Path, input_format: InputFormat) -> bool | None:
    """Whether `path` is read as JSON lines; None for a pipe, which says so only when it is read.

    Raises ValueError for a damaged gzip file."""
    if input_format != "auto" or _suffix(path) in JSONL_SUFFIXES:
        return input_format != "text"
    if not path.is_file():
        return None
    with _opened(path) as source:
        return source.begins_with_json


def read_documents(path: Path, input_format: InputFormat = "auto", split_by: SplitBy = "file") -> Iterator[Document]:
    """Documents of one file or pipe: its non-blank lines for JSONL; for text the file, its paragraphs or its lines.

    Raises ValueError for a damaged gzip file; JSON is not parsed here.
    """
    with _opened(path) as source:
        is_json = input_format == "jsonl" or (
            input_format == "auto" and (_suffix(path) in JSONL_SUFFIXES or source.begins_with_json)
        )
        if is_json or split_by == "line":
            yield from _read_lines(source, is_json)
        elif split_by == "blank-line":
            yield from _read_paragraphs(source)
        else:
            content = source.stream.read()
            yield Document(f"{path}:1", content, False, source.file.num_read_bytes)


def document_texts(document: Document, json_keys: Sequence[str]) -> dict[str, str]:
    """Text of `document` for each key; plain text counts as key `text`.

    Raises ValueError with FILE:LINE for bad UTF-8, bad JSON, a missing key, or a value that is not a string.
    """
    if not document.is_json:
        if tuple(json_keys) != ("text",):
            raise ValueError(
                f"{document.location}: --json-keys {' '.join(json_keys)} has no meaning for plain text; leave it out, "
                "or say --input-format jsonl"
            )
        return {"text": decode(document.content, document.location)}
    try:
        record = parse_json(document.content, document.location)
    except ValueError as error:
        raise ValueError(f"{error}{_format_hint(document.content)}") from error
    if problem := _record_problem(record, json_keys):
        raise ValueError(f"{document.location}: {problem}")
    return {key: record[key] for key in json_keys}


def _format_hint(content: bytes) -> str:
    """What to do with a file that was taken for JSON lines and is none."""
    if content.strip() in (b"{", b"[", b"[{"):
        return f"; each line must hold one whole JSON object ({_JQ})"
    return "" if content.lstrip().startswith(b"{") else "; if the file is plain text, say --input-format text"


def _record_problem(record: Any, json_keys: Sequence[str]) -> str | None:
    if not isinstance(record, dict):
        hint = f"; {_JQ}" if isinstance(record, list) else ""
        return f"each line must be a JSON object, this is a {type(record).__name__}{hint}"
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


class _CountedFile(io.RawIOBase):
    """A file or pipe that counts what was read of it."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw, self.num_read_bytes = raw, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        count = self._raw.readinto(buffer) or 0
        self.num_read_bytes += count
        return count


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes have been read already; a pipe cannot be read twice."""

    def __init__(self, head: bytes, rest: io.BufferedIOBase) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        if not self._head:
            return self._rest.readinto(buffer)
        target = memoryview(buffer)
        count = min(len(target), len(self._head))
        target[:count], self._head = self._head[:count], self._head[count:]
        return count


class _Source(NamedTuple):
    """An input file that is open."""

    path: Path
    file: _CountedFile
    stream: IO[bytes]
    """Its bytes, decompressed if need be."""

    begins_with_json: bool
    """Whether what is not blank begins with a JSON object that has a key, or with a list of them."""


@contextmanager
def _opened(path: Path) -> Iterator[_Source]:
    with path.open("rb", buffering=0) as raw:
        file = _CountedFile(raw)
        head, stream = _peek(io.BufferedReader(file))
        for magic, name, command in _OTHER_COMPRESSIONS:
            if re.match(magic, head):
                raise ValueError(
                    f"{path} is compressed with {name}, which is not read: give --input <({command} {path})"
                )
        try:
            if path.suffix == ".gz" or head.startswith(_GZIP_MAGIC):
                head, stream = _peek(gzip.GzipFile(fileobj=stream))
            yield _Source(path, file, stream, bool(_JSON_BEGINNING.match(head)))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error})") from error


def _peek(stream: io.BufferedIOBase) -> tuple[bytes, io.BufferedReader]:
    """The first bytes of `stream`, and the whole of it again."""
    head = stream.read(_HEAD_BYTES)
    return head, io.BufferedReader(_Rejoined(head, stream), _BUFFER_BYTES)


def _read_lines(source: _Source, is_json: bool) -> Iterator[Document]:
    position = 0
    for line in split_lines(source.stream, source.path):
        if not line.is_blank:
            now = source.file.num_read_bytes
            yield Document(line.location, line.content, is_json, now - position)
            position = now


def _read_paragraphs(source: _Source) -> Iterator[Document]:
    position, location = 0, ""
    lines: list[bytes] = []
    for line in split_lines(source.stream, source.path):
        if not line.is_blank:
            location = location if lines else line.location
            lines.append(line.raw)
        elif lines:
            now = source.file.num_read_bytes
            yield Document(location, b"".join(lines), False, now - position)
            position, lines = now, []
    if lines:
        yield Document(location, b"".join(lines), False, source.file.num_read_bytes - position)
