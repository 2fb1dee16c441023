"""The command `sweep`: thresholds x exits, draft exits x draft lengths and certified levels, each against the full
model in the same run."""

from __future__ import annotations

import argparse
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


def add_command(commands: Commands) -> None:
    parser = add_parser(
        commands, "sweep", "speed against quality of many settings",
        "Answer prompts with many settings of early exit and self-speculation, each against the full model in the same "
        "run: how fast, how many of its tokens the full model would have taken at their place, how many answers are "
        "the full model's.",
    )  # fmt: skip
    add_prompt_flags(parser, default_prompts=16)
    add_answer_flags(parser)
    add_grid_flags(parser, (0.95, 0.9, 0.8, 0.6), "both", "all", ("2", "4", "8", "adaptive"))
    add_timing_flags(parser, batches=(1,), rounds=3)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    answers, settings, grid = answers_of(args), comparison_settings(args), grid_of(args)
    from megatron.early_exit.evaluation.comparison import compare
    from megatron.early_exit.evaluation.rows import names_of, table, write_csv
    from megatron.early_exit.evaluation.variants import variants_of
    from megatron.early_exit.platform.machine import machine_info

    machine = machine_info()
    llm, loaded = load_for(args, max(settings.batches))
    with llm:
        variants = variants_of(grid, answers, llm.engine.checks)
        if len(variants) == 1:
            raise ValueError(
                "there is nothing to compare with the full model: give --thresholds, --certified or --draft-lengths"
                if llm.exits.exit_layer_nums else "the model has no exits: there is nothing to compare"
            )  # fmt: skip
        prompts = load_prompts(args, llm.tokenizer, llm.engine.description, args.answer_tokens, max(settings.batches))
        found = compare(llm, prompts.prompts, variants, settings, show_progress)
        print(table(found.rows))
        if args.csv is not None:
            write_csv(found.rows, args.csv)
            print(f"\nwrote {args.csv}")
        results = {"rows": found.rows, "per_prompt": found.per_prompt, "prompts": names_of(prompts.prompts)}
        finish(args, loaded, settings_of(args, grid, settings), results, data=prompts.data, machine=machine)
