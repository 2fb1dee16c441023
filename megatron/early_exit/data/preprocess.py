"""Text to token files: JSONL or plain text becomes core's `.bin` (token ids) and `.idx` (where each document lies).

Run as `tools/preprocess_data.py`. Files appear under their final names only when they are complete.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron.early_exit.config.data import DataConfig, TokenizerType
from megatron.early_exit.data.chat_template import read_chat_template
from megatron.early_exit.data.conversations import marked_conversation, messages_problem
from megatron.early_exit.data.documents import (
    Document,
    InputFormat,
    SplitBy,
    document_texts,
    file_bytes,
    find_input_files,
    holds_json_lines,
    read_documents,
)
from megatron.early_exit.data.loss_masks import HAS_LOSS, mask_prefix
from megatron.early_exit.data.text_files import parse_json
from megatron.early_exit.data.tokenizer import Tokenizer, build_tokenizer
from megatron.early_exit.platform.command_line import run_program
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.platform.processes import die_with_parent
from megatron.early_exit.platform.program_flags import Parser, parse_flags, parser_of

# A chunk is what a worker gets at once: enough to hide the cost of sending it, little enough to keep progress smooth.
CHUNK_DOCUMENTS = 256
CHUNK_BYTES = 1 << 17

MOST_WORKERS = 512

MESSAGES, MARKS = "messages", "marks"
"""Keys of conversations, and of what `loss_masks` says of their tokens."""

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@dataclass(frozen=True)
class PreprocessConfig:
    """What to read, what to write and how."""

    input: tuple[str, ...]
    """Files, glob patterns or folders."""

    output_prefix: str
    """Output is PREFIX_KEY_document.bin and .idx for each key."""

    data: DataConfig
    """Which tokenizer (the other settings play no part)."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON objects to tokenize; each has its own pair of files."""

    append_eod: bool = False
    """End every document with the tokenizer's end-of-document id."""

    chat: bool = False
    """Lines hold conversations, {"messages": [{"role": ..., "content": ...}, ...]}: only answers get a loss."""

    chat_template: str | None = None
    """How they are written, in Jinja; None: the tokenizer's way."""

    input_format: InputFormat = "auto"
    """How to read the files; `auto` takes .jsonl, .json and what begins with a JSON object as JSON lines, all others as
    text."""

    split_by: SplitBy = "file"
    """What one document is in a text file."""

    workers: int = 1
    """Processes that tokenize."""

    overwrite: bool = False
    """Replace existing output."""

    log_interval_sec: float = 5.0
    """Seconds between two lines of progress."""

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.workers <= MOST_WORKERS:
            problems.append(f"--workers {self.workers} must be at least 1 and at most {MOST_WORKERS}")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            problems.append(f"--json-keys {' '.join(self.json_keys)} must be one or more different keys")
        if self.output_prefix.endswith(("/", "/.", "/..")) or Path(self.output_prefix).is_dir():
            example = Path(self.output_prefix) / "corpus"
            problems.append(f"--output-prefix {self.output_prefix} is a folder; add a name, such as {example}")
        elif not Path(self.output_prefix).name:
            problems.append("--output-prefix must not be empty")
        if self.chat and (self.json_keys != ("text",) or self.input_format == "text"):
            problems.append('--chat reads "messages" from JSON lines: leave out --json-keys and --input-format text')
        if self.chat_template is not None and not self.chat:
            problems.append("--chat-template has no effect without --chat")
        if self.log_interval_sec < 0:
            problems.append(f"--log-interval-sec {self.log_interval_sec} must not be negative")
        if problems:
            raise ValueError("\n".join(problems))


class PreprocessResult(NamedTuple):
    """What was written under one prefix (for --data-path)."""

    prefix: str
    num_documents: int
    num_tokens: int
    num_skipped: int
    """Documents without a single token."""
    num_answer_tokens: int | None = None
    """Those that have a loss, of conversations."""


class EncodedChunk(NamedTuple):
    """Token ids of the documents of one chunk, for each key; of conversations, their marks as another."""

    tokens: dict[str, np.ndarray]
    lengths: dict[str, list[int]]
    num_documents: int
    num_skipped: dict[str, int]
    read_bytes: int


