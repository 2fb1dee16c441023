"""Tuning recipes that are killed, for `test_tuning_recipe.py`: one program that imports all once and forks each run.

python -m tests.integration.killed_recipes FOLDER WORDS...      (prints one JSON object)
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron.early_exit.evaluation import own_answers
from megatron.early_exit.tuning import command_line, recipe

RENAMES_BETWEEN_KILLS = 6
SECONDS_FOR_ORPHANS = 5
MOST_RUNS = 40
USED_MODULES = [
    *(f"megatron.early_exit.{name}" for name in (
        "checkpoint.exits", "checkpoint.comparison", "checkpoint.hugging_face", "checkpoint.read_model",
        "evaluation.documents", "evaluation.exit_quality", "evaluation.rows", "inference.llm", "training.dry_run",
    )),
    "megatron.core.datasets.indexed_dataset", "transformers.models.llama.modeling_llama",
]  # fmt: skip


def main(folder: Path, words: list[str]) -> None:
    for name in USED_MODULES:
        importlib.import_module(name)

    own_answers._ANSWERS_PER_PART = 2
    whole = _forked([*words, "--output", str(folder / "whole")], lambda: None, folder / "whole.log")
    killed = [*words, "--output", str(folder / "killed")]
    log = folder / "killed.log"
    statuses, orphans = [], []
    # Before every sixth file or folder gets its name (of the model, exits, answers, samples, the manifest), and at last
    # when the training is to begin.
    manifest = folder / "killed/recipe.json"
    while not (manifest.exists() and "training" in json.loads(manifest.read_text())) and len(statuses) < MOST_RUNS:
        statuses.append(_forked(killed, _kill_at_a_rename, log))
    # While the training, a process of its own, is at work: killed, and asked to stop.
    for number in (signal.SIGKILL, signal.SIGTERM):
        metrics = folder / "killed/tuned/metrics.jsonl"
        before = _lines(metrics)
        is_at_work = lambda: _lines(metrics) > before + 1  # noqa: B023
        statuses.append(_forked(killed, lambda: _kill_when(is_at_work, number), log))  # noqa: B023
        orphans += _orphans(folder)
    statuses.append(_forked(killed, lambda: None, log))
    again = _forked(killed, lambda: None, folder / "again.log")
    print(json.dumps({"whole": whole, "killed": statuses, "orphans": orphans, "again": again}))


def _forked(words: list[str], prepare: Callable[[], None], log: Path) -> int:
    """Status of the program in a process of its own; negative: the signal that ended it."""
    if (pid := os.fork()) == 0:
        status = 99
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            prepare()
            status = command_line.main(words)
        except SystemExit as end:
            status = end.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kill_at_a_rename() -> None:
    rename, count = os.replace, 0

    def replace(*names: object) -> None:
        nonlocal count
        count += 1
        if count == RENAMES_BETWEEN_KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)

    os.replace = replace
    recipe.run_training = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def _kill_when(is_due: Callable[[], bool], number: int = signal.SIGKILL) -> None:
    def watch() -> None:
        while not is_due():
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def _orphans(folder: Path) -> list[str]:
    """Command lines of processes that still work in the folder after a while."""
    deadline = time.monotonic() + SECONDS_FOR_ORPHANS
    while True:
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            words = process.info["cmdline"] or []
            if (
                process.info["pid"] != os.getpid()
                and "training_process" in " ".join(words)
                and str(folder) in " ".join(words)
            ):
                found.append(" ".join(words)[:200])
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
