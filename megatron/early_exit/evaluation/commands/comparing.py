"""What `sweep` and `benchmark` share: the flags of the grid and of timing, the model that holds the batches."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.early_exit.evaluation.commands.common import load

if TYPE_CHECKING:
    from megatron.early_exit.evaluation.comparison import ComparisonSettings
    from megatron.early_exit.evaluation.variants import Grid
    from megatron.early_exit.inference.engine_loading import LoadedEngine
    from megatron.early_exit.inference.llm import LLM
    from megatron.early_exit.inference.params import GenerationParams

ADAPTIVE = "adaptive"


def add_answer_flags(parser: argparse.ArgumentParser, default_tokens: int = 64) -> None:
    """What is answered."""
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--answer-tokens", type=int, default=default_tokens, metavar="N", help=f"of each; default {default_tokens}"
    )
    answers.add_argument("--ignore-eod", action="store_true", help="answers go on behind what ends them")


def add_grid_flags(
    parser: argparse.ArgumentParser, thresholds: Sequence[float], exits: str, draft_exits: str, lengths: Sequence[str]
) -> None:
    """What is compared, with these defaults."""
    grid = parser.add_argument_group("ways to decode, beside the full model (give a flag without values for none)")
    words = lambda values: " ".join(map(str, values))
    grid.add_argument(
        "--thresholds", type=float, nargs="*", default=list(thresholds), metavar="F",
        help=f"of early exit; default {words(thresholds)}",
    )  # fmt: skip
    grid.add_argument(
        "--exits", choices=("together", "each", "both"), default=exits,
        help=f"try thresholds on all exits together, on each by itself, or both; default {exits}",
    )  # fmt: skip
    grid.add_argument(
        "--certified", type=float, nargs="*", metavar="F",
        help="certified levels; default: all whose certificates are for answers like these",
    )  # fmt: skip
    grid.add_argument(
        "--draft-exits", type=int, nargs="*", metavar="N", help=f"of self-speculation; default: {draft_exits}"
    )
    grid.add_argument(
        "--draft-lengths", type=_draft_length, nargs="*", default=[_draft_length(one) for one in lengths], metavar="N",
        help=f"tokens to draft at once, or {ADAPTIVE}; default {words(lengths)}",
    )  # fmt: skip
    grid.add_argument(
        "--draft-sources", choices=("exit", "ngram", "both"), nargs="+", default=["exit"], metavar="SOURCE",
        help="what drafts: exit (each of --draft-exits), ngram (what followed the last tokens before), both (whichever "
        "promises more); default exit",
    )  # fmt: skip


def add_timing_flags(parser: argparse.ArgumentParser, batches: Sequence[int], rounds: int) -> None:
    """How it is measured, with these defaults."""
    timing = parser.add_argument_group("timing")
    timing.add_argument(
        "--batch", type=int, nargs="+", default=list(batches), metavar="N",
        help=f"prompts that are answered at once; default {' '.join(map(str, batches))}",
    )  # fmt: skip
    timing.add_argument(
        "--rounds", type=int, default=rounds, metavar="N",
        help=f"times that all prompts are answered in all ways, in turn; default {rounds}",
    )  # fmt: skip
    timing.add_argument("--csv", type=Path, metavar="FILE", help="write the rows as CSV as well")


def _draft_length(text: str) -> int | None:
    if text == ADAPTIVE:
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {ADAPTIVE!r}") from None


def answers_of(args: argparse.Namespace) -> GenerationParams:
    """Tokens alone, as most users ask for them. Raises ValueError for a length that is none."""
    from megatron.early_exit.inference.params import GenerationParams

    if args.answer_tokens < 2:
        raise ValueError(f"--answer-tokens is {args.answer_tokens}; it must be at least 2")
    return GenerationParams(max_tokens=args.answer_tokens, ignore_eod=args.ignore_eod, log_probs=False)


def comparison_settings(args: argparse.Namespace) -> ComparisonSettings:
    """Raises ValueError for numbers that are none, and if --csv could not be written."""
    from megatron.early_exit.config.checks.files import unwritable
    from megatron.early_exit.evaluation.comparison import ComparisonSettings

    if min(args.batch) < 1 or args.rounds < 1:
        raise ValueError(f"--batch ({' '.join(map(str, args.batch))}) and --rounds ({args.rounds}) must be at least 1")
    problem = None if args.csv is None else unwritable(args.csv, is_folder=False)
    if problem:
        raise ValueError(f"--csv {args.csv}: {problem}")
    num_prompts = args.default_prompts if args.prompts is None else args.prompts
    return ComparisonSettings(tuple(sorted(set(args.batch))), args.rounds, num_prompts, args.seed)


def grid_of(args: argparse.Namespace) -> Grid:
    from megatron.early_exit.evaluation.variants import Grid

    once = lambda values: tuple(dict.fromkeys(values))
    return Grid(
        thresholds=once(args.thresholds),
        exits=args.exits,
        certified=None if args.certified is None else once(args.certified),
        draft_exits=None if args.draft_exits is None else once(args.draft_exits),
        draft_lengths=once(args.draft_lengths),
        draft_sources=once(args.draft_sources),
    )


def load_for(args: argparse.Namespace, most_at_once: int, **overrides: Any) -> tuple[LLM, LoadedEngine]:
    """A model with room for so many requests at once. Raises ValueError if it has not; OSError."""
    if args.max_requests is not None and args.max_requests < most_at_once:
        raise ValueError(f"--max-requests is {args.max_requests}, but {most_at_once} prompts are answered at once")
    llm, loaded = load(args, **{"max_requests": args.max_requests or most_at_once, **_max_length(args)} | overrides)
    num_slots = llm.engine.description.num_slots
    if num_slots < most_at_once:
        llm.close()
        raise ValueError(
            f"{most_at_once} prompts are to be answered at once, but memory for keys and values holds {num_slots} of "
            f"{llm.engine.description.num_positions} tokens; see --max-length and --kv-cache-gib"
        )
    return llm, loaded


def _max_length(args: argparse.Namespace) -> dict[str, int]:
    """Prompts from documents have one length: keys and values need no more room."""
    from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
    from megatron.early_exit.config.saved_description import read_description
    from megatron.early_exit.evaluation.prompt_flags import prompt_length

    if args.max_length is not None or not args.data_path:
        return {}
    longest = read_description(checkpoint_folder(args.load, args.load_iteration)).max_position_embeddings
    return {"max_length": max(min(prompt_length(args) + args.answer_tokens - 1, longest), 1)}


def settings_of(args: argparse.Namespace, *parts: Any) -> dict[str, Any]:
    """Those of the document, from dataclasses and the flags of prompts."""
    from megatron.early_exit.evaluation.prompt_flags import prompt_length

    merged: dict[str, Any] = {}
    for part in parts:
        merged |= asdict(part)
    of_prompts = {"prompt_length": prompt_length(args) if args.data_path else None, "seed": args.seed}
    return {**merged, **of_prompts, "answer_tokens": args.answer_tokens, "ignore_eod": args.ignore_eod}
