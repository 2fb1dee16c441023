"""The command `report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.report.folder import PAGE, write_report

if TYPE_CHECKING:
    from megatron.early_exit.evaluation.commands.common import Commands


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "report", help="a page of all results, with tables and plots",
        description=f"Make one page, {PAGE}, and the plots apart as PNG files, of result documents. The page needs "
        "nothing else: it can be sent, printed and read offline. Plots of an earlier page in the same folder are "
        "removed.",
    )  # fmt: skip
    parser.add_argument(
        "--load", nargs="+", default=[], metavar="[NAME=]DIR",
        help="folders of checkpoints whose results to take; several models need names to tell them apart",
    )  # fmt: skip
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="[NAME=]FILE",
        help="result documents, or folders of them",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="folder of the page; default: evaluation/report in the checkpoint's folder",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from megatron.early_exit.evaluation.report.page import report
    from megatron.early_exit.evaluation.report.sources import evaluated_models

    if not args.load and not args.results:
        raise ValueError("nothing to report on: give --load CHECKPOINTS or --results FILE ...")
    folder = _check_output(args)
    made = report(evaluated_models(args.load, args.results))
    page = write_report(made, folder)
    size = page.stat().st_size
    print(f"wrote {page} ({size / 1024:,.0f} KiB) and {len(made.pictures)} plots beside it")


def _check_output(args: argparse.Namespace) -> Path:
    from megatron.early_exit.config.checks.files import unwritable

    folder = args.output or _default_output(args)
    problem = unwritable(folder, is_folder=True)
    if problem:
        raise ValueError(f"--output {folder}: {problem}")
    return folder


def _default_output(args: argparse.Namespace) -> Path:
    from megatron.early_exit.evaluation.report.sources import results_folder, split_name

    if len(args.load) != 1 or args.results:
        raise ValueError("give --output DIR: there is no one checkpoint beside which the report could lie")
    return results_folder(split_name(args.load[0])[1]) / "report"
