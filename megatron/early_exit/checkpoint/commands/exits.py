"""Exits added to our checkpoints and taken away: add-exits, remove-exits."""

from __future__ import annotations

import argparse
from dataclasses import replace

from megatron.early_exit.checkpoint.commands.common import add_source, add_target, read, save


def add_commands(commands: argparse._SubParsersAction) -> None:
    one = commands.add_parser("add-exits", help="add early exits, ready to be tuned")
    add_source(one)
    add_target(one, "--save", with_dtype=False)
    one.add_argument("--exit-layer-nums", type=int, nargs="+", required=True, metavar="N", help="layers, from 1")
    one.add_argument("--pre-exit", action="store_true", help="exits read the input of their layers")
    one.add_argument("--untie-exit-output-weights", action="store_true", help="output projections of their own")
    one.add_argument("--use-exit-norm", action="store_true", help="a norm before the output projection")
    one.add_argument("--use-exit-mlp", action="store_true", help="through an MLP branch")
    one.add_argument("--use-exit-block", action="store_true", help="through one more transformer layer")
    one.add_argument(
        "--init", choices=("copy", "random"), default="copy", help="of the model's own parts; default copy"
    )
    one.add_argument("--replace", action="store_true", help="start exits that are there anew")
    one.add_argument("--seed", type=int, default=1234, help="of --init random")
    one.set_defaults(run=add)

    one = commands.add_parser("remove-exits", help="take exits away")
    add_source(one)
    add_target(one, "--save", with_dtype=False)
    one.add_argument("--exit-layer-nums", type=int, nargs="+", metavar="N", help="default: all")
    one.set_defaults(run=remove)


def add(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.exits import add_exits
    from megatron.early_exit.config.exits import ExitConfig

    description, tensors, _ = read(args)
    wanted = ExitConfig(
        exit_layer_nums=tuple(sorted(args.exit_layer_nums)),
        pre_exit=args.pre_exit,
        untie_exit_output_weights=args.untie_exit_output_weights,
        use_exit_norm=args.use_exit_norm,
        use_exit_mlp=args.use_exit_mlp,
        use_exit_block=args.use_exit_block,
    )
    tensors, exits = add_exits(
        tensors, description.model, description.exits, wanted, init=args.init, replace_present=args.replace,
        seed=args.seed,
    )  # fmt: skip
    save(args, replace(description, exits=exits), tensors)


def remove(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.exits import remove_exits

    description, tensors, _ = read(args)
    layers = None if args.exit_layer_nums is None else tuple(args.exit_layer_nums)
    tensors, exits = remove_exits(tensors, description.exits, layers)
    save(args, replace(description, exits=exits), tensors)
