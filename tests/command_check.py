"""What is wrong with a command of the documentation. Our programs themselves parse their words, and are stopped before
they do anything."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import sys
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.flags import parse_run_config
from megatron.early_exit.schedules.plan_flags import build_parser as build_plan_parser
from tests.shell_blocks import Command

ROOT = Path(__file__).resolve().parents[1]
TRAINING = "pretrain_early_exit_gpt.py"
OTHERS = {"pip", "curl", "echo", "git", "serve", "lm-eval", "vllm", "vllm-router", "llama-server"}
"""Programs that are not ours; so are Python's modules and scripts that are not here."""

NOT_HERE = re.compile(r"^--config: cannot read|: no such f")
"""What training says of files and folders that stand for a reader's own."""
LEFT_OUT_OF_TRAINING = (
    "--num-layers 32 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --lr 1e-3 --train-iters 10"
    " --global-batch-size 64 --tokenizer-type NullTokenizer --vocab-size 99 --exit-layer-nums 8 --use-exit-norm"
    " --data-path PREFIX --pretrained-checkpoint MODEL"
).split()
"""What stands for words that a page leaves out."""


class Parsed(BaseException):
    """A program has parsed its flags and would go on."""


def problem_of(command: Command, monkeypatch: pytest.MonkeyPatch, capsys) -> str | None:
    """In words, or None."""
    program, *words = command.words
    with monkeypatch.context() as patch:
        try:
            _check(program, words, command, patch)
        except (ValueError, ModuleNotFoundError) as error:
            return str(error)
        except SystemExit:
            problem = capsys.readouterr().err.strip().splitlines()[-1]
            is_named = command.is_fragment and re.search(r"expected (one|at least one) argument$", problem)
            return None if is_named else problem  # the text names a flag, without a value
    return None


def _check(program: str, words: list[str], command: Command, patch: pytest.MonkeyPatch) -> None:
    """Raises ValueError, or what a program raises that does not take its words."""
    if program == "make":
        _check_targets(words)
    elif program == "bash":
        _check_script(words[0], words[1:], patch)
    elif program == "torchrun":
        launch = torchrun_parser().parse_args(words)
        num_ranks = int(launch.nproc_per_node) * int(launch.nnodes.split(":")[-1])
        _check_python(launch.training_script, launch.training_script_args, command, patch, num_ranks)
    elif program == "python" and words[0] == "-m":
        if words[1].split(".")[0] in ("benchmarks", "megatron"):
            run_to_flags(module_main(words[1]), words[2:], command.is_fragment, patch)
    elif program == "python":
        _check_python(words[0], words[1:], command, patch)
    elif program.endswith(".py"):
        folder = "" if program == TRAINING else "tools/"
        _check_python(folder + program.removeprefix("tools/"), words, command, patch)
    elif program.startswith("early-exit-"):
        run_to_flags(console_main(program), words, command.is_fragment, patch)
    elif program.startswith("--"):
        check_training([program, *words], is_fragment=True)
    elif program not in OTHERS:
        raise ValueError(f"{program}: neither ours nor a program that is known here")


def _check_targets(words: Sequence[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in words:
        if word not in targets and "=" not in word:
            raise ValueError(f"the Makefile has no {word}")


def _check_script(path: str, words: list[str], patch: pytest.MonkeyPatch) -> None:
    """A script of ours, which may hand flags on to the server, or to training."""
    if not (ROOT / path).is_file():
        raise ValueError(f"{path} is not here")
    flags = words[next((i for i, word in enumerate(words) if word.startswith("--")), len(words)) :]
    if "run_text_generation_server.py" in (ROOT / path).read_text(encoding="utf-8"):
        run_to_flags(script_main("tools/run_text_generation_server.py"), flags, True, patch)
    else:
        check_training(flags, is_fragment=True)


def _check_python(
    script: str, words: list[str], command: Command, patch: pytest.MonkeyPatch, num_ranks: int | None = None
) -> None:
    if script == TRAINING:
        world_size = int(command.environment.get("WORLD_SIZE", num_ranks or 1))
        return check_training(words, world_size, command.is_fragment)
    if not script.startswith("tools/"):
        return None
    if not (ROOT / script).is_file():
        raise ValueError(f"{script} is not here")
    if script == "tools/plan_pipeline.py":
        plan, flags = build_plan_parser().parse_known_args(words)
        return check_training(flags, plan.world_size or 1, is_fragment=True)
    if "--" in words:  # flags of training behind those of tuning
        check_training(words[words.index("--") + 1 :], is_fragment=True)
    return run_to_flags(script_main(script), words, command.is_fragment, patch)


def check_training(words: Sequence[str], world_size: int = 1, is_fragment: bool = False) -> None:
    """Raises ValueError with what the training program would say, but of files."""
    words = [*LEFT_OUT_OF_TRAINING, *words] if is_fragment else words
    try:
        parse_run_config(words, world_size=world_size, warn=lambda message: None)
    except ConfigError as error:
        problems = [one for one in error.problems if not NOT_HERE.search(one)]
        if problems:
            raise ValueError("; ".join(problems)) from None


def run_to_flags(main: Callable, words: Sequence[str], is_fragment: bool, patch: pytest.MonkeyPatch) -> None:
    """Let a program parse `words`. Raises SystemExit, with a message on standard error, if it does not take them."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *args, **kwargs) -> None:
        if is_fragment:
            _require_nothing(parser)
        parse(parser, *args, **kwargs)
        raise Parsed

    patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    patch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(Parsed):
        main()


def _require_nothing(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        action.required = False
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                _require_nothing(one)
    for group in parser._mutually_exclusive_groups:
        group.required = False


@cache
def script_main(script: str) -> Callable:
    """The function that reads the flags of a tool, behind what starts and ends every program."""
    return _main_of(runpy.run_path(str(ROOT / script)))


@cache
def console_main(name: str) -> Callable:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    if name not in scripts:
        raise ValueError(f"{name} is no console command: {', '.join(scripts)}")
    return _main_of(vars(importlib.import_module(scripts[name].partition(":")[0])))


@cache
def module_main(name: str) -> Callable:
    module = importlib.import_module(name)
    return _main_of(vars(importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module))


def _main_of(names: dict[str, Any]) -> Callable:
    return names.get("main") or names["run"].__globals__["main"]
