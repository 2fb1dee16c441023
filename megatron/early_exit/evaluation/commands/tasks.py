"""The command `tasks`: standard benchmarks in several modes, each beside the full model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.early_exit.evaluation.commands.common import add_parser, check_output, finish, load

if TYPE_CHECKING:
    from megatron.early_exit.evaluation.commands.common import Commands
    from megatron.early_exit.evaluation.lm_eval.modes import DecodingMode
    from megatron.early_exit.evaluation.lm_eval.task_runs import Run, Tasks, TaskSettings
    from megatron.early_exit.inference.engine_loading import LoadedEngine

# Read by libraries when they are imported. Multiprocessing: lm-eval starts processes for intervals that it bootstraps.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}


def add_command(commands: Commands) -> None:
    parser = add_parser(
        commands, "tasks", "standard benchmarks, by lm-eval",
        "Evaluate a model on tasks of lm-eval in several modes of decoding. The tasks that come with the program need "
        "no network: their questions are those of packages of PyPI (--list). What is finished is kept: the same "
        "command goes on after an interruption.",
    )  # fmt: skip
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--list", nargs=0, action=_List, help="show the tasks and what they need (give --data-folder before)"
    )
    tasks.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="of --list or --include-path, or all")
    tasks.add_argument(
        "--modes", nargs="+", default=["full"], metavar="MODE",
        help="full (always included), early_exit:THRESHOLD, certified:LEVEL, self_speculative[:EXIT], exit:EXIT (the "
        "model ends behind that exit). Likelihoods are those of full but with exit:EXIT",
    )  # fmt: skip
    tasks.add_argument("--limit", type=int, metavar="N", help="questions of each task; default: all")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples before a question; default: the task's")
    tasks.add_argument(
        "--answer-tokens", type=int, metavar="N",
        help="longest answer; default: the task's. A certificate holds for the length that it was made with",
    )  # fmt: skip
    tasks.add_argument("--chat", action="store_true", help="ask in turns of the model's chat template")
    tasks.add_argument("--seed", type=int, default=1234, metavar="N", help="of examples and intervals; default 1234")
    tasks.add_argument("--include-path", type=Path, metavar="DIR", help="folder with YAML files of more tasks")
    tasks.add_argument("--data-folder", type=Path, metavar="DIR", help="where wheels of packages of data lie")
    tasks.add_argument("--fetch", action="store_true", help="download those that are missing there, with pip")
    tasks.add_argument(
        "--allow-code-execution", action="store_true",
        help="run programs that the model writes (human_eval): with your rights, with limits on time and memory, but "
        "without a sandbox",
    )  # fmt: skip
    parser.set_defaults(run=run)


class _List(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        from megatron.early_exit.evaluation.lm_eval.offline_tasks import offline_tasks
        from megatron.early_exit.platform.columns import aligned

        rows = [("task", "package", "there", "licence of the questions", "what")]
        for task in offline_tasks().values():
            there = "yes" if task.package.is_present(namespace.data_folder) else "no"
            rows.append((task.name, task.package.requirement, there, task.licence, task.about))
        print(aligned(rows))
        parser.exit()


def run(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError, before a model is loaded, for what cannot be evaluated."""
    from megatron.early_exit.evaluation.lm_eval.modes import DecodingMode
    from megatron.early_exit.evaluation.lm_eval.offline_tasks import as_value_error, check_data, chosen_tasks

    for name, value, least in (
        ("--limit", args.limit, 1), ("--answer-tokens", args.answer_tokens, 1), ("--num-fewshot", args.num_fewshot, 0),
    ):  # fmt: skip
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if args.include_path is not None and not args.include_path.is_dir():
        raise ValueError(f"--include-path {args.include_path} is no folder")
    if args.output is not None:
        check_output(args.output)  # before packages are fetched
    modes = [DecodingMode.parse(words) for words in dict.fromkeys(["full", *args.modes])]
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for terminals
    try:
        from megatron.early_exit.evaluation.lm_eval.task_runs import Tasks, TaskSettings

        tasks = Tasks(args.include_path, args.data_folder)
    except ModuleNotFoundError as error:
        raise as_value_error(error) from None
    names = chosen_tasks(args.tasks, tasks.own, args.allow_code_execution)
    check_data(names, args.data_folder, args.fetch)
    settings = TaskSettings(
        args.limit, args.num_fewshot, args.answer_tokens, args.chat, args.seed, args.allow_code_execution
    )
    for name in names:
        tasks.load(name)
    _evaluate(args, tasks, names, modes, settings)


