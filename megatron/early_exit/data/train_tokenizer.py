"""Trains a byte-level BPE tokenizer on text or JSONL files and writes it as a Hugging Face folder.

Run as `tools/train_tokenizer.py`. Byte-level: every text can be encoded, there is no unknown token.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.early_exit.data.documents import (
    InputFormat,
    SplitBy,
    document_texts,
    find_input_files,
    read_documents,
)
from megatron.early_exit.platform.command_line import run_program
from megatron.early_exit.platform.program_flags import Parser, parse_flags, parser_of

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB_SIZE = 257  # 256 bytes and the end of text


def train_tokenizer(
    inputs: Sequence[str],
    output: str | Path,
    vocab_size: int,
    *,
    json_keys: Sequence[str] = ("text",),
    input_format: InputFormat = "auto",
    split_by: SplitBy = "file",
    overwrite: bool = False,
    show_progress: bool = False,
) -> int:
    """Train on `inputs` (files, glob patterns, folders) and write the folder `output`; returns the number of ids.

    Id 0 is `<|endoftext|>`, the end of document. A small corpus can give fewer ids than `vocab_size`. Raises ValueError
    for bad input or a vocabulary below 257, FileExistsError if `output` has files and `overwrite` is not set.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    output = Path(output)
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise ValueError(f"--vocab-size {vocab_size} is below {SMALLEST_VOCAB_SIZE}: 256 bytes and {END_OF_TEXT}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise FileExistsError(f"--output {output} exists and is not empty; choose another folder, or --overwrite")
    files = find_input_files(inputs)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # Sorted, and given whole: ids of bytes then depend neither on the corpus nor on the run.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(_texts(files, json_keys, input_format, split_by), trainer)
    _write_folder(tokenizer.to_str(pretty=True), output)
    return tokenizer.get_vocab_size()


def _texts(files: list[Path], json_keys: Sequence[str], input_format: InputFormat, split_by: SplitBy) -> Iterator[str]:
    num_texts = 0
    for path in files:
        for document in read_documents(path, input_format, split_by):
            for text in document_texts(document, json_keys).values():
                num_texts += bool(text)
                yield text
    if not num_texts:
        raise ValueError(f"no text in the input: {', '.join(map(str, files[:5]))}")


def _write_folder(tokenizer_json: str, output: Path) -> None:
    """Write what `transformers.AutoTokenizer` reads.

    By hand, because new releases of transformers save a class name that old ones do not know.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }
    files = {
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps({"eos_token": END_OF_TEXT}, indent=2) + "\n",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        output.mkdir(exist_ok=True)
        for name in files:
            os.replace(temporary / name, output / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerFlags:
    """Train a byte-level BPE tokenizer and write it as a Hugging Face folder."""

    input: tuple[str, ...]
    """files, pipes, quoted patterns or folders, also .gz"""

    output: str
    """folder to write, for --tokenizer-model"""

    vocab_size: int
    """number of ids, at least 257"""

    json_keys: tuple[str, ...] = ("text",)
    """keys of the JSON objects to train on"""

    input_format: InputFormat = "auto"
    """default: by content"""

    split_by: SplitBy = "file"
    """documents in a text file"""

    overwrite: bool = False
    """replace files in the output folder"""


def build_parser() -> Parser:
    return parser_of(TrainTokenizerFlags, "train_tokenizer.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit status."""
    flags = parse_flags(build_parser(), TrainTokenizerFlags, argv)
    try:
        got = train_tokenizer(
            flags.input,
            flags.output,
            flags.vocab_size,
            json_keys=flags.json_keys,
            input_format=flags.input_format,
            split_by=flags.split_by,
            overwrite=flags.overwrite,
            show_progress=sys.stderr.isatty(),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    if got < flags.vocab_size:
        print(
            f"warning: the corpus gave {got} of {flags.vocab_size} ids; use more text or a smaller --vocab-size",
            file=sys.stderr,
        )
    print(f"{got} ids, {END_OF_TEXT} ends documents")
    return 0


def run() -> int:
    """The console command `early-exit-train-tokenizer`."""
    return run_program(main)
