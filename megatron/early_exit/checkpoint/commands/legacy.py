"""From checkpoints of the original EE-LLM: from-legacy."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.early_exit.checkpoint.commands.common import (
    add_source,
    add_target,
    describe,
    listed,
    progress_shown,
    save,
)

if TYPE_CHECKING:
    from megatron.early_exit.checkpoint.tensors import Tensors
    from megatron.early_exit.config.data import TokenizerConfig
    from megatron.early_exit.config.description import ModelDescription


def add_commands(commands: argparse._SubParsersAction) -> None:
    one = commands.add_parser("from-legacy", help="a checkpoint of the original EE-LLM -> ours")
    add_source(one)
    add_target(one, "--save")
    one.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="for --load of partial tuning (--tune-exit-pipeline-parallel-size): the whole model that it was tuned "
        "from, a checkpoint of the original EE-LLM or one of ours; it gives what is missing",
    )
    tokenizer = "tokenizer that the model was trained with; default: what the checkpoint names"
    one.add_argument("--tokenizer-type", help=tokenizer)
    one.add_argument("--tokenizer-model", metavar="PATH", help="its folder or file")
    one.add_argument("--vocab-size", type=int, help="with --tokenizer-type NullTokenizer")
    one.set_defaults(run=from_legacy)


def from_legacy(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.legacy import find_legacy, read_legacy
    from megatron.early_exit.checkpoint.store import check_target

    check_target(args.save, args.force)
    folder = find_legacy(args.load, args.load_iteration)
    if args.base is not None:
        _merge_legacy(args, folder)
        return
    model, exits, tensors, theirs = read_legacy(folder)
    save(args, describe(args, model, exits, _legacy_tokenizer(args, theirs), tensors), tensors)


def _merge_legacy(args: argparse.Namespace, folder: Path) -> None:
    from megatron.early_exit.checkpoint.legacy import read_partial
    from megatron.early_exit.checkpoint.legacy_merge import merge_partial

    partial = read_partial(folder)
    description, tensors = _read_base(args, partial.settings)
    with progress_shown("compared") as progress:
        merged = merge_partial(partial, description, tensors, progress)
    for layers, why in merged.left_out:
        print(f"no exits at layers {listed(layers)}: {why}", file=sys.stderr)
    save(args, merged.description, merged.tensors)


def _read_base(args: argparse.Namespace, settings: argparse.Namespace) -> tuple[ModelDescription, Tensors]:
    """The model of --base with the tokenizer of the flags, else its own. settings: of the checkpoint it is for, whose
    tokenizer is that of a legacy base."""
    from megatron.early_exit.checkpoint.legacy import find_legacy, holds_legacy, read_legacy
    from megatron.early_exit.checkpoint.store import checkpoint_folder, read_checkpoint
    from megatron.early_exit.config.validate import LATEST_FILE

    if holds_legacy(args.base):
        model, exits, tensors, _ = read_legacy(find_legacy(args.base))
        return describe(args, model, exits, _legacy_tokenizer(args, settings), tensors), tensors
    if not (args.base / LATEST_FILE).is_file():
        raise FileNotFoundError(f"--base {args.base} holds no checkpoint, of EE-LLM or ours")
    description, tensors = read_checkpoint(checkpoint_folder(args.base))
    if args.tokenizer_type or args.tokenizer_model:
        description = replace(description, tokenizer=_legacy_tokenizer(args, settings))
    return description, tensors


def _legacy_tokenizer(args: argparse.Namespace, theirs: argparse.Namespace) -> TokenizerConfig:
    from megatron.early_exit.config.data import TokenizerConfig

    kind = args.tokenizer_type or getattr(theirs, "tokenizer_type", None)
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
