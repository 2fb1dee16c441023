"""Runs that are killed at the worst moments go on bit-equal, and leave no process behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.killed_runs import KINDS
from tests.integration.test_training_program import ROOT, environment

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
