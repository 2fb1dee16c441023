"""The program behind `tools/evaluate_exits.py`: the exits of one or several checkpoints, side by side."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.early_exit.platform.command_line import add_verbose_flag, show_progress
from megatron.early_exit.platform.failures import in_words

if TYPE_CHECKING:
    from megatron.early_exit.inference.params import GenerationParams

_PROMPT_LENGTH = 32
"""Tokens that answers are decoded from."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate_exits.py",
        description="Loss and accuracy of every exit on a text, how often it says what the final head says, and with "
        "--thresholds what early exit brings: speed, layers saved, how many tokens the full model would have taken at "
        "their place, and the perplexity of the answers under the full model.",
    )
    parser.add_argument("--load", required=True, nargs="+", metavar="DIR", help="folders of checkpoints to compare")
    parser.add_argument("--load-iteration", type=int, help="checkpoint of each; default: the last one")
    parser.add_argument("--data-path", required=True, metavar="PREFIX", help="text: PREFIX.bin and PREFIX.idx")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="of the text; default 4096")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="default: 256, or what the model takes")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[], metavar="F", help="decode with these")
    parser.add_argument("--prompts", type=int, default=6, metavar="N", help="to decode from; default 6")
    parser.add_argument("--answer-tokens", type=int, default=48, metavar="N", help="of each answer; default 48")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: that of the training")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers as JSON")
    add_verbose_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for bad settings."""
    args = build_parser().parse_args(argv)
    try:
        _check_output(args.output)
        lengths = [check(args, path) for path in args.load]  # all of them before the first is loaded
        results = [evaluate(args, path, *one) for path, one in zip(args.load, lengths, strict=True)]
    except BrokenPipeError:  # the reader of the output has ended: `run_program` deals with it
        raise
    except (ValueError, OSError) as error:
        print(f"evaluate_exits.py: {in_words(error)}", file=sys.stderr)
        return 2
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwrote {args.output}")
    return 0


def _check_output(path: Path | None) -> None:
    """Raise ValueError before anything is computed if the results could not be written."""
    from megatron.early_exit.config.validate import unwritable

    problem = None if path is None else unwritable(path, is_folder=False)
    if problem:
        raise ValueError(f"--output {path}: {problem}")


def check(args: argparse.Namespace, path: str) -> tuple[int, int]:
    """(tokens of a sampled sequence, longest sequence that the evaluation needs). Loads no weights.

    Raises ValueError or OSError for what could not be evaluated."""
    from megatron.early_exit.config.serialize import checkpoint_folder, read_description
    from megatron.early_exit.data.text_samples import sequence_length
    from megatron.early_exit.data.token_files import check_token_file
    from megatron.early_exit.platform.world import check_world_size

    check_world_size(1)
    if args.tokens < 2 or args.prompts < 1 or args.answer_tokens < 2:
        raise ValueError("--tokens and --answer-tokens must be at least 2, --prompts at least 1")
    description = read_description(checkpoint_folder(path, args.load_iteration))
    longest = description.max_position_embeddings
    length = sequence_length(args.sequence_length, longest)
    needed = max(length, _PROMPT_LENGTH + args.answer_tokens) if args.thresholds else length
    if needed > longest:
        raise ValueError(
            f"decoding needs prompts of {_PROMPT_LENGTH} tokens and room for --answer-tokens {args.answer_tokens}; the "
            f"model takes {longest}"
        )
    for one in _decoding_settings(args).values():
        one.exit_policy(description.exits)
    check_token_file(args.data_path)
    return length, needed


def _decoding_settings(args: argparse.Namespace) -> dict[str, GenerationParams]:
    """The ways of decoding that are compared, by name; the full model is the first."""
    from megatron.early_exit.inference.params import GenerationParams

    common = {"max_tokens": args.answer_tokens, "ignore_eod": True}
    return {"full": GenerationParams(**common)} | {
        f"threshold {value:g}": GenerationParams(**common, mode="early_exit", exit_thresholds=(value,))
        for value in args.thresholds
    }


def evaluate(args: argparse.Namespace, path: str, length: int, needed: int) -> dict[str, Any]:
    """Print and return what the exits of one checkpoint do. `length` and `needed` are those of `check`.

    Raises ValueError or OSError."""
    from megatron.early_exit.data.text_samples import sample_sequences
    from megatron.early_exit.evaluation.exit_quality import decoding_quality, exit_quality
    from megatron.early_exit.inference.llm import LLM
    from megatron.early_exit.inference.report import aligned

    llm = LLM.load(path, iteration=args.load_iteration, max_requests=1, max_length=needed, dtype=args.dtype)
    sequences = sample_sequences(args.data_path, llm.engine.description.vocab_size, args.tokens, length)
    heads = exit_quality(llm, sequences, show_progress("text"))
    rows = [("head", "loss", "perplexity", "accuracy", "agreement", "confidence")]
    for head in heads:
        name = "final" if head.is_final else f"exit {head.layer}"
        share = lambda value: f"{value:.1%}"
        rows.append((
            name, f"{head.loss:.3f}", f"{math.exp(min(head.loss, 50)):.1f}", share(head.accuracy),
            share(head.agreement), share(head.confidence),
        ))  # fmt: skip
    num_tokens = sum(map(len, sequences))
    print(f"\n{path}: {num_tokens:,} tokens of {args.data_path}\n{aligned(rows)}")
    result: dict[str, Any] = {
        "load": path,
        "data_path": args.data_path,
        "tokens": num_tokens,
        "heads": [asdict(head) for head in heads],
    }
    if not args.thresholds:
        return result
    prompts = [one[:_PROMPT_LENGTH] for one in sequences if len(one) >= _PROMPT_LENGTH][: args.prompts]
    if not prompts:
        raise ValueError(
            f"decoding needs prompts of {_PROMPT_LENGTH} tokens: no sampled sequence of {args.data_path} is so long; "
            "raise --sequence-length or --tokens, or choose another text"
        )
    ways = decoding_quality(llm, prompts, _decoding_settings(args), show_progress("answers"))
    rows = [("decoding", "tokens/s", "speed", "layer runs saved", "agreement", "perplexity")]
    for way in ways:
        rows.append((
            way.name, f"{way.tokens_per_second:.1f}", f"{way.tokens_per_second / ways[0].tokens_per_second:.2f}x",
            f"{way.runs_saved:.1%}", f"{way.agreement:.1%}", f"{way.perplexity:.2f}",
        ))  # fmt: skip
    print(f"\n{aligned(rows)}")
    return result | {"decoding": [asdict(way) for way in ways]}
