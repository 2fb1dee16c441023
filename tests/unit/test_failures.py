"""Ranks that are gone or late, in a sentence: with the errors that PyTorch really raises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.platform.failures import lost_loader, lost_peer
from megatron.early_exit.training import program
from tests.configs import make_config
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]

# Rank 0 waits for rank 1, which never starts (absent), comes to no operation (late), or ends before one (lost). All are
# children of one process that has imported PyTorch.
RANKS = """
import datetime, os, sys, time, torch
from torch import distributed
from megatron.early_exit.platform.failures import lost_peer
def run(case, rank):
    joining = datetime.timedelta(seconds=3 if case == "absent" else 90)  # ranks start at different times
    try:
        distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=joining)
        group = distributed.new_group(timeout=datetime.timedelta(seconds=3))
        if rank == 0:
            for _ in range(2):
                distributed.all_reduce(torch.ones(4), group=group)
        elif case == "late":
            time.sleep(6)
    except Exception as error:
        print(case, lost_peer(error, rank, 3 / 60), flush=True)
children = []
for port, case in zip(sys.argv[1:], ("absent", "late", "lost")):
    for rank in (0, 1) if case != "absent" else (0,):
        child = os.fork()
        if child == 0:
            os.environ["MASTER_PORT"] = port
            run(case, rank)
            os._exit(0)
        children.append(child)
for child in children:
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def sentences() -> dict[str, str]:
    """What rank 0 says in each case."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-W", "ignore", "-c", RANKS, *(str(free_port()) for _ in range(3))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=True)
    return dict(line.split(" ", 1) for line in result.stdout.splitlines())


@pytest.mark.parametrize(("case", "parts"), [
    ("late", ["rank 0 waited longer than --distributed-timeout-minutes", "in all_reduce", "raise the flag"]),
    ("absent", ["rank 0 waited longer than --distributed-timeout-minutes", "init_process_group"]),
    ("lost", ["rank 0 lost the connection to another rank in all_reduce", "--load"]),
])  # fmt: skip
def test_what_is_said(sentences: dict[str, str], case: str, parts: list[str]) -> None:
    assert all(part in sentences[case] for part in parts), sentences[case]


@pytest.mark.parametrize("error", [
    RuntimeError("shape mismatch: 3 and 4"),
    RuntimeError("timeout of the web page"),
    TimeoutError("gloo timed out"),
])  # fmt: skip
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert lost_peer(error, 0, 10.0) is None and lost_loader(error) is None


class Killed(torch.utils.data.Dataset):
    """A dataset whose loading process is killed."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_process_that_loads_data_is_killed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def pretrain(config: RunConfig, is_checked: bool) -> None:
        next(iter(torch.utils.data.DataLoader(Killed(), num_workers=1)))

    monkeypatch.setattr("megatron.early_exit.training.pretrain.pretrain", pretrain)
    monkeypatch.setattr(program, "abort", lambda: sys.exit(1))
    with pytest.raises(SystemExit):
        program.train(make_config(), 1)
    said = capsys.readouterr().err
    assert said.startswith("error on rank 1: a process that loads data has ended (DataLoader worker")
    assert "--num-workers" in said and "Traceback" not in said
