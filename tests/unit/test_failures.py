"""Ranks that are gone or late, in a sentence: with the errors that PyTorch really raises."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.early_exit.platform.failures import lost_peer

ROOT = Path(__file__).resolve().parents[2]

# Rank 0 waits for rank 1, which comes to no operation (late), ends before one (lost), or never starts (absent).
RANKS = """
import datetime, os, sys, time, torch
from torch import distributed
from megatron.early_exit.platform.failures import lost_peer
case, rank = sys.argv[1], int(sys.argv[2])
def join():
    distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=2))
try:
    join()
    if rank == 1:
        time.sleep(4 if case == "late" else 0)
        os._exit(0)
    for _ in range(2):
        distributed.all_reduce(torch.ones(4))
except Exception as error:
    print(lost_peer(error, rank, 2 / 60), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def sentences() -> dict[str, str]:
    """What rank 0 says in each case. All run at once."""
    processes = {}
    for case, ranks in {"late": (0, 1), "lost": (0, 1), "absent": (0,)}.items():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in ranks:
            command = [sys.executable, "-W", "ignore", "-c", RANKS, case, str(rank)]
            processes[case, rank] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    said = {key: process.communicate(timeout=90)[0] for key, process in processes.items()}
    return {case: said[case, 0] for case in ("late", "lost", "absent")}


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
    assert lost_peer(error, 0, 10.0) is None
