"""The program behind `tools/generate.py`: prompts in, text and the exits that produced it out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.early_exit.inference.model_flags import add_model_flags, check_torchrun, engine_settings
from megatron.early_exit.inference.params import EXIT_SCORES
from megatron.early_exit.inference.prompt_input import prompts_of_file
from megatron.early_exit.platform.command_line import add_verbose_flag, run_program
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.platform.world import world_size

# What needs core is imported in the functions: --help and wrong flags should not wait for it.
if TYPE_CHECKING:
    from megatron.early_exit.inference.llm import LLM
    from megatron.early_exit.inference.params import CertifiedThresholds, GenerationParams, Mode


def build_parser() -> argparse.ArgumentParser:
    """Flags; those of exits are EE-LLM's."""
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Continue prompts with a trained early-exit model, all at once. Without --prompt and --prompt-file "
        "it reads one prompt a line from standard input; with --chat it keeps the conversation.",
    )
    add_model_flags(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    prompts.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line; empty lines are skipped")
    prompts.add_argument(
        "--no-special-tokens", action="store_true",
        help="give the prompt's text alone, without the begin-of-text token that the tokenizer may add",
    )  # fmt: skip
    prompts.add_argument("--chat", action="store_true", help="talk: each answer sees the conversation before it")
    sampling = parser.add_argument_group("sampling (the default is greedy)")
    sampling.add_argument(
        "--tokens-to-generate", type=int, metavar="N", help="at most; default 64, or as was certified (--certified)"
    )
    sampling.add_argument("--min-tokens", type=int, default=0, metavar="N", help="no end and no stop before; default 0")
    sampling.add_argument("--temperature", type=float, help="0: greedy; default: 1 with --top-k, --top-p or --min-p")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K most probable; 0: all")
    sampling.add_argument(
        "--top-p", type=float, default=0.0, metavar="P", help="choose among the fewest with probability P; 0: all"
    )
    sampling.add_argument("--top-p-decay", type=float, default=0.0, metavar="F", help="multiply top-p by this a token")
    sampling.add_argument("--top-p-bound", type=float, default=0.0, metavar="P", help="top-p decays no further")
    sampling.add_argument(
        "--min-p", type=float, default=0.0, metavar="F", help="leave out what is below this share of the best; 0: none"
    )
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, metavar="F", help="1: off")
    sampling.add_argument("--frequency-penalty", type=float, default=0.0, metavar="F", help="as OpenAI's; 0: off")
    sampling.add_argument("--presence-penalty", type=float, default=0.0, metavar="F", help="as OpenAI's; 0: off")
    sampling.add_argument(
        "--logit-bias", type=_bias, nargs="+", default=[], metavar="ID:BIAS",
        help="add to the logits of these tokens; -100 all but bans one, 100 all but forces it",
    )  # fmt: skip
    sampling.add_argument("--seed", type=int, default=1234, help="the same seed for every prompt")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before this; repeatable")
    sampling.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each prompt")
    exits = parser.add_argument_group("early exit")
    exits.add_argument(
        "--mode", choices=("full", "early_exit", "self_speculative"), help="default: full, or what other flags imply"
    )
    exits.add_argument("--use-early-exit", action="store_true", help="the same as --mode early_exit")
    exits.add_argument(
        "--early-exit-thres", type=float, nargs="+", metavar="F",
        help="probability of its best token from which on an exit is taken, one for all exits or one for each; 0: "
        "always the first exit, 1: only where the probability rounds to 1; default 0.8",
    )  # fmt: skip
    exits.add_argument(
        "--certified", type=float, metavar="LEVEL",
        help="with the thresholds that are certified for this level, as in 0.99: the share of tokens, averaged over "
        "prompts, that are the full model's (tools/evaluate.py calibrate); implies --mode early_exit",
    )  # fmt: skip
    exits.add_argument("--exit-layers", type=int, nargs="+", metavar="N", help="exits to evaluate; default: all")
    exits.add_argument(
        "--max-deferred", type=int, metavar="N",
        help="rows of a request that may be deferred; where one more exits, all run the remaining layers, and the "
        "token is still the exit's; default 32",
    )  # fmt: skip
    exits.add_argument(
        "--exit-score", choices=EXIT_SCORES,
        help="what thresholds are compared with: the probability of the exit's best token (head), or what a small "
        "network says before the head is evaluated (probe; tools/evaluate.py probes); default: head, with --certified "
        "what the certificate was made with",
    )  # fmt: skip
    exits.add_argument(
        "--plan-exits", action=argparse.BooleanOptionalAction,
        help="only exits that pay on this machine (calibrate); default: with --certified",
    )  # fmt: skip
    exits.add_argument(
        "--draft-source", choices=("exit", "ngram", "both"),
        help="self_speculative: an exit drafts, or what followed the last tokens where they stood before, in the "
        "prompt or the answer (ngram: for models without exits too), or whichever promises more; default exit",
    )  # fmt: skip
    exits.add_argument(
        "--draft-exit", type=int, metavar="N",
        help="self_speculative: exit that drafts; default: the one that promises most",
    )  # fmt: skip
    exits.add_argument(
        "--draft-length", type=int, metavar="N", help="self_speculative: tokens to draft at once; default: it adapts"
    )
    exits.add_argument(
        "--draft-min-confidence", type=float, metavar="F",
        help="self_speculative: an exit's draft ends with a token of less confidence; default: where one more token is "
        "not expected to pay",
    )  # fmt: skip
    exits.add_argument(
        "--speculation", choices=("auto", "draft_then_verify", "across_stages"),
        help="self_speculative: feed drafts while the pipeline stages verify those before them (across_stages), or "
        "verify some together; default auto: across stages where one lies behind that of the draft exit",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON document a line for each answer")
    output.add_argument("--print-max-prob", action="store_true", help="what evaluated exits predict for each token")
    output.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="colour text by exit")
    add_verbose_flag(parser)
    return parser


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no ID:BIAS, as in 5:-100") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns the exit status: 1 if a prompt was refused or a worker failed, 2 for bad settings.

    In a process of torchrun whose rank is not 0, serve rank 0 until it ends."""
    from megatron.early_exit.inference.executor.base import ExecutorError

    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except ExecutorError as error:
        print(f"generate.py: {error}", file=sys.stderr, flush=True)
        return 1


def run() -> int:
    """The console command `early-exit-generate`."""
    return run_program(main)


def _run(args: argparse.Namespace) -> int:
    is_served = os.environ.get("RANK", "0") != "0"
    try:
        # torchrun ends all ranks with the first: rank 0 alone finds fault, or it might be ended before it has spoken.
        if not (is_served and "TORCHELASTIC_RUN_ID" in os.environ):
            check_torchrun(args)
        if is_served and world_size() > 1:
            from megatron.early_exit.inference.executor.worker_process import serve_torchrun_rank

            return serve_torchrun_rank()
        prompts = [*args.prompt, *prompts_of_file(args.prompt_file)]
        params, llm = _prepare(args)
    except (ValueError, OSError) as error:
        print(f"generate.py: {in_words(error)}", file=sys.stderr, flush=True)
        return 2
    from megatron.early_exit.inference.answer_display import AnswerDisplay

    try:
        display = AnswerDisplay(
            llm, params, args.color, chat=args.chat, as_json=args.json, predictions=args.print_max_prob
        )
        all_answered = display.converse() if _is_interactive(args) else display.answer(prompts)
        display.check_workers()
        return 0 if all_answered else 1
    finally:  # also when interrupted, or when nobody reads the output any more (see `run_program`)
        llm.close()


def _prepare(args: argparse.Namespace) -> tuple[GenerationParams, LLM]:
    """What is cheap is checked first. Raises ValueError or OSError (no checkpoint, or a damaged one)."""
    from megatron.early_exit.inference.params import GenerationParams, SamplingSettings

    mode = _checked_mode(args)
    temperature = args.temperature
    if temperature is None:
        temperature = 1.0 if args.top_k > 1 or args.top_p > 0 or args.min_p > 0 else 0.0
    params = GenerationParams(
        max_tokens=64 if args.tokens_to_generate is None else args.tokens_to_generate,
        min_tokens=args.min_tokens,
        mode=mode,
        sampling=SamplingSettings(
            temperature=temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            top_p_decay=args.top_p_decay,
            top_p_bound=args.top_p_bound,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            frequency_penalty=args.frequency_penalty,
            presence_penalty=args.presence_penalty,
            logit_bias=args.logit_bias,
            seed=args.seed,
        ),
        exit_thresholds=_thresholds(args),
        exit_layers=tuple(args.exit_layers or ()),
        max_deferred=32 if args.max_deferred is None else args.max_deferred,
        exit_score=args.exit_score,
        plan_exits=args.plan_exits,
        draft_source=args.draft_source or "exit",
        draft_exit=args.draft_exit,
        draft_length=args.draft_length,
        draft_min_confidence=args.draft_min_confidence,
        speculation=args.speculation or "auto",
        add_special_tokens=not args.no_special_tokens,
        stop=tuple(args.stop),
        log_probs=args.json or args.print_max_prob,
        n=args.samples,
    )

    from megatron.early_exit.inference.llm import LLM
    from megatron.early_exit.inference.stage_layers import stages_in_words

    llm = LLM.load(args.load, **engine_settings(args), join_torchrun=True, worker_timeout=args.worker_timeout)
    if args.tokens_to_generate is None:
        params = llm.engine.checks.as_certified(params)
    llm.engine.checks.check(params)
    model = llm.engine.description
    has_stages = model.num_stages > 1
    if has_stages:
        exits = [one.layer_number for one in model.exits]
        print(f"generate.py: pipeline stages: {stages_in_words(model.layers_per_stage, exits)}", file=sys.stderr)
    on_each = " on each rank" if has_stages or args.tensor_model_parallel_size > 1 else ""
    print(f"generate.py: keys and values: {llm.cache_size}{on_each}", file=sys.stderr, flush=True)
    return params, llm


def _checked_mode(args: argparse.Namespace) -> Mode:
    problems = []
    mode: Mode = args.mode or ("early_exit" if args.use_early_exit or args.certified is not None else "full")
    if args.use_early_exit and mode != "early_exit":
        problems.append(f"--use-early-exit contradicts --mode {mode}")
    needs = {
        "early_exit": {
            "--early-exit-thres": args.early_exit_thres,
            "--certified": args.certified,
            "--exit-layers": args.exit_layers,
            "--max-deferred": args.max_deferred,
            "--exit-score": args.exit_score,
            "--plan-exits": args.plan_exits,
        },
        "self_speculative": {
            "--draft-source": args.draft_source,
            "--draft-exit": args.draft_exit,
            "--draft-length": args.draft_length,
            "--draft-min-confidence": args.draft_min_confidence,
            "--speculation": args.speculation,
        },
    }
    for needed, flags in needs.items():
        useless = [flag for flag, value in flags.items() if value is not None and mode != needed]
        problems += [f"{flag} has no effect without --mode {needed}" for flag in useless]
    if args.certified is not None and args.early_exit_thres is not None:
        problems.append("--certified and --early-exit-thres both say from when on exits are taken; give one")
    if args.chat and (args.prompt or args.prompt_file):
        problems.append("--chat reads from standard input; leave out --prompt and --prompt-file")
    if args.chat and args.no_special_tokens:
        problems.append("--no-special-tokens has no effect with --chat: the chat template writes special tokens itself")
    if args.samples > 1 and _is_interactive(args):
        problems.append("--samples needs --prompt or --prompt-file")
    if problems:
        raise ValueError("\n".join(problems))
    return mode


def _thresholds(args: argparse.Namespace) -> tuple[float, ...] | CertifiedThresholds:
    from megatron.early_exit.inference.params import CertifiedThresholds

    if args.certified is not None:
        return CertifiedThresholds(args.certified)
    return (0.8,) if args.early_exit_thres is None else tuple(args.early_exit_thres)


def _is_interactive(args: argparse.Namespace) -> bool:
    return not args.prompt and args.prompt_file is None