def _evaluate(
    args: argparse.Namespace, tasks: Tasks, names: Sequence[str], modes: Sequence[DecodingMode], settings: TaskSettings
) -> None:
    from megatron.early_exit.evaluation.lm_eval.adapter import EarlyExitLM
    from megatron.early_exit.evaluation.lm_eval.model_arguments import default_max_length
    from megatron.early_exit.platform.machine import machine_info

    machine = machine_info()
    max_length = args.max_length or default_max_length(args.load, args.load_iteration)
    llm, loaded = load(args, max_length=max_length)
    models = {mode.name: EarlyExitLM(llm, mode) for mode in modes}  # refuses what the model cannot do
    if settings.chat:
        models["full"].apply_chat_template([{"role": "user", "content": "?"}])
    for name in names:
        arguments = tasks.generation_arguments(name, settings)
        if arguments is not None:
            for lm in models.values():
                lm.check_answers(arguments)
    runs = _runs(args, tasks, names, models, settings, loaded)
    results = _results(tasks, runs, models, settings)
    _print(results)
    data = {name: of_modes["full"]["documents"] for name, of_modes in runs.items()}
    chosen = {**asdict(settings), "modes": list(models), "max_length": max_length}
    finish(args, loaded, chosen, results, data=data, machine=machine)
    _finished_path(args, loaded).unlink(missing_ok=True)


def _finished_path(args: argparse.Namespace, loaded: LoadedEngine) -> Path:
    from megatron.early_exit.evaluation.commands.common import output_path

    path = output_path(args, loaded)
    return path.with_name(f"{path.name}.finished")


def _runs(
    args: argparse.Namespace, tasks: Tasks, names: Sequence[str], models: dict[str, Any], settings: TaskSettings,
    loaded: LoadedEngine,
) -> dict[str, dict[str, Run]]:  # fmt: skip
    """Of every task in every mode that gives other answers than `full` does."""
    from megatron.early_exit.evaluation.documents import model_facts
    from megatron.early_exit.evaluation.lm_eval.task_runs import FinishedRuns, evaluate, identity

    max_length = models["full"].max_length
    facts = {**model_facts(loaded), "max_length": max_length}
    finished = FinishedRuns(_finished_path(args, loaded), identity(facts, settings))
    runs: dict[str, dict[str, Run]] = {}
    for name in names:
        runs[name] = {}
        for mode, lm in models.items():
            if tasks.uses_likelihoods(name) and mode != "full" and not lm.mode.changes_likelihoods:
                continue
            # The thresholds of a certificate may be others tomorrow.
            digest = f"{tasks.digests[name]} {lm.thresholds}"
            kept = finished.get(name, mode, digest)
            print(f"{name}, {mode}{': finished before' if kept else ''}", file=sys.stderr, flush=True)
            runs[name][mode] = kept or evaluate(lm, tasks, name, settings)
            if kept is None:
                finished.keep(name, mode, digest, runs[name][mode])
    return runs


def _results(
    tasks: Tasks, runs: dict[str, dict[str, Run]], models: dict[str, Any], settings: TaskSettings
) -> dict[str, Any]:
    from megatron.early_exit.evaluation.lm_eval.task_runs import compare

    of_tasks = {}
    for name, of_modes in runs.items():
        full = of_modes["full"]
        of_tasks[name] = {
            "n": full["n"],
            "num_fewshot": full["num_fewshot"],
            "main_metric": tasks.main_metric(name, full),
            "metrics": {
                metric: {mode: one["metrics"][metric] for mode, one in of_modes.items()} for metric in full["metrics"]
            },
            "paired": {
                mode: compare(tasks, name, full, one, settings) for mode, one in of_modes.items() if mode != "full"
            },
        }
    return {
        "tasks": of_tasks,
        "modes": {name: {**lm.mode.settings, "thresholds": _by_layer(lm)} for name, lm in models.items()},
        "per_prompt": {
            name: {mode: one["per_prompt"] for mode, one in of_modes.items()} for name, of_modes in runs.items()
        },
    }


def _by_layer(lm: Any) -> dict[str, float]:
    return {str(layer): threshold for layer, threshold in lm.thresholds.items()}


def _print(results: dict[str, Any]) -> None:
    from megatron.early_exit.platform.columns import aligned

    rows = [("task", "questions", "metric", "mode", "value", "stderr", "minus full", "95% interval", "McNemar p")]
    for name, task in results["tasks"].items():
        for metric, of_modes in task["metrics"].items():
            for mode, one in of_modes.items():
                paired = task["paired"].get(mode) if metric == task["main_metric"] else None
                rows.append((
                    name, str(task["n"]), metric.removesuffix(",none"), mode, _figure(one["value"]),
                    _figure(one["stderr"]), *_paired_figures(paired),
                ))  # fmt: skip
    print(f"\n{aligned(rows)}")
    left_out = [mode for mode in results["modes"] if mode != "full" and not mode.startswith("exit:")]
    if left_out:
        print(f"\nLikelihoods are scored by one head: where {', '.join(left_out)} has no row, it is that of full.")


def _paired_figures(paired: dict[str, Any] | None) -> tuple[str, str, str]:
    if paired is None:
        return "", "", ""
    interval = "-" if paired["interval"] is None else "{:+.4f} to {:+.4f}".format(*paired["interval"])
    p_value = "-" if paired["mcnemar_p"] is None else f"{paired['mcnemar_p']:.3f}"
    return f"{paired['difference']:+.4f}", interval, p_value


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
