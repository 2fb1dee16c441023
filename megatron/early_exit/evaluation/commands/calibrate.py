"""The command `calibrate`."""

from __future__ import annotations

import argparse

from megatron.early_exit.evaluation.commands.common import add_parser


def add_command(commands: argparse._SubParsersAction) -> None:
    add_parser(commands, "calibrate", "thresholds with a guarantee", "Certify exit thresholds.").set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    raise ValueError("not there yet")
