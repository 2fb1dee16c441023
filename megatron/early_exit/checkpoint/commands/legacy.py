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
    add_tokenizer,
    describe,
    listed,
    progress_shown,
    save,
    tokenizer_of,
)

if TYPE_CHECKING:
    from megatron.early_exit.checkpoint.tensors import Tensors
    from megatron.early_exit.config.description import ModelDescription


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    add_tokenizer(one)
    one.set_defaults(run=from_legacy)


def from_legacy(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.legacy import read_legacy
    from megatron.early_exit.checkpoint.legacy_files import find_legacy
    from megatron.early_exit.checkpoint.writing import check_target

    check_target(args.save, args.force)
    folder = find_legacy(args.load, args.load_iteration)
    if args.base is not None:
        _merge_legacy(args, folder)
        return
    model, exits, tensors, theirs = read_legacy(folder)
    save(args, describe(args, model, exits, tokenizer_of(args, theirs), tensors), tensors)


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
    from megatron.early_exit.checkpoint.legacy import read_legacy
    from megatron.early_exit.checkpoint.legacy_files import find_legacy, holds_legacy
    from megatron.early_exit.checkpoint.store import read_checkpoint
    from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
    from megatron.early_exit.config.checkpoint_files import names_latest

    if holds_legacy(args.base):
        model, exits, tensors, _ = read_legacy(find_legacy(args.base))
        return describe(args, model, exits, tokenizer_of(args, settings), tensors), tensors
    if not names_latest(args.base):
        raise FileNotFoundError(f"--base {args.base} holds no checkpoint, of EE-LLM or ours")
    description, tensors = read_checkpoint(checkpoint_folder(args.base, flag="--base"))
    if args.tokenizer_type or args.tokenizer_model:
        description = replace(description, tokenizer=tokenizer_of(args, settings))
    return description, tensors
