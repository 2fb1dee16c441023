"""The command `calibrate`: records of all exits along the full model's answers, and thresholds that are certified on
them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron.early_exit.evaluation.commands.common import add_parser, finish, load
from megatron.early_exit.evaluation.prompt_flags import add_prompt_flags, load_prompts
from megatron.early_exit.platform.command_line import show_progress

if TYPE_CHECKING:
    from megatron.early_exit.evaluation.calibration import Calibration
    from megatron.early_exit.evaluation.calibration_settings import CalibrationSettings
    from megatron.early_exit.evaluation.commands.common import Commands
    from megatron.early_exit.evaluation.prompts import PromptSet
    from megatron.early_exit.inference.engine_loading import LoadedEngine
    from megatron.early_exit.inference.llm import LLM


def add_command(commands: Commands) -> None:
    parser = add_parser(
        commands, "calibrate", "thresholds with a guarantee",
        "Let the full model answer prompts while every exit is evaluated, and certify thresholds on what they say: "
        "averaged over prompts like these, at least --levels of all decisions are the full model's. The records and "
        "the certificates lie in the checkpoint's folder; an interrupted calibration goes on where it was. Afterwards: "
        "generate.py --certified 0.99, exit_thresholds \"certified:0.99\".",
    )  # fmt: skip
    add_prompt_flags(parser, default_prompts=1000)
    certificate = parser.add_argument_group("certificate")
    certificate.add_argument(
        "--exit-score", choices=("head", "probe"), default="head",
        help="what thresholds are compared with: the probability of the exit's best token (head, default), or what the "
        "checkpoint's probes say (probe); prompts that they were trained on are left out",
    )  # fmt: skip
    certificate.add_argument("--answer-tokens", type=int, default=64, metavar="N", help="of each answer; default 64")
    certificate.add_argument("--ignore-eod", action="store_true", help="answers go on behind what ends them")
    certificate.add_argument(
        "--levels", type=float, nargs="+", default=[0.99], metavar="F", help="promises to certify; default 0.99"
    )
    certificate.add_argument(
        "--delta", type=float, default=0.05, metavar="F",
        help="probability that a promise is certified that does not hold, for each level; default 0.05",
    )  # fmt: skip
    certificate.add_argument(
        "--risk", choices=("A-max", "B", "C"), default="A-max",
        help="A-max: share of decisions at which an exit that may be taken differs (default). B: share of answers that "
        "differ. C: 1 - ROUGE-L of answers against the full model's",
    )  # fmt: skip
    certificate.add_argument(
        "--grid", type=float, nargs="+", metavar="F",
        help="thresholds for all exits alike, in place of those of a tuning split; default with B and C: 0.999 to "
        "0.5",
    )  # fmt: skip
    certificate.add_argument(
        "--free-running", action="store_true",
        help="certify what early exit itself generates as well, on prompts of its own; both share --delta",
    )  # fmt: skip
    certificate.add_argument(
        "--rounding-prompts", type=int, default=16, metavar="N",
        help="prompts that the full model answers again one by one, to see what rounding alone changes; default 16",
    )  # fmt: skip
    parser.add_argument_group("shortlist").add_argument(
        "--shortlist-size", type=int, metavar="N",
        help="with --data-path: count the corpus's N most frequent tokens, with which exits are evaluated first from "
        "then on (a sixth of the vocabulary is a good size); certificates of another shortlist, or of none, hold no "
        "more; default: the shortlist stays as it is",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from megatron.early_exit.config.checkpoint_files import CERTIFICATE_FILE
    from megatron.early_exit.platform.machine import machine_info

    settings, machine = settings_of(args), machine_info()
    settings.check_prompts(args.prompts or args.default_prompts)  # before the shortlist is written
    with _new_shortlist(args):
        loaded, prompts, found = _certify(args, settings)
    print(found.text())
    print(f"\nwrote {loaded.checkpoint.folder / CERTIFICATE_FILE}")
    finish(args, loaded, document_settings(args, settings), found.results, data=prompts.data, machine=machine)


def _certify(args: argparse.Namespace, settings: CalibrationSettings) -> tuple[LoadedEngine, PromptSet, Calibration]:
    """Calibrate, and write the certificates."""
    from megatron.early_exit.evaluation.calibration import calibrate
    from megatron.early_exit.inference.certificates import add_certificates

    llm, loaded = load(args)
    with llm:
        prompts = prompts_of(args, llm, loaded)
        settings.check_prompts(len(prompts.prompts))
        found = calibrate(llm, loaded, prompts, settings, show_progress)
    add_certificates(loaded.checkpoint.folder, found.certificates)
    return loaded, prompts, found


def prompts_of(args: argparse.Namespace, llm: LLM, loaded: LoadedEngine) -> PromptSet:
    """The prompts of the flags; none that probes were trained on whose scores are to be certified. Raises as
    `load_prompts`."""
    probes = loaded.checkpoint.probes if args.exit_score == "probe" else None
    seen = () if probes is None else probes.about.prompts
    return load_prompts(args, llm.tokenizer, llm.engine.description, args.answer_tokens, excluded=seen)


def settings_of(args: argparse.Namespace) -> CalibrationSettings:
    from megatron.early_exit.evaluation.calibration_settings import CalibrationSettings

    return CalibrationSettings(
        answer_tokens=args.answer_tokens, ignore_eod=args.ignore_eod, levels=tuple(sorted(set(args.levels))),
        delta=args.delta, risk=args.risk, grid=None if args.grid is None else tuple(args.grid),
        with_free_running=args.free_running, rounding_prompts=args.rounding_prompts, seed=args.seed,
        exit_score=args.exit_score,
    )  # fmt: skip


def document_settings(args: argparse.Namespace, settings: CalibrationSettings) -> dict[str, Any]:
    """The settings of the document."""
    from dataclasses import asdict

    return asdict(settings) | {"prompts": args.prompts, "prompt_length": args.prompt_length}


_MAX_COUNTED = 50_000_000
"""Tokens of the corpus that are counted for the shortlist."""


@contextmanager
def _new_shortlist(args: argparse.Namespace) -> Iterator[None]:
    """Write the corpus's frequent tokens, if they are to be counted; what was there comes back if the rest fails, or is
    interrupted: certificates depend on it.

    Raises ValueError or OSError if the corpus or the checkpoint cannot be read."""
    size = args.shortlist_size
    if size is None:
        yield
        return
    if not args.data_path:
        raise ValueError("--shortlist-size counts the tokens of a corpus; give --data-path")
    import numpy as np

    from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
    from megatron.early_exit.config.checkpoint_files import SHORTLIST_FILE
    from megatron.early_exit.config.saved_description import read_description
    from megatron.early_exit.data.text_samples import documents_of
    from megatron.early_exit.data.tokenizer import build_tokenizer
    from megatron.early_exit.inference.shortlist import Shortlist

    folder = checkpoint_folder(args.load, args.load_iteration)
    vocab_size = build_tokenizer(read_description(folder).tokenizer).vocab_size
    if not 1 <= size <= vocab_size:
        raise ValueError(f"--shortlist-size is {size}; the vocabulary has {vocab_size} ids")
    counts = np.zeros(vocab_size, dtype=np.int64)
    for prefix in args.data_path:
        for tokens in documents_of(prefix, vocab_size):
            counts += np.bincount(tokens, minlength=vocab_size)
            if counts.sum() > _MAX_COUNTED:
                break
    shortlist, path = Shortlist.of_counts(counts, size), folder / SHORTLIST_FILE
    before = path.read_bytes() if path.exists() else None
    shortlist.save(folder)
    print(f"{size} frequent tokens cover {shortlist.coverage:.2%} of {counts.sum():,} counted")
    try:
        yield
    except BaseException:
        path.unlink()
        if before is not None:
            path.write_bytes(before)
        raise
