"""Draw the loss curves of one or more runs.

python tools/plot_losses.py runs/demo/checkpoints/metrics.jsonl --output losses.png
python tools/plot_losses.py early_exit=a/metrics.jsonl plain=b/metrics.jsonl --kind valid --output compare.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron.early_exit.evaluation.loss_curves import draw_loss_curves
from megatron.early_exit.platform.command_line import add_verbose_flag, run_program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FILE", help="metrics.jsonl of a run")
    parser.add_argument("--output", default="losses.png", help="picture to write; the suffix says the format")
    parser.add_argument("--kind", default="train", choices=["train", "valid"])
    add_verbose_flag(parser)
    arguments = parser.parse_args()
    runs = []
    for run in arguments.runs:
        name, _, path = run.rpartition("=")
        if not Path(path).exists() or Path(path).is_dir():
            parser.error(f"{path}: no such file")
        runs.append((name or Path(path).parent.name, path))
    try:
        draw_loss_curves(runs, arguments.output, arguments.kind)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    sys.exit(run_program(main))
