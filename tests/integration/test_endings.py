"""Training that ends before its time, from the command line: Ctrl-C, a closed output, a rank that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.integration.test_training_program import ROOT, environment, torchrun

FLAGS = [
    "pretrain_early_exit_gpt.py", "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4",
    "--seq-length", "32", "--mock-data", "--vocab-size", "128", "--exit-layer-nums", "1", "--micro-batch-size", "2",
    "--global-batch-size", "4", "--lr", "1e-3", "--log-interval", "1", "--num-workers", "0", "--eval-iters", "0",
    "--train-iters", "100000",
]  # fmt: skip


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


def test_ctrl_c_and_a_closed_output_name_the_last_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, *FLAGS, "--save", str(tmp_path / "ck"), "--save-interval", "3"]
    process = start(command)
    wait_for(process, "saved iteration 3 ")
    wait_for(process, "iteration        4/")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    last = (tmp_path / "ck" / "latest_checkpointed_iteration.txt").read_text()
    assert process.returncode == 130
    assert errors == f"interrupted; last checkpoint: iteration {last} in {tmp_path / 'ck'}\n"

    process = start([*command, "--load", str(tmp_path / "ck")])
    wait_for(process, "iteration        ")
    process.stdout.close()  # as `| head` does
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 1
    last = (tmp_path / "ck" / "latest_checkpointed_iteration.txt").read_text()
    assert errors == (f"error: standard output is closed; last checkpoint: iteration {last} in {tmp_path / 'ck'}\n")


def test_ctrl_c_under_torchrun_is_said_once(tmp_path: Path) -> None:
    flags = ["--pipeline-model-parallel-size", "2", "--metrics-file", str(tmp_path / "m.jsonl")]
    process = start([*torchrun(2), *FLAGS, *flags])
    wait_for(process, "iteration        2/")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("interrupted; no checkpoint was saved") == 1
    assert "rank 1 failed" not in errors and "rank 0 failed" not in errors


def test_a_killed_rank_is_said_in_a_sentence(tmp_path: Path) -> None:
    """Both ranks are ours to start here: torchrun would end the other one, maybe before it notices."""
    flags = ["--pipeline-model-parallel-size", "2", "--metrics-file", str(tmp_path / "m.jsonl")]
    command = [sys.executable, *FLAGS, *flags]
    port = torchrun(2)[-1]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment() | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    wait_for(ranks[0], "iteration        2/")
    ranks[1].kill()
    output, errors = ranks[0].communicate(timeout=60)
    ranks[1].communicate()
    assert ranks[0].returncode == 1
    first = errors.splitlines()[0]
    assert first.startswith("error: rank 0 lost the connection to another rank in ") and "--load" in first
    assert "Traceback" in errors
