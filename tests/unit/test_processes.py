"""Processes end with their parents."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from megatron.early_exit.platform import processes

# A parent that starts a child, says its id, and waits.
_PARENT = """
import os, sys, time
from megatron.early_exit.platform import processes
if {watching}:
    processes._ask_linux = lambda: False
me = os.getpid()
child = os.fork()
if child == 0:
    if {late}:
        time.sleep(1)
    processes.die_with_parent(me)
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at /proc")
@pytest.mark.parametrize(("watching", "late"), [(False, False), (True, False), (False, True)])
def test_a_child_is_killed_when_its_parent_is(watching: bool, late: bool) -> None:
    code = _PARENT.format(watching=watching, late=late)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    if not late:
        time.sleep(0.5)
    assert _is_alive(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while _is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(child)


def test_a_rank_is_bound_to_torchrun_and_a_program_of_a_shell_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(processes, "die_with_parent", lambda: calls.append("bound"))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    processes.die_with_torchrun()
    assert calls == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    processes.die_with_torchrun()
    assert calls == ["bound"]
