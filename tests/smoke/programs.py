"""Runs programs of the project one after another in one process, as from the command line.

    python -m tests.smoke.programs LOG.jsonl < programs

Importing PyTorch and core takes several seconds a process, so all programs share one. Standard input: one JSON list of
words a line, the path of the program first. For each a line is added to the log: words, status, output, errors,
seconds. Stops after the first that fails.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def results_of(steps: Mapping[str, str], folder: Path, timeout: float, **variables: str) -> dict[str, dict]:
    """Of all steps up to the first that failed, by their names. steps: command lines, in which F/ stands for `folder`;
    variables: of the environment."""
    programs = [[word.replace("F/", f"{folder}/") for word in step.split()] for step in steps.values()]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "RANK")}
    process = subprocess.run(
        [sys.executable, "-m", "tests.smoke.programs", str(folder / "log.jsonl")], cwd=ROOT,
        env=environment | variables, input="\n".join(map(json.dumps, programs)), capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert lines, process.stderr
    return dict(zip(steps, map(json.loads, lines)))


def run(words: list[str]) -> dict:
    """Status, output and errors of one program, and what it took."""
    saved = [os.dup(number) for number in (1, 2)]
    files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in saved]  # noqa: SIM115
    start = time.perf_counter()
    for number, file in zip((1, 2), files):
        os.dup2(file.fileno(), number)
    sys.argv[:] = words
    try:
        runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = "traceback"
    finally:
        _end_process_groups()
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), saved):
            os.dup2(copy, number)
            os.close(copy)
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read())
        file.close()
    return {
        "words": words, "status": status, "output": texts[0], "errors": texts[1],
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _end_process_groups() -> None:
    """As the end of a process would."""
    if "megatron.core.parallel_state" in sys.modules:
        from megatron.early_exit.platform.distributed import destroy_distributed

        destroy_distributed()


def main() -> None:
    with open(sys.argv[1], "w", encoding="utf-8") as log:
        for line in sys.stdin.read().splitlines():
            result = run(json.loads(line))
            log.write(json.dumps(result) + "\n")
            log.flush()
            if result["status"] != 0:
                break


if __name__ == "__main__":
    main()
