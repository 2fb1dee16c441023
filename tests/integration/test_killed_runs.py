"""Runs that are killed at the worst moments go on bit-equal, and leave no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.configs import VOCAB_SIZE
from tests.data_files import write_token_files
from tests.integration.killed_runs import KINDS, SECONDS_FOR_ORPHANS, in_session
from tests.integration.test_training_program import MODEL, ROOT, TRAINING, environment, torchrun, train

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at /proc")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_runs_go_on_bit_equal(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.killed_runs", str(tmp_path), kind]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-5000:]
    result = json.loads(result.stdout.splitlines()[-1])
    assert result["orphans"] == []
    assert all(result["lives"]["renames"]["killed"])
    assert any(result["lives"]["moments"]["killed"])  # a late moment may come after the end
    for name, life in result["lives"].items():
        assert life["same_parameters"], (name, life)
        assert life["other_iterations"] == [] and life["iterations"] == list(range(1, 9)), (name, life)
        assert life["left"] == ["latest_checkpointed_iteration.txt"], name
        assert set(life["checkpoints"]) <= {f"iter_{n:07d}" for n in (2, 4, 6, 8)}, name
        assert "iter_0000008" in life["checkpoints"], name


def test_killed_ranks_and_a_killed_torchrun_leave_nothing(tmp_path: Path) -> None:
    data, folder = write_token_files(tmp_path, VOCAB_SIZE), tmp_path / "ck"
    latest = folder / "latest_checkpointed_iteration.txt"
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE - 1), "--data-path", data,
             "--eval-iters", "0", "--num-workers", "1", "--save", str(folder), "--load", str(folder),
             "--train-iters", "100000", "--save-interval", "1", "--async-save"]  # fmt: skip
    words = [*torchrun(2), "pretrain_early_exit_gpt.py", *MODEL, *TRAINING, *flags]

    first = start_with_tee(words, tmp_path / "first.log")
    wait_for(latest.exists, 120)
    owner = json.loads((folder / "run.lock").read_text())
    second = train(1, *flags)
    assert second.returncode == 1
    assert f"{folder} is being written by process {owner['pid']} on {owner['host']}, since " in second.stderr
    torchrun_process, ranks = processes_of(first)
    assert owner["pid"] in [rank.pid for rank in ranks]
    assert all(len(rank.children(recursive=True)) <= 1 for rank in ranks), "more than what loads data"
    torchrun_process.send_signal(signal.SIGKILL)
    wait_for(lambda: not in_session(first.pid), SECONDS_FOR_ORPHANS)
    first.wait(timeout=SECONDS_FOR_ORPHANS)

    saved = int(latest.read_text())
    again = start_with_tee(words, tmp_path / "again.log")
    wait_for(lambda: int(latest.read_text()) > saved, 120)
    _, ranks = processes_of(again)
    ranks[1].send_signal(signal.SIGKILL)
    again.wait(timeout=60)  # torchrun looks for dead ranks, ends the others, and nothing keeps the pipe open
    wait_for(lambda: not in_session(again.pid), SECONDS_FOR_ORPHANS)
    assert f"training goes on at iteration {saved}" in (tmp_path / "again.log").read_text()


def start_with_tee(words: list[str], log: Path) -> subprocess.Popen:
    command = ["bash", "-c", 'log=$1; shift; "$@" 2>&1 | tee "$log" >/dev/null', "bash", str(log), *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)


def processes_of(shell: subprocess.Popen) -> tuple[psutil.Process, list[psutil.Process]]:
    """torchrun, and its ranks in order."""
    children = psutil.Process(shell.pid).children()
    (parent,) = (child for child in children if "torch.distributed.run" in " ".join(child.cmdline()))
    return parent, sorted(parent.children(), key=lambda rank: int(rank.environ()["RANK"]))


def wait_for(is_there: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
