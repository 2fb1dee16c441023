"""Exits added to our checkpoints and taken away: add-exits, remove-exits."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron.early_exit.checkpoint.commands.common import add_source, add_target, read, save

if TYPE_CHECKING:
    from megatron.early_exit.config.exits import ExitConfig

_PARTS = {
    "untie_exit_output_weights": "output projections of their own",
    "use_exit_norm": "a norm before the output projection",
    "use_exit_mlp": "through an MLP branch",
    "use_exit_block": "through one more transformer layer",
}
"""Settings of heads, in words."""


def _truth(word: str) -> bool:
    if word not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return word == "true"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = commands.add_parser("add-exits", help="add early exits, ready to be tuned")
    add_source(one)
    add_target(one, "--save", with_dtype=False)
    add_exit_flags(one)
    one.add_argument("--seed", type=int, default=1234, help="of --init random")
    one.set_defaults(run=add)

    one = commands.add_parser("remove-exits", help="take exits away")
    add_source(one)
    add_target(one, "--save", with_dtype=False)
    one.add_argument("--exit-layer-nums", type=int, nargs="+", metavar="N", help="default: all")
    one.set_defaults(run=remove)


def add_exit_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup, is_required: bool = True) -> None:
    """Flags of the exits that are added, which `wanted_exits` reads. is_required: whether there must be one."""
    parser.add_argument(
        "--exit-layer-nums", type=int, nargs="+", required=is_required, metavar="N", help="layers, from 1"
    )
    parser.add_argument("--pre-exit", action="store_true", help="exits read the input of their layers")
    for name, text in _PARTS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=_truth, nargs="*", metavar="{true,false}",
            help=f"{text}; true or false for each exit, alone: for all",
        )  # fmt: skip
    parser.add_argument(
        "--exit-uses", choices=("leave", "draft", "both"), nargs="+", default=[], metavar="{leave,draft,both}",
        help="what decoding may do with them, for all or for each; default both",
    )  # fmt: skip
    parser.add_argument(
        "--init", choices=("copy", "random"), default="copy", help="of the model's own parts; default copy"
    )
    parser.add_argument("--replace", action="store_true", help="start exits that are there anew")


def wanted_exits(args: argparse.Namespace) -> ExitConfig:
    """The exits that the flags ask for."""
    from megatron.early_exit.config.exits import ExitConfig

    layers = args.exit_layer_nums
    order = sorted(range(len(layers)), key=layers.__getitem__)
    in_order = lambda values: tuple(values[i] for i in order) if len(values) == len(order) else tuple(values)
    given = {name: values for name in _PARTS if (values := getattr(args, name)) is not None}
    parts: dict[str, Any] = {name: in_order(values or [True]) for name, values in given.items()}
    return ExitConfig(
        exit_layer_nums=in_order(layers),
        pre_exit=args.pre_exit,
        exit_uses=in_order(args.exit_uses),
        **parts,
    )


def add(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.exits import add_exits

    description, tensors, _ = read(args)
    tensors, exits = add_exits(
        tensors, description.model, description.exits, wanted_exits(args), init=args.init, replace_present=args.replace,
        seed=args.seed,
    )  # fmt: skip
    save(args, replace(description, exits=exits), tensors)


def remove(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.exits import remove_exits

    description, tensors, _ = read(args)
    layers = None if args.exit_layer_nums is None else tuple(args.exit_layer_nums)
    tensors, exits = remove_exits(tensors, description.exits, layers)
    save(args, replace(description, exits=exits), tensors)
