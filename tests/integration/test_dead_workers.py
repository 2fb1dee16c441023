"""Whoever is killed in mid-request: `tools/generate.py` ends at once, its status is not 0, and it leaves nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.test_added_exits import save
from tests.distributed.test_executor import SOON, wait_until_gone
from tests.distributed.workers import run_distributed
from tests.integration.test_training_program import ROOT, environment, torchrun
from tests.reference_checkpoint import decoding_config

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at /proc")]

NUM_PROMPTS = 20_000
"""More than can be answered before the kill."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    run_distributed(1, save, cfg=decoding_config(), folder=folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("".join(f"{number % 50} 7\n" for number in range(NUM_PROMPTS)))
    return file


def start(*words: object, launcher: list[str] = [sys.executable], **streams: int) -> subprocess.Popen:  # noqa: B006
    tool = [*launcher, "tools/generate.py", "--tensor-model-parallel-size", "2", "--json", *map(str, words)]
    return subprocess.Popen(tool, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **streams)  # fmt: skip


def complaints(errors: str) -> str:
    """What follows the line that says what keys and values take."""
    first, _, others = errors.partition("\n")
    assert re.fullmatch(r"generate.py: keys and values: .* on each rank", first), errors
    return others


def descendants(pid: int) -> list[int]:
    """All processes below this one, and itself."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(path.name)] = int(parent)
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def rank_of(pid: int) -> int | None:
    """The rank of a worker process, else None."""
    try:
        if b"worker_process" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return None
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next(int(one.partition(b"=")[2]) for one in variables if one.startswith(b"RANK="))


def test_own_workers_answer(checkpoint: Path) -> None:
    process = start("--load", checkpoint, "--prompt", "1 2", "--tokens-to-generate", 5, "--prompt", "3")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, complaints(errors)) == (0, "")
    answers = [json.loads(line) for line in output.splitlines()]
    assert [len(answer["tokens"]) for answer in answers] == [5, 5]


def test_workers_wait_for_what_is_typed(checkpoint: Path) -> None:
    process = start("--load", checkpoint, "--tokens-to-generate", 3, stdin=subprocess.PIPE)
    for prompt in ("1 2", "3"):
        process.stdin.write(prompt + "\n")
        process.stdin.flush()
        assert len(json.loads(process.stdout.readline())["tokens"]) == 3
    process.stdin.close()
    assert (process.wait(timeout=SOON), complaints(process.stderr.read())) == (0, "")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_the_program(checkpoint: Path, prompts: Path, rank: int) -> None:
    process = start("--load", checkpoint, "--prompt-file", prompts, "--tokens-to-generate", 30)
    assert json.loads(process.stdout.readline())["tokens"]
    everyone = descendants(process.pid)
    (victim,) = (pid for pid in everyone if rank_of(pid) == rank)
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    # Not `communicate`, which does not see what `readline` has read ahead.
    output, errors = process.stdout.read(), process.stderr.read()
    assert process.wait(timeout=SOON) == 1
    assert time.monotonic() - killed < SOON
    errors = complaints(errors)
    assert errors == f"generate.py: worker rank {rank} was ended by SIGKILL (was there too little memory?)\n"
    answers = [json.loads(line) for line in output.splitlines()]
    assert len(answers) == NUM_PROMPTS - 1  # each ends in a result or an error
    assert errors.removeprefix("generate.py: ").strip() == answers[-1]["error"] and answers[0]["error"] is None
    assert wait_until_gone(everyone) == []


@pytest.mark.parametrize(("victim", "number", "status"), [
    ("program", signal.SIGKILL, -9), ("program", signal.SIGINT, 130), ("reader", None, 141),
])  # fmt: skip
def test_workers_end_with_the_program(
    checkpoint: Path, prompts: Path, victim: str, number: int | None, status: int
) -> None:
    process = start("--load", checkpoint, "--prompt-file", prompts, "--tokens-to-generate", 30)
    assert json.loads(process.stdout.readline())["tokens"]
    everyone = descendants(process.pid)
    assert len(everyone) == 3
    if number is None:
        process.stdout.close()
    else:
        process.send_signal(number)
    assert process.wait(timeout=SOON) == status
    assert complaints(process.stderr.read()) == ("interrupted\n" if number == signal.SIGINT else "")
    assert wait_until_gone(everyone) == []


def test_ranks_of_torchrun_answer(checkpoint: Path) -> None:
    process = start("--load", checkpoint, "--prompt", "1 2", "--tokens-to-generate", 5, launcher=torchrun(2))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [len(json.loads(line)["tokens"]) for line in output.splitlines()] == [5]


@pytest.mark.parametrize("launcher", [[sys.executable], torchrun(2)], ids=["own processes", "torchrun"])
def test_pipeline_stages_answer(checkpoint: Path, launcher: list[str]) -> None:
    """The last of a flag counts: there is one rank on each of two stages."""
    flags = ("--tensor-model-parallel-size", 1, "--pipeline-model-parallel-size", 2, "--pipeline-layers", 1, 3)
    mode = ("--prompt", "1 2", "--tokens-to-generate", 5, "--use-early-exit", "--early-exit-thres", 0)
    process = start("--load", checkpoint, *flags, *mode, launcher=launcher)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "generate.py: pipeline stages: layers 1 (exit 1), 2 to 4 (exits 2, 3)\n" in errors
    assert re.search("^generate.py: keys and values: .* on each rank$", errors, re.MULTILINE)
    (answer,) = map(json.loads, output.splitlines())
    assert [token["exit_layer"] for token in answer["tokens"]] == [1] * 5


@pytest.mark.parametrize("victim", ["worker of rank 0", "engine", "rank 1"])
def test_a_killed_rank_of_torchrun_ends_the_job(checkpoint: Path, prompts: Path, victim: str) -> None:
    flags = ("--load", checkpoint, "--prompt-file", prompts, "--tokens-to-generate", 30)
    process = start(*flags, launcher=torchrun(2))
    assert json.loads(process.stdout.readline())["tokens"]
    everyone = descendants(process.pid)
    (worker,) = (pid for pid in everyone if rank_of(pid) == 0)
    engine = int(Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1])
    (other,) = (pid for pid in everyone if pid not in (process.pid, worker, engine))
    killed = time.monotonic()
    os.kill({"worker of rank 0": worker, "engine": engine, "rank 1": other}[victim], signal.SIGKILL)
    process.communicate(timeout=60)
    assert time.monotonic() - killed < SOON
    assert process.returncode == 1
    assert wait_until_gone(everyone) == []


@pytest.mark.parametrize("launcher", [[sys.executable], torchrun(3)])
def test_wrong_numbers_of_processes_are_refused_before_anything_is_loaded(launcher: list[str]) -> None:
    job = {"WORLD_SIZE": "3", "RANK": "1"} if len(launcher) == 1 else {}  # in a pod of another job, or ours
    words = [*launcher, "tools/generate.py", "--load", "nowhere", "--prompt", "1", "--tensor-model-parallel-size", "2"]
    run = subprocess.run(words, env=environment() | job, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == (2 if job else 1)
    assert run.stderr.count("but 3 processes were started (WORLD_SIZE)") == 1, run.stderr
