"""The GPU measurements' control flow at toy size: rows as they come, resuming, time limits, requirements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import requirements
from benchmarks.gpu.record import Record, table

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"toy": True, "device": "cpu", "seed": 1}


def record(folder: Path, seconds: float = 100, settings: dict = SETTINGS, again: bool = False) -> Record:
    return Record("part", folder, settings, time.time() + seconds, again)


def test_a_part_that_is_cut_goes_on_where_it_was(tmp_path: Path) -> None:
    first = record(tmp_path)
    assert first.wants("a")
    first.add("a, row 1", {"speed": 1.5, "raw": [1, 2]})
    first.finish("a")
    first.add("b, row 1", {"speed": 2.0})  # cut in the middle of b
    second = record(tmp_path)
    assert not second.wants("a") and second.wants("b")
    assert set(second.rows) == {"a, row 1", "b, row 1"}
    assert record(tmp_path, settings=SETTINGS | {"seed": 2}).rows == {}, "other settings"
    assert record(tmp_path, again=True).wants("a")


def test_rows_of_other_code_are_not_mixed_in(tmp_path: Path) -> None:
    first = record(tmp_path)
    first.add("a", {"speed": 1.0})
    document = json.loads(first.path.read_text()) | {"commit": "another"}
    first.path.write_text(json.dumps(document))
    assert record(tmp_path).rows == {}
    first.path.write_text("{ cut")
    assert record(tmp_path).rows == {}


def test_what_there_is_no_time_for_is_named_until_it_is_done(tmp_path: Path) -> None:
    late = record(tmp_path, seconds=-1)
    assert not late.wants("a")
    assert record(tmp_path).left_out == ["a"]
    in_time = record(tmp_path)
    assert in_time.wants("a")
    in_time.finish("a")
    assert record(tmp_path).left_out == []


def test_table_has_all_columns_and_no_lists() -> None:
    text = table({"results": {"a": {"x": 1.0, "raw": [1]}, "b": {"y": True}}})
    header, _, a, b = text.splitlines()
    assert header.split() == ["x", "y"] and a.split() == ["a", "1.000", "-"] and b.split() == ["b", "-", "yes"]


@pytest.mark.parametrize(("python", "core"), [((3, 11), "==0.16.1"), ((3, 12), ">=0.19,<0.20")])
def test_requirements_follow_the_python_version_and_leave_torch_alone(python: tuple[int, int], core: str) -> None:
    lines = requirements.requirements(python)
    assert [line for line in lines if line.startswith("megatron-core")] == [f"megatron-core{core}"]
    assert not any(line.startswith("torch") for line in lines)
    assert any(line.startswith("pytest") for line in lines)
    assert requirements.missing(sys.version_info[:2]) == [], "the environment of the tests has all of them"


@pytest.mark.slow
def test_all_parts_run_at_toy_size(tmp_path: Path) -> None:
    environment = os.environ | {
        "RESULTS": str(tmp_path), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PACKAGES": str(tmp_path / "packages"), "WHEELS": str(tmp_path / "none"),
    }  # fmt: skip
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    run = lambda *arguments: subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    measured = run("all", "--toy")
    assert measured.returncode == 0, measured.stderr[-3000:]
    documents = {path.name.split("_")[1]: json.loads(path.read_text()) for path in tmp_path.glob("gpu_*.json")}
    assert set(documents) == {"tests", "training", "decoding"}
    training, decoding = documents["training"]["results"], documents["decoding"]["results"]
    assert training["1.3B ee_2"]["time_over_plain"] > 0 and training["1.3B ee_2"]["added_peak_mib"] > 0
    # Exits must not change the function of the model; naive exits compute the same.
    assert training["1.3B naive_2"]["final_loss"] == pytest.approx(training["1.3B ee_2"]["final_loss"], rel=1e-3)
    assert decoding["batch 2 full, ours"]["same_tokens"] == 1.0
    assert decoding["batch 1 early exit, 90% leave"]["layer_runs_saved"] > 0
    assert decoding["batch 1 speculation, exit 2"]["agreement"] == 1.0, "speculation is lossless"
    assert documents["tests"]["results"]["test_decoding"]["failed"] == 0
    assert all(not document["cases"]["left_out"] for document in documents.values())
    shown = run("table")
    assert shown.returncode == 0 and "1.3B ee_2" in shown.stdout


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "training", "--results", str(tmp_path)], cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1 and "no CUDA device" in run.stderr and not list(tmp_path.iterdir())
