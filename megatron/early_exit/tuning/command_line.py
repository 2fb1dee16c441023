"""The program behind `tools/tune_exits.py` (console command `early-exit-tune`): from a model to tuned exits, in one
command that goes on where it stopped."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron.early_exit.checkpoint.commands.exits import add_exit_flags
from megatron.early_exit.evaluation.prompt_flags import add_prompt_flags
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.model_flags import ModelFlags, add_model_flags
from megatron.early_exit.platform.command_line import (
    STATUS_INTERRUPTED,
    add_verbose_flag,
    is_main_rank,
    run_program,
)
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.platform.folder_lock import FolderLock
from megatron.early_exit.platform.world import world_size
from megatron.early_exit.tuning.manifest import Manifest, Step
from megatron.early_exit.tuning.recipe import DEFAULT_REPORT_ANSWERS, Recipe
from megatron.early_exit.tuning.training_process import TrainingFailed

DEFAULT_MAX_REQUESTS = 64
"""Nobody waits for a single answer."""

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_FOR_MAIN_RANK = 15.0
"""In which it says what all ranks find wrong, before one of the others ends and torchrun ends it."""

_EXAMPLE = """example, all by itself:
  early-exit-tune --load SmolLM2-135M-Instruct --output runs/tuned \\
      --exit-layer-nums 8 15 22 --use-exit-norm --use-exit-mlp \\
      --prompts-file questions.jsonl --prompts 2000 --answer-tokens 128
