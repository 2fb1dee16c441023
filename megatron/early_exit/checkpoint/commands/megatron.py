"""From and to checkpoints of Megatron-LM: from-megatron (Megatron-Bridge's too), to-megatron."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.early_exit.checkpoint.commands.common import (
    add_comparison,
    add_source,
    add_target,
    add_tokenizer,
    describe,
    in_dtype,
    listed,
    progress_shown,
    read,
    save,
    tokenizer_of,
)

if TYPE_CHECKING:
    from megatron.early_exit.config.data import TokenizerConfig


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = commands.add_parser("from-megatron", help="a GPT or Llama of Megatron-LM or Megatron-Bridge -> ours")
    add_source(one)
    add_target(one, "--save")
    add_tokenizer(one)
    add_comparison(one)
    one.set_defaults(run=from_megatron)

    one = commands.add_parser("to-megatron", help="ours, without exits -> a checkpoint of Megatron-LM (torch_dist)")
    add_source(one)
    add_target(one, "--output")
    add_comparison(one)
    one.set_defaults(run=to_megatron)


def from_megatron(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.comparison import compare_weights
    from megatron.early_exit.checkpoint.megatron import find_megatron, read_megatron
    from megatron.early_exit.checkpoint.store import read_checkpoint
    from megatron.early_exit.checkpoint.writing import check_target
    from megatron.early_exit.config.exits import ExitConfig

    check_target(args.save, args.force)
    folder = find_megatron(args.load, args.load_iteration)
    model, tensors, settings = read_megatron(folder)
    tokenizer = _tokenizer(args, settings, folder)

    def check(made: Path) -> None:
        compare_weights(read_checkpoint(made)[1], in_dtype(tensors, args.dtype))

    description = describe(args, model, ExitConfig(), tokenizer, tensors)
    save(args, description, tensors, None if args.skip_comparison else check)
    _say_whether_compared(args)


def _tokenizer(args: argparse.Namespace, settings: argparse.Namespace, folder: Path) -> TokenizerConfig:
    from megatron.early_exit.config.data import TokenizerConfig

    own = folder / "tokenizer"  # as Megatron-Bridge saves it
    if not (args.tokenizer_type or args.tokenizer_model) and (own / "tokenizer_config.json").is_file():
        return TokenizerConfig("HuggingFaceTokenizer", str(own))
    return tokenizer_of(args, settings)


def to_megatron(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.comparison import compare_weights
    from megatron.early_exit.checkpoint.megatron import read_megatron
    from megatron.early_exit.checkpoint.megatron_writing import check_target, write_megatron
    from megatron.early_exit.checkpoint.tensors import without_exits

    check_target(args.output, args.force)
    description, tensors, _ = read(args)
    exits = description.exits.exit_layer_nums
    if exits:
        print(
            f"the exits ({listed(exits)}) are left out: Megatron-LM has none. What is written is the whole model "
            "without them",
            file=sys.stderr,
        )
    tensors = in_dtype(without_exits(tensors), args.dtype)
    check = lambda made: compare_weights(read_megatron(made).tensors, tensors)
    with progress_shown("written") as progress:
        written = write_megatron(
            args.output, description, tensors, check=None if args.skip_comparison else check, force=args.force,
            progress=progress,
        )  # fmt: skip
    print(
        f"{written}: {description.model.num_layers} layers; Megatron-LM reads it with --load {args.output} "
        "--use-checkpoint-args --finetune"
    )
    _say_whether_compared(args)


def _say_whether_compared(args: argparse.Namespace) -> None:
    print("not compared with its source (--skip-comparison)" if args.skip_comparison else "compared: weights")
