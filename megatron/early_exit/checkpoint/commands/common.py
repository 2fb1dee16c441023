"""What the commands of `tools/convert_checkpoint.py` share: flags, reading, saving, words."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.early_exit.checkpoint.tensors import Tensors
    from megatron.early_exit.config.data import TokenizerConfig
    from megatron.early_exit.config.description import ModelDescription
    from megatron.early_exit.config.exits import ExitConfig
    from megatron.early_exit.config.model import ModelConfig
    from megatron.early_exit.config.optimization import Dtype

DTYPES = ("fp32", "bf16", "fp16")

_SECONDS_BETWEEN_LINES = 30.0
"""Of progress, where it does not go to a terminal."""


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--load-iteration", type=int, metavar="N", help="default: the last one")


def add_target(parser: argparse.ArgumentParser, flag: str, with_dtype: bool = True) -> None:
    parser.add_argument(flag, type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    if with_dtype:
        parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as they are")


def add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-comparison",
        action="store_true",
        help="do not compare what was written with what it was written from (weights, logits, tokenizer)",
    )


def add_vocabulary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, metavar="N", help="pad the vocabulary for so many ranks"
    )
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="times the ranks")


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    tokenizer = "tokenizer that the model was trained with; default: what the checkpoint names"
    parser.add_argument("--tokenizer-type", help=tokenizer)
    parser.add_argument("--tokenizer-model", metavar="PATH", help="its folder or file")
    parser.add_argument("--vocab-size", type=int, help="with --tokenizer-type NullTokenizer")


def read(args: argparse.Namespace) -> tuple[ModelDescription, Tensors, Path]:
    from megatron.early_exit.checkpoint.legacy_files import holds_legacy
    from megatron.early_exit.checkpoint.store import read_checkpoint
    from megatron.early_exit.checkpoint.writing import check_target
    from megatron.early_exit.config.checkpoint_choice import checkpoint_folder

    if hasattr(args, "save"):
        check_target(args.save, args.force)
    if holds_legacy(args.load):
        raise ValueError(
            f"{args.load} is a checkpoint of Megatron-LM or the original EE-LLM (mp_rank_*); convert it first with "
            "from-megatron or from-legacy"
        )
    folder = checkpoint_folder(args.load, args.load_iteration)
    description, tensors = read_checkpoint(folder)
    return description, tensors, folder


def save(
    args: argparse.Namespace,
    description: ModelDescription,
    tensors: Tensors,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint as the flags say. check: see `write_checkpoint`."""
    from megatron.early_exit.checkpoint.parameters import check_parameters
    from megatron.early_exit.checkpoint.vocabulary import pad_vocabulary
    from megatron.early_exit.checkpoint.writing import write_checkpoint
    from megatron.early_exit.data.tokenizer import build_tokenizer

    if args.save.is_file():
        raise FileExistsError(f"{args.save} is a file; give a folder")
    num_ids, rows = build_tokenizer(description.tokenizer).vocab_size, description.padded_vocab_size
    if num_ids > rows:
        raise ValueError(
            f"the tokenizer has {num_ids} ids, but the model's embedding has {rows} rows: it is that of another "
            "model; take the one that the model was trained with"
        )
    dtype = getattr(args, "dtype", None)
    tensors = in_dtype(pad_vocabulary(tensors, rows), dtype)
    description = replace(description, dtype=dtype or description.dtype)
    check_parameters(tensors, description.model, description.exits)
    with progress_shown("written") as progress:
        folder = write_checkpoint(args.save, description, tensors, check=check, force=args.force, progress=progress)
    exits = description.exits
    what = f"exits at layers {listed(exits.exit_layer_nums)}" if exits.num_exits else "no exits"
    print(f"{folder}: {description.model.num_layers} layers, {what}")


def padded_rows(args: argparse.Namespace, tensors: Tensors) -> int:
    """Rows of the vocabulary for the ranks that the flags name."""
    from megatron.early_exit.checkpoint.vocabulary import vocabulary_rows

    multiple = getattr(args, "make_vocab_size_divisible_by", 128) * getattr(args, "tensor_model_parallel_size", 1)
    if multiple < 1:
        raise ValueError(
            f"--make-vocab-size-divisible-by {args.make_vocab_size_divisible_by} and --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} must be at least 1"
        )
    return -(-vocabulary_rows(tensors) // multiple) * multiple


def tokenizer_of(args: argparse.Namespace, theirs: argparse.Namespace) -> TokenizerConfig:
    """The tokenizer of the flags, else the one that the settings `theirs` of a Megatron checkpoint name.

    Raises ValueError if it is not here."""
    from megatron.early_exit.config.data import TokenizerConfig

    kind: Any = args.tokenizer_type or getattr(theirs, "tokenizer_type", None)
    path = args.tokenizer_model or getattr(theirs, "tokenizer_model", None)
    size = args.vocab_size or getattr(theirs, "vocab_size", None)
    if kind == "NullTokenizer":
        return TokenizerConfig(kind, vocab_size=size)
    if path is None or not Path(path).exists():
        raise ValueError(
            f"the checkpoint names the tokenizer {kind} {path}, which is not here; give --tokenizer-type and "
            "--tokenizer-model (or --tokenizer-type NullTokenizer --vocab-size N for a model of bare numbers)"
        )
    return TokenizerConfig(kind, str(path))


def describe(
    args: argparse.Namespace, model: ModelConfig, exits: ExitConfig, tokenizer: TokenizerConfig, tensors: Tensors
) -> ModelDescription:
    """The description of a model of another format; its vocabulary is padded as the flags say if it is not yet."""
    import torch

    from megatron.early_exit.config.description import ModelDescription

    if model.padded_vocab_size is None:
        model = replace(model, padded_vocab_size=padded_rows(args, tensors))
    names: dict[torch.dtype, Dtype] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return ModelDescription(model, exits, tokenizer, names.get(next(iter(tensors.values())).dtype, "fp32"))


def in_dtype(tensors: Tensors, name: str | None) -> Tensors:
    """All in the type that --dtype names, or as they are."""
    import torch

    if name is None:
        return tensors
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@contextmanager
def progress_shown(what: str) -> Iterator[Callable[[int, int], None]]:
    """A line that grows on a terminal; elsewhere, of what takes long, a line now and then."""
    is_terminal, shown, shown_at = sys.stderr.isatty(), False, time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown, shown_at
        if not is_terminal and time.monotonic() - shown_at < _SECONDS_BETWEEN_LINES:
            return
        shown, shown_at = True, time.monotonic()
        text = f"{what} {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB"
        print(text, end="\r" if is_terminal else "\n", file=sys.stderr, flush=True)

    yield show
    if shown and is_terminal:
        print(file=sys.stderr)


def show_notes(notes: Sequence[str]) -> None:
    """Lines on what is not as a user might think."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
