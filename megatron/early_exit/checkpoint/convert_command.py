"""The program behind `tools/convert_checkpoint.py`: from and to other formats, exits added and removed.

The commands are in `commands/`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron.early_exit.checkpoint.commands import exits, hugging_face, inspection, legacy, megatron
from megatron.early_exit.platform.command_line import add_verbose_flag, run_program


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description="Convert checkpoints, add early exits to them and look into them. Tensors pass one by one, so that "
        "a model need not fit into memory, and no GPU is needed. Our checkpoints load under any tensor, pipeline and "
        "data parallel size.",
    )
    add_verbose_flag(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (hugging_face, legacy, megatron, exits, inspection):
        module.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for what cannot be converted, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except BrokenPipeError:  # the reader of the output has ended: `run_program` deals with it
        raise
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_checkpoint.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def run() -> int:
    """The console command `early-exit-convert`."""
    return run_program(main)
