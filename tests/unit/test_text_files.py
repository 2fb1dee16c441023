"""Reading text: where lines end, marks and halves of characters that are no text, and what messages name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.early_exit.data.documents import document_texts, find_input_files, holds_json_lines, read_documents
from megatron.early_exit.data.text_files import parse_json, read_text_lines, replace_surrogates, split_lines

RECORDS = b'{"text": "one"}\n{"text": "two"}\n'


def texts(path: Path, split_by: str = "line", input_format: str = "auto") -> list[str]:
    return [document_texts(document, ("text",))["text"] for document in read_documents(path, input_format, split_by)]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def through_pipe(path: Path, content: bytes) -> Path:
    """A named pipe that gives `content` in small pieces."""
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            for first in range(0, len(content), 7):
                pipe.write(content[first : first + 7])

    threading.Thread(target=write, daemon=True).start()
    return path


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    separators = "one \u2028 prompt \x0c in \x85 all \x1e\x0b here"
    path = written(tmp_path / "a.txt", f"\ufeff{separators}\r\n\r\n \t\nlast\rone".encode())
    assert read_text_lines(path) == [separators, "last\rone"]
    assert texts(path) == [separators, "last\rone"]
    assert texts(path, "blank-line") == [separators + "\r\n", "last\rone"]
    assert [line.location for line in split_lines(io.BytesIO(b"a\n\nb"), "standard input")] == [
        "standard input:1", "standard input:2", "standard input:3",
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"ok\ngr\xfcn\n", b"ok\n\xed\xa0\xbd\n"], ids=["latin-1", "half a pair"])
def test_bytes_that_are_no_utf8_are_named_with_their_line(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "a.txt", content)
    for read in (read_text_lines, texts):
        with pytest.raises(ValueError, match=r"a\.txt:2: not UTF-8"):
            read(path)
    with pytest.raises(ValueError, match=r"b\.txt:1: not UTF-8 text \(UTF-16; convert it with iconv\)"):
        texts(written(tmp_path / "b.txt", "some text".encode("utf-16")), "file")


def test_a_mark_alone_is_a_blank_line(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b"\xef\xbb\xbf\n" + RECORDS)
    assert texts(path) == ["one", "two"]
    assert read_text_lines(written(tmp_path / "b.txt", b"\xef\xbb\xbf\n")) == []


def test_halves_of_surrogate_pairs_are_replaced() -> None:
    assert parse_json(rb'{"a": ["\ud83d", "\ud83d\ude00"], "\udc00": "x\uDE00y"}', "f:1") == {
        "a": ["\ufffd", "\U0001f600"],
        "\ufffd": "x\ufffdy",
    }
    assert replace_surrogates("gr\udcfcn \U0001f600") == "gr\ufffdn \U0001f600"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "JSON that cannot be read: .*digits"),
        (b'{"text": "x", "n": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "JSON that cannot be read: .*recursion"),
        (b'[{"text": "x"}]', ".* this is a list; `jq -c"),
        (b'{\n"text": "x"}', "bad JSON: .*`jq -c"),
        (b"plain text", "bad JSON: .*say --input-format text"),
    ],
    ids=["digits", "brackets", "list", "several lines", "text"],
)
def test_json_that_cannot_be_read_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: {message}"):
        texts(written(tmp_path / "a.jsonl", content))


@pytest.mark.parametrize("make", [written, through_pipe], ids=["file", "pipe"])
def test_json_lines_and_gzip_are_known_by_their_content(tmp_path: Path, make: Callable[[Path, bytes], Path]) -> None:
    long_record = json.dumps({"text": "long " * 5000}).encode()
    assert texts(make(tmp_path / "a", RECORDS + long_record), "file") == ["one", "two", "long " * 5000]
    assert texts(make(tmp_path / "b.txt", b"\xef\xbb\xbf\r\n" + RECORDS), "file") == ["one", "two"]
    assert texts(make(tmp_path / "c", gzip.compress(RECORDS)), "file") == ["one", "two"]
    assert texts(make(tmp_path / "d", RECORDS), "file", "text") == [RECORDS.decode()]
    assert texts(make(tmp_path / "e", b"{braces} are text\n"), "file") == ["{braces} are text\n"]
    others = {"zstd": b"\x28\xb5\x2f\xfd" + bytes(50), "bzip2": bz2.compress(RECORDS), "xz": lzma.compress(RECORDS)}
    for name, content in others.items():
        with pytest.raises(ValueError, match=rf"f_{name} is compressed with {name}, which is not read: give --input <"):
            texts(make(tmp_path / f"f_{name}", content))
    assert texts(make(tmp_path / "g", b"BZh is text"), "file") == ["BZh is text"]


def test_bytes_read_are_counted_of_compressed_files_and_pipes_alike(tmp_path: Path) -> None:
    compressed = gzip.compress(RECORDS)
    for path in (written(tmp_path / "a.gz", compressed), through_pipe(tmp_path / "b.gz", compressed)):
        assert sum(document.read_bytes for document in read_documents(path)) == len(compressed)


def test_pipes_are_input_whose_size_nobody_knows(tmp_path: Path) -> None:
    pipe, empty = tmp_path / "pipe", written(tmp_path / "empty.txt", b"")
    os.mkfifo(pipe)
    assert find_input_files([str(pipe), str(empty)]) == [pipe, empty]
    assert find_input_files(["-"]) == [Path("/dev/stdin")]
    assert holds_json_lines(pipe, "auto") is None  # without opening it, which would wait for a writer
    with pytest.raises(ValueError, match="all 1 input files are empty"):
        find_input_files([str(empty)])
