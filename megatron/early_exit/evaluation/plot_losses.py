"""The program behind `tools/plot_losses.py`: the loss curves of one or more runs as a picture.

python tools/plot_losses.py runs/demo/checkpoints/metrics.jsonl --output losses.png
python tools/plot_losses.py early_exit=a/metrics.jsonl plain=b/metrics.jsonl --kind valid --output compare.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron.early_exit.evaluation.loss_curves import draw_loss_curves
from megatron.early_exit.platform.command_line import run_program
from megatron.early_exit.platform.program_flags import Parser, Spelling, parse_flags, parser_of


@dataclass(frozen=True, kw_only=True)
class PlotFlags:
    """Draw the loss curves of one or more runs."""

    runs: Annotated[tuple[str, ...], "[NAME=]FILE", Spelling(is_positional=True)]
    """metrics.jsonl of a run"""

    output: str = "losses.png"
    """picture to write; the suffix says the format"""

    kind: Literal["train", "valid"] = "train"


def build_parser() -> Parser:
    return parser_of(PlotFlags, "plot_losses.py")


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    flags = parse_flags(parser, PlotFlags, argv)
    runs = []
    for run in flags.runs:
        name, _, path = run.rpartition("=")
        if not Path(path).exists() or Path(path).is_dir():  # a pipe is read as well
            parser.error(f"{path}: no such file")
        runs.append((name or Path(path).parent.name, path))
    try:
        draw_loss_curves(runs, flags.output, flags.kind)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {flags.output}")


def run() -> int:
    """The console command `early-exit-plot-losses`."""
    return run_program(main)
