"""The command `benchmark`: how fast modes are at several batch sizes, and where a step of the full model goes."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.commands.common import add_parser, finish
from megatron.early_exit.evaluation.commands.comparing import (
    add_answer_flags,
    add_grid_flags,
    add_timing_flags,
    answers_of,
    comparison_settings,
    grid_of,
    load_for,
    settings_of,
)
from megatron.early_exit.evaluation.prompt_flags import add_prompt_flags, load_prompts
from megatron.early_exit.platform.command_line import show_progress

if TYPE_CHECKING:
    from megatron.early_exit.evaluation.commands.common import Commands
    from megatron.early_exit.evaluation.decoding import Way
    from megatron.early_exit.inference.engine_loading import LoadedEngine
    from megatron.early_exit.inference.llm import LLM

TRANSFORMERS = "transformers"


def add_command(commands: Commands) -> None:
    parser = add_parser(
        commands, "benchmark", "speed of modes at several batch sizes",
        "Answer prompts in all modes at several batch sizes, in turn: tokens a second of decoding against our full "
        "model in the same run, with an interval, beside what the layer runs would allow; time of the first token and "
        "between tokens; and where a step of the full model goes.",
    )  # fmt: skip
    add_prompt_flags(parser, default_prompts=8)
    add_answer_flags(parser)
    add_grid_flags(parser, (0.8,), "together", "the first", ("adaptive",))
    add_timing_flags(parser, batches=(1, 4, 16, 32), rounds=5)
    beside = parser.add_argument_group("beside ours")
    beside.add_argument(
        "--transformers", type=Path, metavar="DIR",
        help="the same model as transformers loads it: its speed, greedily, and at batch 1 with drafts from the prompt",
    )  # fmt: skip
    beside.add_argument(
        "--prompt-lookup", type=int, default=10, metavar="N",
        help="tokens that transformers drafts from the prompt at once; default 10",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    answers, settings = answers_of(args), comparison_settings(args)
    from megatron.early_exit.evaluation.comparison import compare
    from megatron.early_exit.evaluation.rows import names_of, table, write_csv
    from megatron.early_exit.evaluation.step_parts import step_parts, step_table
    from megatron.early_exit.evaluation.variants import FULL, variants_of
    from megatron.early_exit.platform.machine import machine_info

    machine = machine_info()
    llm, loaded = load_for(args, max(settings.batches))
    with llm:
        if args.draft_exits is None:
            args.draft_exits = list(llm.exits.drafting_layers[:1])
        grid = grid_of(args)
        variants = variants_of(grid, answers, llm.engine.checks)
        prompts = load_prompts(args, llm.tokenizer, llm.engine.description, args.answer_tokens, max(settings.batches))
        beside = _beside(args, llm, loaded)
        found = compare(llm, prompts.prompts, variants, settings, show_progress, beside)
        of_full = [one for one in found.per_prompt if one["name"] == FULL]
        # Greedy tokens alone, as `answers` wants them, may cost less.
        costs = llm.engine.measure_costs().for_tokens(of_drafts=False, of_probed=False, of_final=not answers.log_probs)
        parts = step_parts(of_full, costs, llm.engine.description.num_layers)
        rows = sorted([*found.rows, *found.beside], key=lambda row: row["batch"])
        print(table(rows))
        if parts:
            print(f"\nwhere a step of the full model goes (the fastest that was seen):\n{step_table(parts)}")
        if args.csv is not None:
            write_csv(rows, args.csv)
            print(f"\nwrote {args.csv}")
        results = {
            "rows": found.rows,
            "per_prompt": found.per_prompt,
            "prompts": names_of(prompts.prompts),
            "transformers": next((row for row in found.beside if row["name"] == TRANSFORMERS), None),
            "beside": found.beside,
            "step": parts,
        }
        finish(args, loaded, settings_of(args, grid, settings), results, data=prompts.data, machine=machine)


def _beside(args: argparse.Namespace, llm: LLM, loaded: LoadedEngine) -> Callable[[int], Mapping[str, Way]]:
    """What transformers does at a batch size: nothing without --transformers."""
    if args.transformers is None:
        return lambda batch: {}
    if args.prompt_lookup < 1:
        raise ValueError(f"--prompt-lookup is {args.prompt_lookup}; it must be at least 1")
    from megatron.early_exit.evaluation.transformers_models import TransformersModel

    ends = () if args.ignore_eod else llm.engine.ends
    model = TransformersModel(args.transformers, loaded.checkpoint.dtype, ends, llm.engine.description.vocab_size)
    plain = functools.partial(model.decode, num_tokens=args.answer_tokens)
    drafting = functools.partial(plain, prompt_lookup_num_tokens=args.prompt_lookup)
    # transformers drafts for one prompt at a time.
    return lambda batch: {TRANSFORMERS: plain} | ({f"{TRANSFORMERS}, prompt lookup": drafting} if batch == 1 else {})
