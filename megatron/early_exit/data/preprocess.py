"""Text to token files: JSONL or plain text becomes core's `.bin` (token ids) and `.idx` (where each document lies).

Run as `tools/preprocess_data.py`. Files appear under their final names only when they are complete.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.early_exit.config.data import DataConfig, TokenizerType
from megatron.early_exit.data.chat_template import read_chat_template
from megatron.early_exit.data.documents import (
    InputFormat,
    SplitBy,
    file_bytes,
    find_input_files,
    holds_json_lines,
    read_documents,
)
from megatron.early_exit.data.encoding import MARKS, MESSAGES, build_encoder, chunks_of, encode_all
from megatron.early_exit.data.loss_masks import HAS_LOSS, mask_prefix
from megatron.early_exit.data.preprocess_config import PreprocessConfig
from megatron.early_exit.data.preprocess_progress import Progress
from megatron.early_exit.data.token_file_writer import PreprocessResult, naming, partial_outputs, remove_left_behind
from megatron.early_exit.data.tokenizer import build_tokenizer
from megatron.early_exit.platform.command_line import run_program
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.platform.program_flags import Parser, parse_flags, parser_of


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
    with naming(Path(config.output_prefix).parent):
        Path(config.output_prefix).parent.mkdir(parents=True, exist_ok=True)
        for prefix in prefixes.values():
            remove_left_behind(prefix)

    documents = (doc for path in files for doc in read_documents(path, config.input_format, config.split_by))
    known_sizes = [size for path in files if (size := file_bytes(path)) is not None]
    progress = Progress(sum(known_sizes) if len(known_sizes) == len(files) else None, config.log_interval_sec)
    with partial_outputs(prefixes, tokenizer.vocab_size) as writers:
        num_answer_tokens = 0
        for chunk in encode_all(chunks_of(documents), config, encoder):
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