def preprocess(config: PreprocessConfig) -> list[PreprocessResult]:
    """Tokenize all documents in order and write one pair of files per key. The result does not depend on `workers`.

    Raises ValueError for bad input, FileExistsError for existing output without `overwrite`, RuntimeError if a worker
    died. In every failure, interruption included, nothing is left behind and existing files are as they were.
    """
    prefixes = _prefixes(config)
    _refuse_existing(prefixes.values(), config.overwrite)
    files = find_input_files(config.input)
    _check_keys_fit_format(config, files)
    tokenizer = build_tokenizer(config.data.tokenizer)
    encoder = build_encoder(config, tokenizer)
    with _naming(Path(config.output_prefix).parent):
        Path(config.output_prefix).parent.mkdir(parents=True, exist_ok=True)
        for prefix in prefixes.values():
            _remove_left_behind(prefix)

    documents = (doc for path in files for doc in read_documents(path, config.input_format, config.split_by))
    known_sizes = [size for path in files if (size := file_bytes(path)) is not None]
    progress = Progress(sum(known_sizes) if len(known_sizes) == len(files) else None, config.log_interval_sec)
    with _partial_outputs(prefixes, tokenizer.vocab_size) as writers:
        num_answer_tokens = 0
        for chunk in _encode_all(chunks_of(documents), config, encoder):
            for key, writer in writers.items():
                writer.add(chunk, key)
            if config.chat:
                num_answer_tokens += int((chunk.tokens[MARKS] & HAS_LOSS).sum())
            progress.update(chunk)
        results = {key: writer.finish() for key, writer in writers.items()}
    progress.finish()
    if config.chat:
        return [results[MESSAGES]._replace(num_answer_tokens=num_answer_tokens)]
    return list(results.values())


def _prefixes(config: PreprocessConfig) -> dict[str, str]:
    """Of the files that are written, by key."""
    if config.chat:
        prefix = f"{config.output_prefix}_{MESSAGES}_document"
        # Published in this order: at no moment do tokens lie there without their mask.
        return {MARKS: mask_prefix(prefix), MESSAGES: prefix}
    return {key: f"{config.output_prefix}_{key}_document" for key in config.json_keys}


