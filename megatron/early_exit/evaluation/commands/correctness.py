"""The command `correctness`: what must not change an answer, token by token."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.early_exit.evaluation.commands.common import add_parser, finish
from megatron.early_exit.evaluation.commands.comparing import add_answer_flags, answers_of, load_for
from megatron.early_exit.evaluation.prompt_flags import add_prompt_flags, load_prompts, prompt_length
from megatron.early_exit.platform.command_line import show_progress

if TYPE_CHECKING:
    import torch

    from megatron.early_exit.evaluation.commands.common import Commands
    from megatron.early_exit.evaluation.correctness import CorrectnessCheck, Difference, Outcome
    from megatron.early_exit.evaluation.transformers_models import TransformersModel
    from megatron.early_exit.inference.llm import LLM

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}
"""Nats between two tokens that rounding may swap; weights in int8 round as bf16 does."""

_SHOWN = 5
"""Differences of a row that are printed."""


def add_command(commands: Commands) -> None:
    parser = add_parser(
        commands, "correctness", "whether lossless ways to decode give the full model's answers",
        "Answer prompts in all ways that must give the full model's answers (other batches, prompts in pieces, "
        "self-speculation with every exit, sampling with a seed), compare every token of early exit with the head that "
        "gave it, and say where answers part, with how far apart the tokens are for the full model. Exit status 1 if "
        "something differs by more than rounding.",
    )  # fmt: skip
    add_prompt_flags(parser, default_prompts=16)
    add_answer_flags(parser, default_tokens=48)
    group = parser.add_argument_group("comparison")
    group.add_argument("--batch", type=int, default=8, metavar="N", help="prompts answered at once; default 8")
    group.add_argument(
        "--temperature", type=float, default=0.8, metavar="F", help="of the answers that are sampled; default 0.8"
    )
    group.add_argument(
        "--hf", type=Path, metavar="DIR", help="the same model as transformers loads it: compare its answers too"
    )
    group.add_argument(
        "--tolerance", type=float, metavar="F",
        help="nats between two tokens that rounding may swap; default 0.001 in fp32, 0.25 in bf16 and int8",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    answers = answers_of(args)
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; it must be at least 1")
    if args.temperature <= 0 or (args.tolerance is not None and args.tolerance < 0):
        raise ValueError("--temperature must be above 0, and --tolerance 0 or more")
    from megatron.early_exit.evaluation.correctness import check_all
    from megatron.early_exit.platform.machine import machine_info

    machine = machine_info()
    llm, loaded = load_for(args, args.batch)
    with llm:
        checkpoint = loaded.checkpoint
        dtype = "bfloat16" if checkpoint.config.quantize == "all" else str(checkpoint.dtype).removeprefix("torch.")
        tolerance = TOLERANCES.get(dtype, TOLERANCES["bfloat16"]) if args.tolerance is None else args.tolerance
        prompts = load_prompts(args, llm.tokenizer, llm.engine.description, args.answer_tokens)
        theirs = None if args.hf is None else _transformers(args, llm, checkpoint.dtype)
        check, outcomes = check_all(llm, prompts.prompts, answers, args.batch, args.temperature, show_progress("ways"))
        if theirs is not None:
            outcomes.append(_compared(args, check, theirs))
        rows = [outcome.row(tolerance) for outcome in outcomes]
        print(_text(outcomes, rows, tolerance, args.hf))
        settings = {
            "batch": args.batch, "temperature": args.temperature, "tolerance": tolerance,
            "answer_tokens": args.answer_tokens, "ignore_eod": args.ignore_eod, "seed": args.seed,
            "prompt_length": prompt_length(args) if args.data_path else None,
        }  # fmt: skip
        finish(args, loaded, settings, {"rows": rows}, data=prompts.data, machine=machine)
    return int(any(row["errors"] for row in rows))


def _transformers(args: argparse.Namespace, llm: LLM, dtype: torch.dtype) -> TransformersModel:
    from megatron.early_exit.evaluation.transformers_models import TransformersModel

    ends = () if args.ignore_eod else llm.engine.ends
    return TransformersModel(args.hf, dtype, ends, llm.engine.description.vocab_size)


def _compared(args: argparse.Namespace, check: CorrectnessCheck, theirs: TransformersModel) -> Outcome:
    """Their greedy answers, one prompt after the other, beside ours."""
    progress = show_progress("transformers")
    answers: list[tuple[int, ...]] = []
    for number, prompt in enumerate(check.prompts, start=1):
        answers += theirs.answers([prompt.ids], args.answer_tokens)
        progress(number, len(check.prompts))
    return check.compare("transformers", "transformers", answers)


def _text(outcomes: Sequence[Outcome], rows: Sequence[dict[str, Any]], tolerance: float, hf: Path | None) -> str:
    from megatron.early_exit.platform.columns import aligned

    table = [("way", "prompts", "identical", "tokens", "largest gap", "verdict")]
    details = []
    for outcome, row in zip(outcomes, rows, strict=True):
        gaps = [one.gap for one in outcome.differences if one.gap is not None and not one.is_explained]
        verdict = f"{row['errors']} ERRORS" if row["errors"] else "rounding" if gaps else "same"
        if not row["errors"] and any(one.is_explained for one in outcome.differences):
            verdict = "same until an exit was taken"
        table.append((
            outcome.name, str(row["prompts"]), str(row["identical"]), str(row["tokens"]),
            f"{max(gaps):.2g}" if gaps else "-", verdict,
        ))  # fmt: skip
        details += [
            f"{outcome.name}: {one.prompt}, token {one.position}: expected {one.expected}, got {one.got}, " + _gap(one)
            for one in outcome.differences[:_SHOWN]
        ]
    lines = [aligned(table), *(["", *details] if details else [])]
    lines.append(f"\ngap: nats between the expected token and the one that came; up to {tolerance:g} is rounding")
    if hf is None:
        lines.append("transformers: not compared; give --hf DIR with the same model as transformers loads it")
    return "\n".join(lines)


def _gap(one: Difference) -> str:
    if one.gap is None:
        return "one answer ended before the other"
    return f"gap {one.gap:.2g} (the two best are {one.margin:.2g} apart)" + ", after an exit" * one.is_explained
