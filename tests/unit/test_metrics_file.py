"""metrics.jsonl: a killed run leaves half a line, which neither the next run nor a reader stumbles over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron.early_exit.data.metrics_file import MetricsFile, read_metrics
from megatron.early_exit.evaluation.loss_curves import read_losses
from megatron.early_exit.training.reporting import training_line

ROOT = Path(__file__).parents[2]
RECORDS = [{"kind": "train", "iteration": i, "lm_loss": 2.5 / i, "exit_loss/layer_2": 3.0} for i in (1, 2)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    for record in RECORDS:
        file.append(record)
    file.close()
    return tmp_path / "run" / "metrics.jsonl"


@pytest.mark.parametrize("left", [0, 5, 30])
def test_zeros_of_a_power_failure_are_cut_off(path: Path, left: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:left] + bytes(100))
    assert list(read_metrics(path)) == RECORDS
    MetricsFile(path).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("left", [1, 5, 9, 30, 60])
def test_a_torn_last_line_is_cut_off_and_passed_over(path: Path, left: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[-1][:left])
    assert list(read_metrics(path)) == RECORDS
    file = MetricsFile(path)
    file.append(RECORDS[0])
    file.close()
    assert path.read_bytes() == whole + whole.splitlines(keepends=True)[0]


def test_a_whole_last_line_without_its_end_is_kept(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert list(read_metrics(path)) == RECORDS
    MetricsFile(path).close()
    assert path.read_bytes() == whole


def test_files_of_something_else_are_left_alone(path: Path) -> None:
    for content in (b"my notes", b"a line\nand my notes", b"my notes\n", b'{"text": "a"}\nmy notes\n'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="does not hold metrics: it ends in b'.*my notes'. Give another file"):
            MetricsFile(path)
        assert path.read_bytes() == content


def test_what_cannot_be_written_is_named(path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot be written to .*run \(Is a directory\): give another --metrics-f"):
        MetricsFile(path.parent)
    with pytest.raises(OSError, match=r"metrics cannot be written to .*/x \((Not a directory|File exists)\): give"):
        MetricsFile(path / "x")
    file = MetricsFile(path)
    file._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=r"metrics.jsonl \(No space left on device\): free some space"):
        file.append(RECORDS[0])


def test_damage_inside_is_named_with_its_line(path: Path) -> None:
    path.write_bytes(b'{"kind": "train", "iter\n' + path.read_bytes())
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: bad JSON"):
        read_losses(path)
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1] + b"[1]\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:3: no record of metrics: \[1\]"):
        read_losses(path)


def test_plot_losses_says_what_is_wrong_without_a_traceback(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/plot_losses.py"), str(path), "--output", str(tmp_path / "losses.png")]
    done = subprocess.run([*command, "--kind", "valid"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "no losses of kind 'valid'" in done.stderr
    path.write_bytes(path.read_bytes() + b'{"kind": "tr')
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_a_line_has_losses_with_divergences_beside_them() -> None:
    values = {
        "consumed_samples": 8, "iteration_ms": 1.0, "learning_rate": 0.1, "global_batch_size": 8, "lm_loss": 2.0,
        "lm_accuracy": 0.5, "exit_loss/layer_2": 3.0, "exit_accuracy/layer_2": 0.25, "exit_divergence/layer_2": 0.5,
        "skipped_iterations": 0,
    }  # fmt: skip
    expected = " | lm loss: 2.000000 | early loss [2]: 3.000000 | early divergence [2]: 0.500000 | skipped"
    assert expected in training_line(1, 9, values)