def chunks_of(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents grouped by number and size, in order."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.content)
        if len(chunk) >= CHUNK_DOCUMENTS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class Encoder:
    """Tokenizes chunks; one lives in every worker."""

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self.keys = tuple(keys)
        self.append_eod = append_eod

    def __call__(self, chunk: list[Document]) -> EncodedChunk:
        tokens: dict[str, list[np.ndarray]] = {key: [] for key in self.keys}
        num_skipped = dict.fromkeys(self.keys, 0)
        for document in chunk:
            for key, ids in self.encode_document(document).items():
                if len(ids):
                    tokens[key].append(ids)
                else:
                    num_skipped[key] += 1
        return EncodedChunk(
            {key: np.concatenate(arrays) if arrays else np.zeros(0, np.int64) for key, arrays in tokens.items()},
            {key: [len(array) for array in arrays] for key, arrays in tokens.items()},
            len(chunk),
            num_skipped,
            sum(document.read_bytes for document in chunk),
        )

    def encode_document(self, document: Document) -> dict[str, np.ndarray]:
        """Ids of each key. Raises ValueError with the location."""
        return {
            key: self.encode(functools.partial(self.tokenizer.tokenize, text), document.location)
            for key, text in document_texts(document, self.keys).items()
        }

    def encode(self, tokenize: Callable[[], list[int]], location: str) -> np.ndarray:
        """Ids that `tokenize` gives, int64; empty if the text has no token. Raises ValueError with the location."""
        try:
            ids = tokenize()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever a library raises; a panic in Rust is not even an Exception
            raise ValueError(f"{location}: cannot be tokenized: {type(error).__name__}: {error}") from error
        if ids and not 0 <= min(ids) <= max(ids) < self.tokenizer.vocab_size:
            largest = self.tokenizer.vocab_size - 1
            raise ValueError(f"{location}: token ids {min(ids)}..{max(ids)} are not in 0..{largest}")
        if ids and self.append_eod:
            ids = [*ids, self.tokenizer.eod]
        return np.asarray(ids, dtype=np.int64)


class ChatEncoder(Encoder):
    """Tokenizes conversations, and marks their answers."""

    def __init__(self, tokenizer: Tokenizer, template: str, append_eod: bool) -> None:
        super().__init__(tokenizer, (MESSAGES, MARKS), append_eod)
        self.template = template

    def encode_document(self, document: Document) -> dict[str, np.ndarray]:
        value = parse_json(document.content, document.location)
        messages: Any = value.get(MESSAGES) if isinstance(value, dict) else None
        if problem := messages_problem(messages):
            raise ValueError(f"{document.location}: {problem}")
        try:
            marked = marked_conversation(self.tokenizer, messages, self.template)
        except ValueError as error:
            raise ValueError(f"{document.location}: {error}") from None
        ids = self.encode(lambda: marked.ids, document.location)
        return {MESSAGES: ids, MARKS: np.asarray(marked.marks + [0] * (len(ids) - len(marked.marks)), np.int64)}


def build_encoder(config: PreprocessConfig, tokenizer: Tokenizer) -> Encoder:
    """What tokenizes documents as the settings say. Raises ValueError if conversations have no template."""
    if not config.chat:
        return Encoder(tokenizer, config.json_keys, config.append_eod)
    template = config.chat_template or tokenizer.chat_template
    if template is None:
        raise ValueError("--chat: the tokenizer has no chat template; give --chat-template FILE")
    return ChatEncoder(tokenizer, template, config.append_eod)


_encoder: Encoder | None = None


def _start_worker(parent: int, config: PreprocessConfig) -> None:
    global _encoder
    die_with_parent(parent)
    # Ctrl-C and a lost terminal reach the whole process group; only the parent cleans up, so workers wait to be told.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    _encoder = build_encoder(config, build_tokenizer(config.data.tokenizer))


def _encode_in_worker(chunk: list[Document]) -> EncodedChunk:
    assert _encoder is not None, "worker was not initialised"
    return _encoder(chunk)


def _encode_all(chunks: Iterator[list[Document]], config: PreprocessConfig, encoder: Encoder) -> Iterator[EncodedChunk]:
    """Encoded chunks in the order of `chunks`. encoder: works in this process, if no other does."""
    # Parallel over documents, not inside one: threads of the Hugging Face library would compete with the workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if config.workers == 1:
        yield from map(encoder, chunks)
        return
    # Fork spares every worker the seconds that importing core takes.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    executor = ProcessPoolExecutor(
        config.workers,
        mp_context=multiprocessing.get_context(method),
        initializer=_start_worker,
        initargs=(os.getpid(), config),
    )
    try:
        _start_processes(executor)
        # At most a few chunks per worker are in flight, so memory does not grow with the corpus.
        pending: deque[Future[EncodedChunk]] = deque()
        for chunk in chunks:
            pending.append(executor.submit(_encode_in_worker, chunk))
            if len(pending) >= 4 * config.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError("a tokenizing process died (out of memory?); try fewer --workers") from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_processes(executor: ProcessPoolExecutor) -> None:
    """Fork the workers with signals held back: Python drops an exception raised by one that arrives during a fork."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        executor.submit(int)  # the first task starts all processes
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Have errors of the file system say where they happened: those of writing do not."""
    try:
        yield
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise OSError(error.errno, f"cannot write {error.filename or path}: {reason}") from error


def _remove_left_behind(prefix: str) -> None:
    """Remove the files that killed runs began to write. Raises ValueError if a run that is alive writes them."""
    beginning = f"{Path(prefix).name}.partial-"
    partial = [path for path in Path(prefix).parent.iterdir() if path.name.startswith(beginning)]
    for path in partial:
        if path.suffix == ".bin" and _is_locked(path):
            raise ValueError(
                f"another run is writing {prefix} ({path.name}): wait for it, or give another --output-prefix"
            )
    for path in partial:
        path.unlink(missing_ok=True)
    if partial:
        names = ", ".join(sorted(path.name for path in partial))
        print(f"removed what a killed run left behind: {names}", file=sys.stderr)


