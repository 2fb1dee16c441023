"""Documents to token ids, in chunks, in this process or several."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from megatron.early_exit.data.conversations import marked_conversation, messages_problem
from megatron.early_exit.data.documents import Document, document_texts
from megatron.early_exit.data.preprocess_config import PreprocessConfig
from megatron.early_exit.data.text_files import parse_json
from megatron.early_exit.data.tokenizer import Tokenizer, build_tokenizer
from megatron.early_exit.platform.processes import die_with_parent

# A chunk is what a worker gets at once: enough to hide the cost of sending it, little enough to keep progress smooth.
CHUNK_DOCUMENTS = 256
CHUNK_BYTES = 1 << 17

MESSAGES, MARKS = "messages", "marks"
"""Keys of conversations, and of what `loss_masks` says of their tokens."""

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class EncodedChunk(NamedTuple):
    """Token ids of the documents of one chunk, for each key; of conversations, their marks as another."""

    tokens: dict[str, np.ndarray]
    lengths: dict[str, list[int]]
    num_documents: int
    num_skipped: dict[str, int]
    read_bytes: int


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


def encode_all(chunks: Iterator[list[Document]], config: PreprocessConfig, encoder: Encoder) -> Iterator[EncodedChunk]:
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
