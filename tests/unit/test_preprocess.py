"""Preprocessing: what is in the files, the same with any number of workers, all or nothing, clear errors."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.data import encoding, token_file_writer
from megatron.early_exit.data.corpus import docstrings_and_comments, write_stdlib_corpus
from megatron.early_exit.data.corpus import main as corpus_main
from megatron.early_exit.data.loss_masks import has_mask, mask_prefix
from megatron.early_exit.data.preprocess import preprocess
from megatron.early_exit.data.preprocess_config import PreprocessConfig
from megatron.early_exit.data.preprocess_progress import Progress
from megatron.early_exit.data.tokenizer import Tokenizer, build_tokenizer
from megatron.early_exit.data.train_tokenizer import train_tokenizer

BYTES = DataConfig(tokenizer_type="ByteLevelTokenizer")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> str:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def run(tmp_path: Path, *inputs: str, **options) -> list[token_file_writer.PreprocessResult]:
    settings = {"data": BYTES, **options}
    return preprocess(PreprocessConfig(input=inputs, output_prefix=str(tmp_path / "out"), **settings))


def documents_of(prefix: str) -> list[str]:
    """Text of every document, without a final end of document."""
    dataset = IndexedDataset(prefix)
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [bytes(token for token in dataset[i] if token < 256).decode() for i in range(len(dataset))]


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out"))


def test_tokens_come_back_from_the_files(tmp_path: Path) -> None:
    texts = ["first", "zweites – Dokument", "", "\n", "last"]
    [result] = run(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts))
    assert documents_of(result.prefix) == ["first", "zweites – Dokument", "\n", "last"]
    assert result.prefix == str(tmp_path / "out_text_document")
    assert (result.num_documents, result.num_skipped) == (4, 1)
    assert result.num_tokens == len("".join(texts).encode())
    assert leftovers(tmp_path) == ["out_text_document.bin", "out_text_document.idx"]


def test_every_document_ends_with_eod(tmp_path: Path) -> None:
    [result] = run(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["ab", "", "c"]), append_eod=True)
    dataset = IndexedDataset(result.prefix)
    assert [list(dataset[i]) for i in range(len(dataset))] == [[97, 98, 256], [99, 256]]


def test_ids_above_65500_are_kept(tmp_path: Path) -> None:
    data = DataConfig(tokenizer_type="NullTokenizer", vocab_size=70000)
    [result] = run(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["1 69999 32000"]), data=data)
    dataset = IndexedDataset(result.prefix)
    assert dataset.index.dtype == np.int32
    assert list(dataset[0]) == [1, 69999, 32000]
    with pytest.raises(ValueError, match=r"b\.jsonl:1: token ids 1..70001 are not in 0..70000"):
        run(tmp_path, write_jsonl(tmp_path / "b.jsonl", ["1 70001"]), data=data, overwrite=True)


def test_workers_do_not_change_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK_DOCUMENTS", 3)
    path = write_jsonl(tmp_path / "a.jsonl", [f"document {i} " * (i % 7) for i in range(100)])
    contents = []
    for workers in (1, 2, 3):
        [result] = run(tmp_path, path, workers=workers, overwrite=True, append_eod=True)
        contents.append([Path(result.prefix + suffix).read_bytes() for suffix in (".bin", ".idx")])
    assert contents[0] == contents[1] == contents[2]


def test_text_files_folders_patterns_and_gzip(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("one\ntwo\n\n\nthree\n")
    (folder / "sub/a.md").write_text("four")
    (folder / ".hidden.txt").write_text("no")
    (folder / "image.png").write_bytes(b"\xff")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "five"}\n\n{"text": "six"}\n'))
    expected = {
        "file": ["one\ntwo\n\n\nthree\n", "five", "six", "four"],
        "blank-line": ["one\ntwo\n", "three\n", "five", "six", "four"],
        "line": ["one", "two", "three", "five", "six", "four"],
    }
    for split_by, texts in expected.items():
        [result] = run(tmp_path, str(folder), split_by=split_by, overwrite=True)
        assert documents_of(result.prefix) == texts
    [result] = run(tmp_path, str(folder / "*.txt"), str(folder / "b.txt"), overwrite=True)
    assert documents_of(result.prefix) == expected["file"][:1]  # named twice, read once


def test_several_keys_have_files_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "T", "body": "B1"}\n{"title": "", "body": "B2"}\n')
    title, body = run(tmp_path, str(path), json_keys=("title", "body"))
    assert (documents_of(title.prefix), documents_of(body.prefix)) == (["T"], ["B1", "B2"])


def test_half_a_surrogate_pair_is_replaced_and_the_rest_is_kept(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl").write_text('{"text": "a small"}\n{"text": "cut \\ud83d"}\n')
    [result] = run(tmp_path, str(tmp_path / "cut.jsonl"), data=byte_level_bpe(tmp_path / "tokenizer"))
    assert result.num_documents == 2
    tokenizer, dataset = build_tokenizer(byte_level_bpe(tmp_path / "tokenizer")), IndexedDataset(result.prefix)
    assert tokenizer.detokenize(dataset[1].tolist()) == "cut \ufffd"


def byte_level_bpe(folder: Path) -> DataConfig:
    if not folder.exists():
        train_tokenizer([write_jsonl(folder.with_suffix(".jsonl"), ["some text"])], folder, 257)
    return DataConfig(tokenizer_model=str(folder))


class Panic(BaseException):
    """What pyo3 raises for a panic in Rust."""


@pytest.mark.parametrize("error", [TypeError("TextEncodeInput"), IndexError("index"), Panic("a panic")])
def test_whatever_a_tokenizer_raises_names_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(self: Tokenizer, text: str) -> list[int]:
        raise error

    monkeypatch.setattr(Tokenizer, "tokenize", fail)
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: cannot be tokenized: {type(error).__name__}: {error}"):
        run(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["x"]))
    assert leftovers(tmp_path) == []


def test_standard_input_and_progress_without_a_size(tmp_path: Path) -> None:
    flags = ["--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "ByteLevelTokenizer"]
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", "-", "--log-interval-sec", "0"]
    records = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    done = subprocess.run([*command, *flags], input=records, text=True, capture_output=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert documents_of(f"{tmp_path}/out_text_document") == ["one", "two"]
    assert "2 documents" in done.stderr and "ETA" not in done.stderr
    assert "Warning" not in done.stderr, "libraries speak without -v"
    gone = [*command, *flags, "--chat", "--chat-template", str(tmp_path / "gone")]
    refused = subprocess.run(gone, input="", text=True, capture_output=True, env=ENVIRONMENT)
    assert refused.stderr == f"error: {tmp_path}/gone: no such file or directory\n"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "ok"}\n{"text": \n', r"a\.jsonl:2: bad JSON: .*\(column \d+\)"),
        (b'{"text": "ok"}\n\n{"content": "x"}\n', r"a\.jsonl:3: no key 'text'; it has \['content'\]"),
        (b'{"text": 5}\n', r"a\.jsonl:1: the value of 'text' is a int, not a string"),
        (b'["text"]\n', r"a\.jsonl:1: each line must be a JSON object, this is a list"),
        (b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        (b"", "input files are empty"),
        (b'{"text": ""}\n', r"no documents with text for key 'text' in the input \(1 were empty\)"),
        (b"\n\n", "no documents with text"),
    ],
    ids=["bad-json", "missing-key", "not-a-string", "not-an-object", "not-utf-8", "empty", "no-text", "blank-lines"],
)
def test_bad_input_names_file_and_line_and_leaves_nothing(
    tmp_path: Path, content: bytes, message: str, workers: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, str(tmp_path / "a.jsonl"), workers=workers)
    assert leftovers(tmp_path) == []


def test_bad_settings_are_clear_errors(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"some text " * 100)[:-12])
    (tmp_path / "plain.txt").write_text("x")
    with pytest.raises(ValueError, match=r"nowhere\*: no such file"):
        run(tmp_path, str(tmp_path / "nowhere*"))
    with pytest.raises(ValueError, match="not a whole gzip file"):
        run(tmp_path, str(tmp_path / "cut.txt.gz"))
    with pytest.raises(ValueError, match="no meaning for plain text"):
        run(tmp_path, str(tmp_path / "plain.txt"), json_keys=("body",))
    for workers in (0, -1, 100_000):
        with pytest.raises(ValueError, match=f"--workers {workers}"):
            run(tmp_path, path, workers=workers)
    assert leftovers(tmp_path) == []


def test_existing_output_is_kept_unless_told_and_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", ["good"])
    [result] = run(tmp_path, good)
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(tmp_path, write_jsonl(tmp_path / "b.jsonl", ["other"]))
    (tmp_path / "b.jsonl").write_text('{"text": "other"}\nbroken\n')
    with pytest.raises(ValueError, match="bad JSON"):
        run(tmp_path, str(tmp_path / "b.jsonl"), overwrite=True)
    assert documents_of(result.prefix) == ["good"]
    run(tmp_path, write_jsonl(tmp_path / "b.jsonl", ["other"]), overwrite=True)
    assert documents_of(result.prefix) == ["other"]


def test_the_loss_mask_of_earlier_tokens_goes_with_them(tmp_path: Path) -> None:
    good, broken = write_jsonl(tmp_path / "a.jsonl", ["good"]), tmp_path / "b.jsonl"
    [result] = run(tmp_path, good)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{result.prefix}{suffix}", f"{mask_prefix(result.prefix)}{suffix}")
    broken.write_text('{"text": "other"}\nbroken\n')
    with pytest.raises(ValueError, match="bad JSON"):
        run(tmp_path, str(broken), overwrite=True)
    assert has_mask(result.prefix)
    for suffix in (".bin", ".idx"):
        Path(f"{result.prefix}{suffix}").unlink()
    with pytest.raises(FileExistsError, match=r"mask\.bin.*--overwrite"):
        run(tmp_path, good)
    run(tmp_path, good, overwrite=True)
    assert documents_of(result.prefix) == ["good"] and not has_mask(result.prefix)


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_file_writer.PairWriter, "add", fail)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["x"] * 1000), workers=2)
    assert leftovers(tmp_path) == []


@contextmanager
def endless_run(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """The tool with two workers, while it writes. A pipe that never ends keeps it reading."""
    pipe = tmp_path / "endless.jsonl"
    os.mkfifo(pipe)
    source = write_jsonl(tmp_path / "first.jsonl", ["text"] * 1000)
    # Programs started in the background inherit an ignored SIGINT; started from a terminal they do not.
    launcher = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    launcher += f"runpy.run_path({str(ROOT / 'tools/preprocess_data.py')!r}, run_name='__main__')"
    flags = ["--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "ByteLevelTokenizer", "--workers", "2"]
    command = [sys.executable, "-c", launcher, "--input", source, str(pipe), *flags]
    with subprocess.Popen(command, env=ENVIRONMENT) as process:
        try:
            deadline = time.monotonic() + 120
            while len(workers_of(process)) < 2 and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.1)
            assert leftovers(tmp_path) and workers_of(process), "it never began to write"
            yield process
        finally:
            process.kill()


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("signal_number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_interrupted_run_leaves_nothing(tmp_path: Path, signal_number: signal.Signals, status: int) -> None:
    with endless_run(tmp_path) as process:
        workers = workers_of(process)
        process.send_signal(signal_number)
        assert process.wait(timeout=60) == status
    assert leftovers(tmp_path) == []
    assert not any(map(is_alive, workers))


def test_a_killed_run_leaves_no_process_and_the_next_one_removes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["text"])
    (tmp_path / "out_other.partial-1.bin").touch()  # of another prefix
    with endless_run(tmp_path) as process:
        workers = workers_of(process)
        with pytest.raises(ValueError, match=r"another run is writing .*out_text_document .*: wait for it, or give"):
            run(tmp_path, source)
        process.kill()
        process.wait(timeout=60)
    deadline = time.monotonic() + 5
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
    [partial] = [name for name in leftovers(tmp_path) if name.startswith("out_text_document.partial")]
    run(tmp_path, source)
    assert f"removed what a killed run left behind: {partial}" in capsys.readouterr().err
    assert leftovers(tmp_path) == ["out_other.partial-1.bin", "out_text_document.bin", "out_text_document.idx"]


def test_errors_of_the_disk_say_where_and_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x"] * 1000)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write .*file: File exists"):
        preprocess(PreprocessConfig(input=(source,), output_prefix=str(tmp_path / "file" / "out"), data=BYTES))
    add = token_file_writer.PairWriter.add

    def add_on_a_full_disk(self: token_file_writer.PairWriter, *args: object) -> None:
        self.builder.data_file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        add(self, *args)

    monkeypatch.setattr(token_file_writer.PairWriter, "add", add_on_a_full_disk)
    with pytest.raises(OSError, match=r"cannot write .*out_text_document.partial-\d+.bin: no space left on the disk"):
        run(tmp_path, source)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("prefix", ["{}", "{}/", "{}/..", "new/"])
def test_a_prefix_that_is_a_folder_is_refused(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(ValueError, match=r"is a folder; add a name, such as .*/corpus"):
        PreprocessConfig(input=("a",), output_prefix=prefix.format(tmp_path), data=BYTES)


def test_progress_line_has_rates_and_time_left() -> None:
    progress = Progress(total_bytes=4_000_000, interval_sec=5)
    progress.num_documents, progress.num_tokens, progress.read_bytes = 100, 5000, 1_000_000
    assert progress.line(2.0) == " 25%  100 documents  50 docs/s  0.50 MB/s  2,500 tokens/s  ETA 0:00:06"


def test_stdlib_corpus_is_real_text_and_always_the_same(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        summary = write_stdlib_corpus(tmp_path / name, max_mb=0.5)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 400_000 < summary.num_bytes <= 500_000
    assert summary.num_documents == len(records) > 10
    assert not any({"test", "tests", "site-packages"} & set(record["source"].split("/")) for record in records)
    [result] = run(tmp_path, str(tmp_path / "a.jsonl"))
    assert result.num_tokens == summary.num_bytes


def test_corpus_prose_of_a_source_file(tmp_path: Path) -> None:
    source = '"""Module."""\n# A comment.\ndef f():\n    """Function."""\n    return "no prose"  # Why.\n'
    assert docstrings_and_comments(source) == "Module.\n\nFunction.\n\nA comment.\nWhy."
    (tmp_path / "lib/pydoc_data").mkdir(parents=True)
    (tmp_path / "lib/pydoc_data/topics.py").write_text("topics = {'assert': 'The assert statement.'}")
    (tmp_path / "lib/m.py").write_text(source)
    write_stdlib_corpus(tmp_path / "c.jsonl", content="prose", library=tmp_path / "lib")
    texts = {record["source"]: record["text"] for record in map(json.loads, (tmp_path / "c.jsonl").open())}
    assert texts == {"pydoc_data/topics.py#assert": "The assert statement.", "m.py": docstrings_and_comments(source)}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text found"):
        write_stdlib_corpus(tmp_path / "d.jsonl", library=tmp_path / "empty")


def test_corpus_of_installed_packages_has_each_text_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, text in {"a/one.py": "x = 1\n", "b/vendored/one.py": "x = 1\n", "b/two.py": "x = 2\n"}.items():
        (tmp_path / "packages" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "packages" / name).write_text(text)
    output = tmp_path / "e.jsonl"
    assert corpus_main(["--folder", str(tmp_path / "packages"), "--output", str(output)]) == 0
    texts = {record["source"]: record["text"] for record in map(json.loads, output.open())}
    assert texts == {"a/one.py": "x = 1\n", "b/two.py": "x = 2\n"}
    assert corpus_main(["--folder", str(tmp_path / "nowhere"), "--output", str(output)]) == 1
    assert "nowhere is no folder" in capsys.readouterr().err


def test_byte_tokenizer_of_these_tests_is_the_real_one() -> None:
    assert build_tokenizer(BYTES).eod == 256
