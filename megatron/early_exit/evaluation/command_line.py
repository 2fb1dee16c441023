"""The program behind `tools/evaluate.py` (console command `early-exit-evaluate`): what exits are worth, thresholds with
a guarantee, speed against quality, standard benchmarks, and a report of it all.

The commands are in `commands/`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron.early_exit.evaluation.commands import (
    benchmark,
    calibrate,
    correctness,
    exits,
    probes,
    report,
    sweep,
    tasks,
)
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.platform.command_line import add_verbose_flag, run_program
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.platform.world import check_world_size

_COMMANDS = (exits, probes, calibrate, sweep, correctness, benchmark, tasks, report)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Say what the exits of a model are worth. Each command prints tables and writes one JSON document, "
        "by default beside the checkpoint's weights; `report` makes a page of these documents.",
    )
    add_verbose_flag(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a worker failed, 2 for what cannot be evaluated."""
    args = build_parser().parse_args(argv)
    try:
        if "load" in args:  # before the model's files are looked at
            check_world_size(1)
        return args.run(args) or 0
    except BrokenPipeError:  # the reader of the output has ended: `run_program` deals with it
        raise
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {in_words(error)}", file=sys.stderr)
        return 2
    except ExecutorError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1


def run() -> int:
    """The console command."""
    return run_program(main)
