"""The command `probes`: small networks that decide in place of exits' heads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron.early_exit.evaluation.commands.common import add_parser, finish, load
from megatron.early_exit.evaluation.prompt_flags import add_prompt_flags, load_prompts
from megatron.early_exit.platform.command_line import show_progress

if TYPE_CHECKING:
    from megatron.early_exit.evaluation.commands.common import Commands


def add_command(commands: Commands) -> None:
    parser = add_parser(
        commands, "probes", "small networks that decide before exits' heads",
        "Let the full model answer prompts, and train for each exit a small network that says from the hidden states "
        "whether the exit's token is the final head's. The probes lie in the checkpoint's folder, in place of those "
        "that are there. Afterwards: calibrate --exit-score probe, generate.py --exit-score probe.",
    )  # fmt: skip
    add_prompt_flags(parser, default_prompts=500)
    probes = parser.add_argument_group("probes")
    probes.add_argument("--answer-tokens", type=int, default=64, metavar="N", help="of each answer; default 64")
    probes.add_argument("--ignore-eod", action="store_true", help="answers go on behind what ends them")
    probes.add_argument("--width", type=int, default=64, metavar="N", help="of the hidden layer; default 64")
    probes.add_argument(
        "--max-epochs", type=int, default=60, metavar="N",
        help="of training; it ends before, when the loss on the held-out prompts falls no more; default 60",
    )  # fmt: skip
    probes.add_argument(
        "--patience", type=int, default=6, metavar="N", help="epochs without a better held-out loss; default 6"
    )
    probes.add_argument(
        "--held-out", type=float, default=0.2, metavar="F", help="share of the prompts that say when; default 0.2"
    )
    probes.add_argument(
        "--early-exit-share", type=float, default=0.3, metavar="F",
        help="share of the prompts that early exit answers in place of the full model, so that probes learn from what "
        "comes behind its errors as well; default 0.3",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from megatron.early_exit.config.checkpoint_files import PROBES_FILE
    from megatron.early_exit.evaluation.probes import ProbeSettings, train_probes
    from megatron.early_exit.platform.machine import machine_info

    names = ("answer_tokens", "ignore_eod", "width", "max_epochs", "patience", "held_out", "early_exit_share", "seed")
    settings = ProbeSettings(**{name: getattr(args, name) for name in names})
    machine = machine_info()
    llm, loaded = load(args)
    with llm:
        prompts = load_prompts(args, llm.tokenizer, llm.engine.description, settings.answer_tokens)
        probes, results = train_probes(llm, loaded, prompts, settings, show_progress)
    probes.save(loaded.checkpoint.folder)
    print(f"\n{_table(results['exits'])}\n\nwrote {loaded.checkpoint.folder / PROBES_FILE}")
    described = asdict(settings) | {"prompts": len(prompts.prompts), "prompt_length": args.prompt_length}
    finish(args, loaded, described, results | {"digest": probes.digest}, data=prompts.data, machine=machine)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    from megatron.early_exit.platform.columns import aligned

    risks = list(rows[0]["probe"]["leaving"])
    lines = [("held-out decisions", "agreement", "AUROC", "ECE", *(f"leave at {float(one):.0%}" for one in risks))]
    for row in rows:
        for name in ("head", "probe"):
            of_score = row[name]
            quality = "-" if of_score["auroc"] is None else f"{of_score['auroc']:.3f}"
            leaving = (f"{of_score['leaving'][one]:.1%}" for one in risks)
            words = f"exit {row['layer']}, {name}"
            lines.append((words, f"{row['agreement']:.1%}", quality, f"{of_score['ece']:.3f}", *leaving))
    return aligned(lines)
