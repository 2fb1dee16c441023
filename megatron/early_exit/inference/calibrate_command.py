"""The program behind `tools/calibrate_exits.py`: run a model over text and keep what its exits predict."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from megatron.early_exit.platform.command_line import add_verbose_flag, show_progress
from megatron.early_exit.platform.failures import in_words

_MAX_COUNTED = 50_000_000
"""Tokens of the corpus that are counted for the shortlist."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calibrate_exits.py",
        description="Count the frequent tokens of a corpus and measure how confident and how right a model's exits "
        "are on it. The result lies in the checkpoint's folder: tools/generate.py then evaluates exits for frequent "
        "tokens first, and can plan which exits to evaluate (--plan-exits).",
    )
    parser.add_argument("--load", required=True, metavar="DIR", help="folder of checkpoints (--save of the training)")
    parser.add_argument("--load-iteration", type=int, help="checkpoint; default: the last one")
    parser.add_argument("--data-path", required=True, metavar="PREFIX", help="PREFIX.bin and PREFIX.idx of the corpus")
    parser.add_argument("--shortlist-size", type=int, metavar="N", help="default: a sixth of the vocabulary")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="to run the exits over; default 8192")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="default: 256, or what the model takes")
    add_verbose_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for bad settings."""
    args = build_parser().parse_args(argv)
    try:
        calibrate(args)
    except BrokenPipeError:  # the reader of the output has ended: `run_program` deals with it
        raise
    except (ValueError, OSError) as error:
        print(f"calibrate_exits.py: {in_words(error)}", file=sys.stderr)
        return 2
    return 0


def calibrate(args: argparse.Namespace) -> None:
    """Raises ValueError for settings that do not fit, OSError for files that cannot be read."""
    from megatron.early_exit.config.serialize import checkpoint_folder, read_description
    from megatron.early_exit.data.text_samples import documents_of, sample_sequences, sequence_length
    from megatron.early_exit.inference.calibration import (
        CALIBRATION_FILE,
        ExitCalibration,
        frequent_tokens,
        observations,
    )
    from megatron.early_exit.inference.llm import LLM
    from megatron.early_exit.inference.report import aligned
    from megatron.early_exit.platform.world import check_world_size

    check_world_size(1)
    if args.tokens < 2:
        raise ValueError(f"--tokens is {args.tokens}; it must be at least 2")
    folder = checkpoint_folder(args.load, args.load_iteration)
    description = read_description(folder)
    if not description.exits.exit_layer_nums:
        raise ValueError(f"the model in {args.load} has no exits to calibrate")
    length = sequence_length(args.sequence_length, description.max_position_embeddings)
    llm = LLM.load(args.load, iteration=args.load_iteration, max_requests=1, max_length=length, shortlist=False)
    model = llm.engine.description
    size = max(model.vocab_size // 6, 1) if args.shortlist_size is None else args.shortlist_size
    if not 1 <= size <= model.vocab_size:
        raise ValueError(f"--shortlist-size is {size}; the vocabulary has {model.vocab_size} ids")

    sequences = sample_sequences(args.data_path, model.vocab_size, args.tokens, length)
    counts = np.zeros(model.vocab_size, dtype=np.int64)
    for tokens in documents_of(args.data_path, model.vocab_size):
        counts += np.bincount(tokens, minlength=model.vocab_size)
        if counts.sum() > _MAX_COUNTED:
            break
    shortlist, coverage = frequent_tokens(counts, size)
    progress, results = show_progress("sequences"), []
    for number, tokens in enumerate(sequences):
        results += [result.check() for result in llm.score([tokens])]
        progress(number + 1, len(sequences))
    confidences, agrees = observations(results)
    layers = tuple(one.layer_number for one in model.exits)
    calibration = ExitCalibration(shortlist, coverage, layers, confidences, agrees)
    calibration.save(folder)
    print(f"\n{len(shortlist)} frequent tokens cover {coverage:.2%} of {counts.sum():,} counted")
    print(f"exits on {len(confidences):,} tokens:\n{aligned(calibration.table())}\nwrote {folder / CALIBRATION_FILE}")