def _is_locked(path: Path) -> bool:
    """Whether the process that made the file is alive: locks end with their processes, on other machines too."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


class PairWriter:
    """Writes one pair of files under temporary names; `publish` gives them their final names."""

    def __init__(self, key: str, prefix: str, vocab_size: int) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        dtype = np.uint8 if key == MARKS else DType.optimal_dtype(vocab_size)

        self.key = key
        self.prefix = prefix
        self.partial = f"{prefix}.partial-{os.getpid()}"
        with _naming(self.partial):
            self.builder = IndexedDatasetBuilder(f"{self.partial}.bin", dtype=dtype)
            self._lock = open(f"{self.partial}.bin", "r+b")  # noqa: SIM115
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.num_documents = self.num_tokens = self.num_skipped = 0

    def add(self, chunk: EncodedChunk, key: str) -> None:
        # One write for the whole chunk; every document is one sequence.
        first = len(self.builder.sequence_lengths)
        lengths = chunk.lengths[key]
        if lengths:
            with _naming(f"{self.partial}.bin"):
                self.builder.add_document(chunk.tokens[key], lengths)
            self.builder.document_indices[-1:] = range(first + 1, first + len(lengths) + 1)
        self.num_documents += len(lengths)
        self.num_tokens += len(chunk.tokens[key])
        self.num_skipped += chunk.num_skipped[key]

    def finish(self) -> PreprocessResult:
        """Complete both files, still under their temporary names."""
        if not self.num_documents:
            raise ValueError(
                f"no documents with text for key {self.key!r} in the input ({self.num_skipped} were empty)"
            )
        with _naming(self.partial):
            self.builder.data_file.flush()
            self.builder.finalize(f"{self.partial}.idx")
        return PreprocessResult(self.prefix, self.num_documents, self.num_tokens, self.num_skipped)

    def publish(self, has_mask: bool) -> None:
        """has_mask: whether a loss mask has been written too; one of earlier tokens goes otherwise."""
        # The index goes first and comes last: at no moment does an old one, or an old mask, stand beside new tokens.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        if not has_mask:
            for suffix in (".idx", ".bin"):
                Path(f"{mask_prefix(self.prefix)}{suffix}").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            os.replace(f"{self.partial}{suffix}", f"{self.prefix}{suffix}")

    def discard(self) -> None:
        with suppress(OSError):  # a full disk takes the last bytes no better than those before
            self.builder.data_file.close()
        self._lock.close()
        for suffix in (".bin", ".idx"):
            Path(f"{self.partial}{suffix}").unlink(missing_ok=True)


@contextmanager
def _partial_outputs(prefixes: dict[str, str], vocab_size: int) -> Iterator[dict[str, PairWriter]]:
    """Writers that are published together when the block succeeds, and leave nothing when it does not."""
    writers: dict[str, PairWriter] = {}
    try:
        for key, prefix in prefixes.items():
            writers[key] = PairWriter(key, prefix, vocab_size)
        yield writers
        for writer in writers.values():
            writer.publish(has_mask=MARKS in writers)
    finally:
        for writer in writers.values():
            writer.discard()


class Progress:
    """Lines on standard error with documents, rates and the time left."""

    def __init__(self, total_bytes: int | None, interval_sec: float) -> None:
        """total_bytes: None if nobody knows, as of a pipe."""
        self.total_bytes = total_bytes
        self.interval_sec = interval_sec
        self.start = self.last = time.monotonic()
        self.num_documents = self.num_tokens = self.read_bytes = 0

    def update(self, chunk: EncodedChunk) -> None:
        self.num_documents += chunk.num_documents
        self.num_tokens += sum(len(tokens) for key, tokens in chunk.tokens.items() if key != MARKS)
        self.read_bytes += chunk.read_bytes
        now = time.monotonic()
        if now - self.last >= self.interval_sec:
            self.last = now
            print(self.line(now - self.start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        seconds = max(seconds, 1e-9)
        rate = max(self.read_bytes, 1) / seconds
        rates = (
            f"{self.num_documents:,} documents  {self.num_documents / seconds:,.0f} docs/s  "
            f"{rate / 1e6:.2f} MB/s  {self.num_tokens / seconds:,.0f} tokens/s"
        )
        if self.total_bytes is None:
            return rates
        share = min(self.read_bytes / self.total_bytes, 1.0)
        remaining = max(self.total_bytes - self.read_bytes, 0) / rate
        return f"{share:4.0%}  {rates}  ETA {_clock(remaining)}"

    def finish(self) -> None:
        seconds = time.monotonic() - self.start
        print(
            f"done: {self.num_documents:,} documents, {self.num_tokens:,} tokens, {self.read_bytes / 1e6:.1f} MB "
            f"in {_clock(seconds)} ({self.num_tokens / max(seconds, 1e-9):,.0f} tokens/s)",
            file=sys.stderr,
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _refuse_existing(prefixes: Iterable[str], overwrite: bool) -> None:
    everywhere = dict.fromkeys(one for prefix in prefixes for one in (prefix, mask_prefix(prefix)))
    paths = [f"{prefix}{suffix}" for prefix in everywhere for suffix in (".bin", ".idx")]
    existing = ", ".join(path for path in paths if os.path.exists(path))
    if existing and not overwrite:
        raise FileExistsError(f"output exists: {existing}; give another --output-prefix, or --overwrite to replace it")


def _check_keys_fit_format(config: PreprocessConfig, files: list[Path]) -> None:
    if config.json_keys == ("text",):
        return
    text_files = [path for path in files if holds_json_lines(path, config.input_format) is False]
    if text_files:
        raise ValueError(
            f"--json-keys {' '.join(config.json_keys)} has no meaning for plain text such as {text_files[0]}; "
            f"leave it out, or say --input-format jsonl"
        )


@dataclass(frozen=True, kw_only=True)
class PreprocessFlags:
    """Tokenize JSONL or plain text into .bin/.idx files for --data-path."""

    input: tuple[str, ...]
    """files, pipes, quoted patterns or folders, also .gz"""

    output_prefix: str
    """output is PREFIX_KEY_document.bin and .idx"""

    tokenizer_type: TokenizerType = DataConfig.tokenizer_type
    tokenizer_model: str | None = None
    """folder (Hugging Face) or .model file (SentencePiece)"""

    vocab_size: int | None = None
    """number of ids, for NullTokenizer"""

    json_keys: tuple[str, ...] = ("text",)
    """keys to tokenize, each into files of its own"""

    chat: bool = False
    """lines hold conversations, {"messages": [{"role": "user", "content": "..."}, ...]}: the loss is on the answers
    alone; output is PREFIX_messages_document.bin, .idx, .mask.bin and .mask.idx"""

    chat_template: Path | None = None
    """Jinja template, with --chat; default: the tokenizer's"""

    append_eod: bool = False
    """end every document with the end-of-document id"""

    input_format: InputFormat = "auto"
    """default: by content"""

    split_by: SplitBy = "file"
    """documents in a text file"""

    workers: int = 1
    """processes that tokenize"""

    overwrite: bool = False
    """replace existing output"""

    log_interval_sec: float = 5.0
    """seconds between progress lines"""


