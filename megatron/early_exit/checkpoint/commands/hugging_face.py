"""From and to models of Hugging Face transformers: from-hf, to-hf."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.early_exit.checkpoint.commands.common import (
    add_source,
    add_target,
    add_vocabulary,
    describe,
    dtype_of,
    listed,
    progress_shown,
    read,
    save,
    show_notes,
)

if TYPE_CHECKING:
    from megatron.early_exit.config.description import ModelDescription


def add_commands(commands: argparse._SubParsersAction) -> None:
    one = commands.add_parser("from-hf", help="a model of Hugging Face transformers -> ours")
    one.add_argument("--input", type=Path, required=True, metavar="DIR", help="local folder, or a GGUF file")
    add_target(one, "--save")
    add_vocabulary(one)
    one.add_argument("--max-position-embeddings", type=int, metavar="N", help="longest sequence; default: the model's")
    one.set_defaults(run=from_hugging_face)

    one = commands.add_parser("to-hf", help="ours -> a model of Hugging Face transformers")
    add_source(one)
    add_target(one, "--output")
    one.add_argument(
        "--with-exits",
        action="store_true",
        help="write the exits too, with a class (trust_remote_code) that uses them",
    )
    one.set_defaults(run=to_hugging_face)


def from_hugging_face(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.hugging_face import read_hugging_face
    from megatron.early_exit.checkpoint.store import check_target
    from megatron.early_exit.config.data import TokenizerConfig

    check_target(args.save, args.force)
    source = read_hugging_face(args.input, args.max_position_embeddings)
    show_notes(source.notes)
    with _tokenizer_folder(args.input, source.config) as folder:
        tokenizer = TokenizerConfig("HuggingFaceTokenizer", str(folder))
        save(args, describe(args, source.model, source.exits, tokenizer, source.tensors), source.tensors)


def to_hugging_face(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.hugging_face import write_hugging_face
    from megatron.early_exit.checkpoint.store import TOKENIZER_FOLDER

    description, tensors, folder = read(args)
    tokenizer = folder / TOKENIZER_FOLDER
    with progress_shown("written") as progress:
        model_type = write_hugging_face(
            args.output,
            description.model,
            tensors,
            exits=description.exits if args.with_exits else None,
            tokenizer=tokenizer if tokenizer.is_dir() else None,
            **_ids_of(tokenizer, description),
            dtype=dtype_of(args.dtype),
            force=args.force,
            progress=progress,
        )
    exits = ""
    if description.exits.num_exits:
        exits = f", {'with' if args.with_exits else 'without'} its exits ({listed(description.exits.exit_layer_nums)})"
    print(f"{args.output}: a {model_type} of transformers{exits}")


def _ids_of(tokenizer: Path, description: ModelDescription) -> dict[str, Any]:
    """What `write_hugging_face` must be told of the ids of a model that did not come from transformers."""
    from megatron.early_exit.data.tokenizer import load_tokenizer

    if (tokenizer / "config.json").is_file():
        return {}  # it says
    if not tokenizer.is_dir():
        return {"vocab_size": description.padded_vocab_size}
    own = load_tokenizer(tokenizer)
    return {
        "vocab_size": own.vocab_size,
        "special_ids": {"eos_token_id": own.eod, "bos_token_id": own.bos, "pad_token_id": None},
    }


@contextmanager
def _tokenizer_folder(path: Path, their_config: Any) -> Iterator[Path]:
    """A folder with the tokenizer's files; of a GGUF file, made for the while."""
    from megatron.early_exit.checkpoint.hugging_face import tokenizer_files
    from megatron.early_exit.data.tokenizer import MODEL_FILES

    if path.is_dir() and any(file.name not in MODEL_FILES for file in tokenizer_files(path)):
        yield path
        return
    from transformers import AutoTokenizer

    files = [path] if path.is_file() else list(path.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{path} holds no tokenizer (tokenizer.json or tokenizer.model); copy it there")
    folder, name = files[0].parent, files[0].name
    with tempfile.TemporaryDirectory() as temporary:
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(temporary)
        their_config.quantization_config = None
        their_config.save_pretrained(temporary)
        yield Path(temporary)
