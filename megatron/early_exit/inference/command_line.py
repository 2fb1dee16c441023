"""The program behind `tools/generate.py`: prompts in, text and the exits that produced it out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.early_exit.inference.generate_flags import GenerateFlags, build_parser
from megatron.early_exit.inference.model_flags import check_torchrun, engine_settings
from megatron.early_exit.inference.prompt_input import prompts_of_file
from megatron.early_exit.platform.command_line import run_program
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.platform.program_flags import parse_flags
from megatron.early_exit.platform.world import world_size

# What needs core is imported in the functions: --help and wrong flags should not wait for it.
if TYPE_CHECKING:
    from megatron.early_exit.inference.llm import LLM
    from megatron.early_exit.inference.params import CertifiedThresholds, GenerationParams, Mode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns the exit status: 1 if a prompt was refused or a worker failed, 2 for bad settings.

    In a process of torchrun whose rank is not 0, serve rank 0 until it ends."""
    from megatron.early_exit.inference.executor.base import ExecutorError

    flags = parse_flags(build_parser(), GenerateFlags, argv)
    try:
        return _run(flags)
    except ExecutorError as error:
        print(f"generate.py: {error}", file=sys.stderr, flush=True)
        return 1


def run() -> int:
    """The console command `early-exit-generate`."""
    return run_program(main)


def _run(flags: GenerateFlags) -> int:
    is_served = os.environ.get("RANK", "0") != "0"
    try:
        # torchrun ends all ranks with the first: rank 0 alone finds fault, or it might be ended before it has spoken.
        if not (is_served and "TORCHELASTIC_RUN_ID" in os.environ):
            check_torchrun(flags)
        if is_served and world_size() > 1:
            from megatron.early_exit.inference.executor.worker_process import serve_torchrun_rank

            return serve_torchrun_rank()
        prompts = [*flags.prompt, *prompts_of_file(flags.prompt_file)]
        params, llm = _prepare(flags)
    except (ValueError, OSError) as error:
        print(f"generate.py: {in_words(error)}", file=sys.stderr, flush=True)
        return 2
    from megatron.early_exit.inference.answer_display import AnswerDisplay

    try:
        display = AnswerDisplay(
            llm, params, flags.color, chat=flags.chat, as_json=flags.json, predictions=flags.print_max_prob
        )
        all_answered = display.converse() if _is_interactive(flags) else display.answer(prompts)
        display.check_workers()
        return 0 if all_answered else 1
    finally:  # also when interrupted, or when nobody reads the output any more (see `run_program`)
        llm.close()


def _prepare(flags: GenerateFlags) -> tuple[GenerationParams, LLM]:
    """What is cheap is checked first. Raises ValueError or OSError (no checkpoint, or a damaged one)."""
    from megatron.early_exit.inference.params import GenerationParams, SamplingSettings

    mode = _checked_mode(flags)
    temperature = flags.temperature
    if temperature is None:
        temperature = 1.0 if flags.top_k > 1 or flags.top_p > 0 or flags.min_p > 0 else 0.0
    params = GenerationParams(
        max_tokens=64 if flags.tokens_to_generate is None else flags.tokens_to_generate,
        min_tokens=flags.min_tokens,
        mode=mode,
        sampling=SamplingSettings(
            temperature=temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            top_p_decay=flags.top_p_decay,
            top_p_bound=flags.top_p_bound,
            min_p=flags.min_p,
            repetition_penalty=flags.repetition_penalty,
            frequency_penalty=flags.frequency_penalty,
            presence_penalty=flags.presence_penalty,
            logit_bias=flags.logit_bias,
            seed=flags.seed,
        ),
        exit_thresholds=_thresholds(flags),
        exit_layers=tuple(flags.exit_layers or ()),
        max_deferred=32 if flags.max_deferred is None else flags.max_deferred,
        exit_score=flags.exit_score,
        plan_exits=flags.plan_exits,
        draft_source=flags.draft_source or "exit",
        draft_exit=flags.draft_exit,
        draft_length=flags.draft_length,
        draft_min_confidence=flags.draft_min_confidence,
        speculation=flags.speculation or "auto",
        add_special_tokens=not flags.no_special_tokens,
        stop=tuple(flags.stop),
        log_probs=flags.json or flags.print_max_prob,
        n=flags.samples,
    )

    from megatron.early_exit.inference.llm import LLM
    from megatron.early_exit.inference.stage_layers import stages_in_words

    llm = LLM.load(flags.load, **engine_settings(flags), join_torchrun=True, worker_timeout=flags.worker_timeout)
    if flags.tokens_to_generate is None:
        params = llm.engine.checks.as_certified(params)
    llm.engine.checks.check(params)
    model = llm.engine.description
    has_stages = model.num_stages > 1
    if has_stages:
        exits = [one.layer_number for one in model.exits]
        print(f"generate.py: pipeline stages: {stages_in_words(model.layers_per_stage, exits)}", file=sys.stderr)
    on_each = " on each rank" if has_stages or flags.tensor_model_parallel_size > 1 else ""
    print(f"generate.py: keys and values: {llm.cache_size}{on_each}", file=sys.stderr, flush=True)
    return params, llm


def _checked_mode(flags: GenerateFlags) -> Mode:
    problems = []
    mode: Mode = flags.mode or ("early_exit" if flags.use_early_exit or flags.certified is not None else "full")
    if flags.use_early_exit and mode != "early_exit":
        problems.append(f"--use-early-exit contradicts --mode {mode}")
    needs: dict[Mode, dict[str, object]] = {
        "early_exit": {
            "--early-exit-thres": flags.early_exit_thres,
            "--certified": flags.certified,
            "--exit-layers": flags.exit_layers,
            "--max-deferred": flags.max_deferred,
            "--exit-score": flags.exit_score,
            "--plan-exits": flags.plan_exits,
        },
        "self_speculative": {
            "--draft-source": flags.draft_source,
            "--draft-exit": flags.draft_exit,
            "--draft-length": flags.draft_length,
            "--draft-min-confidence": flags.draft_min_confidence,
            "--speculation": flags.speculation,
        },
    }
    for needed, given in needs.items():
        useless = [flag for flag, value in given.items() if value is not None and mode != needed]
        problems += [f"{flag} has no effect without --mode {needed}" for flag in useless]
    if flags.certified is not None and flags.early_exit_thres is not None:
        problems.append("--certified and --early-exit-thres both say from when on exits are taken; give one")
    if flags.chat and (flags.prompt or flags.prompt_file):
        problems.append("--chat reads from standard input; leave out --prompt and --prompt-file")
    if flags.chat and flags.no_special_tokens:
        problems.append("--no-special-tokens has no effect with --chat: the chat template writes special tokens itself")
    if flags.samples > 1 and _is_interactive(flags):
        problems.append("--samples needs --prompt or --prompt-file")
    if problems:
        raise ValueError("\n".join(problems))
    return mode


def _thresholds(flags: GenerateFlags) -> tuple[float, ...] | CertifiedThresholds:
    from megatron.early_exit.inference.params import CertifiedThresholds

    if flags.certified is not None:
        return CertifiedThresholds(flags.certified)
    return (0.8,) if flags.early_exit_thres is None else tuple(flags.early_exit_thres)


def _is_interactive(flags: GenerateFlags) -> bool:
    return not flags.prompt and flags.prompt_file is None