def build_parser() -> Parser:
    return parser_of(PreprocessFlags, "preprocess_data.py")


def preprocess_config(flags: PreprocessFlags) -> PreprocessConfig:
    """What the flags say. Raises ValueError or OSError."""
    return PreprocessConfig(
        input=flags.input,
        output_prefix=flags.output_prefix,
        data=DataConfig(
            tokenizer_type=flags.tokenizer_type, tokenizer_model=flags.tokenizer_model, vocab_size=flags.vocab_size
        ),
        json_keys=flags.json_keys,
        append_eod=flags.append_eod,
        chat=flags.chat,
        chat_template=None if flags.chat_template is None else read_chat_template(flags.chat_template),
        input_format=flags.input_format,
        split_by=flags.split_by,
        workers=flags.workers,
        overwrite=flags.overwrite,
        log_interval_sec=flags.log_interval_sec,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit status."""
    flags = parse_flags(build_parser(), PreprocessFlags, argv)
    # These become exceptions, so that temporary files are removed; nohup has SIGHUP ignored, and it stays so.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        results = preprocess(preprocess_config(flags))
    except OSError as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    for result in results:
        skipped = f" ({result.num_skipped:,} empty ones skipped)" if result.num_skipped else ""
        answers = "" if result.num_answer_tokens is None else f", {result.num_answer_tokens:,} of them answers'"
        print(f"{result.prefix}: {result.num_documents:,} documents{skipped}, {result.num_tokens:,} tokens{answers}")
    return 0


def run() -> int:
    """The console command `early-exit-preprocess`."""
    return run_program(main)