over several GPUs (steps for one process run on the first rank):
  torchrun --nproc_per_node 8 tools/tune_exits.py ... -- --tensor-model-parallel-size 2"""


@dataclass(frozen=True, kw_only=True)
class StartFlags(ModelFlags):
    """model"""

    load: Annotated[str, "DIR"]
    """folder of checkpoints, or of a Hugging Face model"""

    max_requests: Annotated[int, "N"] | None = DEFAULT_MAX_REQUESTS
    """prompts that run at once; default: at most 16"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tune_exits.py", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_EXAMPLE,
        description="From a model to tuned exits: convert it if need be, add exits, let the model answer prompts, and\n"
        "tune the exits to say what its final head says there. Run the same command again to go on after an\n"
        "interruption.",
    )  # fmt: skip
    add_verbose_flag(parser)
    add_model_flags(parser, StartFlags)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for all that is made")
    exits = parser.add_argument_group("exits; without --exit-layer-nums those that the checkpoint has")
    add_exit_flags(exits, is_required=False)
    add_prompt_flags(parser, default_prompts=1000, what="prompts, of one source or both", is_one_source=False)
    answers = parser.add_argument_group("own answers")
    answers.add_argument("--answer-tokens", type=int, default=128, metavar="N", help="longest answer; default 128")
    answers.add_argument(
        "--answers-to-each", type=int, default=1, metavar="N", help="answers to each prompt, with a --temperature"
    )
    answers.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default 0: greedy")
    answers.add_argument("--top-p", type=float, default=0.0, metavar="X", help="default 0: all tokens")
    answers.add_argument(
        "--held-out", type=float, default=0.1, metavar="X",
        help="share of prompts whose answers are not trained on, but validate; default 0.1",
    )  # fmt: skip
    answers.add_argument(
        "--report-answers",
        type=int,
        default=DEFAULT_REPORT_ANSWERS,
        metavar="N",
        help=f"of these, for the comparison at the end; default {DEFAULT_REPORT_ANSWERS}",
    )
    training = parser.add_argument_group(
        "training; further flags of the training program (docs/flags.md) stand at the end, behind --"
    )
    training.add_argument("--seq-length", type=int, default=512, metavar="N", help="tokens of a sample; default 512")
    training.add_argument("--micro-batch-size", type=int, default=2, metavar="N", help="default 2")
    training.add_argument("--global-batch-size", type=int, default=8, metavar="N", help="default 8")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--passes", type=float, default=3.0, metavar="X", help="over the samples; default 3")
    length.add_argument("--train-iters", type=int, metavar="N", help="iterations, in place of --passes")
    training.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help="highest learning rate, which falls to a tenth; default 5e-3, or 1e-3 for output projections",
    )
    training.add_argument(
        "--tune-exit-distillation", type=float, default=1.0, metavar="X",
        help="share of the loss that is the divergence from the final head; the rest is that of the text; default 1",
    )  # fmt: skip
    training.add_argument(
        "--exit-loss-token-fraction", type=float, default=1.0, metavar="X",
        help="share of the tokens whose loss is computed, drawn anew every time; default 1",
    )  # fmt: skip
    training.add_argument(
        "--keep-hidden-states", action=argparse.BooleanOptionalAction,
        help="run the frozen layers once, and keep what they make on disk; default: where samples are drawn again",
    )  # fmt: skip
    training.add_argument("--bf16", action="store_true", help="train in bf16; default fp32")
    training.add_argument(
        "--blend", nargs="+", metavar="WEIGHT PREFIX",
        help="other token files, drawn so often for each sample of own answers: text, or chats with a loss mask",
    )  # fmt: skip
    how = parser.add_argument_group("what to do")
    how.add_argument("--dry-run", action="store_true", help="print the steps with estimates of time, disk and memory")
    how.add_argument(
        "--redo", action="store_true", help="with other settings than before: do again the steps that depend on them"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a step failed, 2 for what cannot be done, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = build_parser().parse_args(own)
    args.more = more
    try:
        check(args)
        recipe = Recipe(args)
        if is_main_rank():
            recipe.check()
        if not args.dry_run:
            carry_out(recipe, args.redo)
        elif is_main_rank():
            from megatron.early_exit.tuning.estimates import describe

            print(describe(recipe))
    except (ValueError, OSError) as error:
        if not is_main_rank():
            time.sleep(_SECONDS_FOR_MAIN_RANK)
        print(f"tune_exits.py: {in_words(error)}", file=sys.stderr)
        return 2
    except (ExecutorError, TrainingFailed) as error:
        print(f"tune_exits.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if is_main_rank():
            print("\ninterrupted; the same command goes on here", file=sys.stderr)
        return STATUS_INTERRUPTED
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for all that is wrong with the flags by themselves."""
    problems = []
    if not args.prompts_file and not args.data_path:
        problems.append("give prompts: --prompts-file FILE, --data-path PREFIX, or both")
    for name in ("answer_tokens", "answers_to_each", "micro_batch_size", "global_batch_size", "report_answers"):
        if getattr(args, name) < 1:
            problems.append(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.seq_length < 2:
        problems.append(f"--seq-length is {args.seq_length}; it must be at least 2")
    if args.answers_to_each > 1 and not args.temperature:
        problems.append(f"--answers-to-each {args.answers_to_each}: greedy answers are all equal; give a --temperature")
    if not 0 < args.held_out < 1:
        problems.append(f"--held-out is {args.held_out}; it must lie between 0 and 1")
    if not args.passes > 0:
        problems.append(f"--passes is {args.passes}; it must be positive")
    if args.train_iters is not None and args.train_iters < 1:
        problems.append(f"--train-iters is {args.train_iters}; it must be at least 1")
    if not 0 <= args.tune_exit_distillation <= 1:
        problems.append(f"--tune-exit-distillation is {args.tune_exit_distillation}; it must lie between 0 and 1")
    if not 0 < args.exit_loss_token_fraction <= 1:
        problems.append(f"--exit-loss-token-fraction is {args.exit_loss_token_fraction}; it must lie above 0, up to 1")
    if args.output.is_file():
        problems.append(f"--output {args.output} is a file; give a folder")
    if problems:
        raise ValueError("\n".join(problems))


def carry_out(recipe: Recipe, redo: bool) -> None:
    """Do all steps that are not done. Every rank calls it: the main one does what one process does, while the others
    wait for its word in the manifest."""
    if not is_main_rank():
        _take_part(recipe)
        return
    recipe.folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(recipe.folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves parts that are whole
    try:
        for path in [*recipe.folder.glob("*.partial-*"), *recipe.answers_folder.glob("*.partial-*")]:
            _remove(path)  # which a run that was killed has left
        if recipe.exits_are_there:
            recipe.check_training()
        _prepare(recipe, redo)
        for number, step in enumerate(recipe.steps, start=1):
            if step.name == "answers":
                recipe.check_training()
            _carry_out(recipe.manifest, step, f"{number}/{len(recipe.steps)} {step.title}")
    finally:
        lock.release()
    print(next_steps(recipe))


def _prepare(recipe: Recipe, redo: bool) -> None:
    """Raise ValueError if steps have been done with other settings, or clear them away."""
    manifest = recipe.manifest
    changed = [step.name for step in recipe.steps if manifest.state(step.name) == "changed"]
    if not changed:
        return
    what = "; ".join(f"{name} ({text})" for name in changed for text in manifest.differences(name))
    if not redo:
        raise ValueError(
            f"{recipe.folder} was begun with other settings: {what or 'other results of earlier steps'}. Give the same "
            f"as before, or another --output, or --redo: it does again {', '.join(changed)}, and keeps the other steps"
        )
    print(f"done again: {', '.join(changed)} ({what})")
    remove = [path for step in recipe.steps if step.name in changed for path in step.outputs]
    if "samples" in changed:
        remove.append(recipe.folder / "hidden_states")
    for path in remove:
        _remove(path)
    manifest.forget(changed)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _carry_out(manifest: Manifest, step: Step, words: str) -> None:
    state = manifest.state(step.name)
    if state == "done":
        print(f"== {words}: done ({_duration(manifest.seconds(step.name))})", flush=True)
        return
    others = world_size() - 1
    waiting = f"; {others} other ranks wait" if others and not step.is_collective else ""
    print(f"== {words}{' (goes on)' if state == 'begun' else ''}{waiting}", flush=True)
    manifest.begin(step.name)
    start = time.monotonic()
    facts = step.run()
    manifest.finish(step.name, time.monotonic() - start, facts)


def _take_part(recipe: Recipe) -> None:
    """Wait for what one process does, and train with the others."""
    for step in recipe.steps:
        if step.is_collective:
            while recipe.manifest.state(step.name) not in ("begun", "done"):  # the main rank clears away what was there
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            if recipe.manifest.state(step.name) != "done":
                step.run()
            return
        while recipe.manifest.state(step.name) != "done":
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def next_steps(recipe: Recipe) -> str:
    """What one does with tuned exits."""
    tuned = recipe.tuned
    prompts = "--prompts-file OTHERS.jsonl" if recipe.args.prompts_file is not None else "--data-path OTHERS"
    return f"""
Tuned exits: {tuned}. What now, with prompts that the exits were not tuned on (they are better on those that they were):
  certify thresholds     python tools/evaluate.py calibrate --load {tuned} {prompts}
  speed against quality  python tools/evaluate.py sweep --load {tuned} {prompts}
  generate               python tools/generate.py --load {tuned} --prompt "..." --use-early-exit --early-exit-thres 0.8
  for longer             the same command with more --passes, and --redo"""


def run() -> int:
    """The console command."""
    return run_program(main)
