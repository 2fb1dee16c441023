"""Comparing two source trees: intervals by hand, verdicts that follow from times, processes of the right tree."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import common, compare_trees
from benchmarks.compare_trees import Case, Tree


def test_mean_ratio_by_hand() -> None:
    found = common.mean_ratio([math.e, math.e**3], [1.0, 1.0])  # logarithms 1 and 3: mean 2, standard error 1
    assert found["ratio"] == pytest.approx(math.e**2)
    assert [math.log(found[end]) for end in ("low", "high")] == pytest.approx([2 - 12.706, 2 + 12.706], abs=1e-3)
    with pytest.raises(ValueError, match="1 pairs"):
        common.mean_ratio([1.0], [1.0])


def case(factors: list[float]) -> Case:
    """A mode whose new runs take `factors` times as long as the old ones, which differ among themselves."""
    one = Case("full", 1, {})
    for number, factor in enumerate(factors, start=1):
        for name, seconds in (("old", number), ("new", number * factor)):
            one.runs[name].append({
                "wall": seconds, "cpu": seconds, "steps": 10, "tokens": 10, "ids": [[1]], "layer_runs": 4,
                "exit_layers": [],
            })  # fmt: skip
    return one


@pytest.mark.parametrize(("factors", "is_met"), [
    ([1.0, 1.01, 0.99, 1.0], True),
    ([1.02, 1.03, 1.02, 1.03], True),
    ([1.06, 1.05, 1.07, 1.06], False),
    ([0.7, 1.3, 0.8, 1.2], False),  # nothing is known
])  # fmt: skip
def test_a_mode_passes_if_its_interval_excludes_the_loss(factors: list[float], is_met: bool) -> None:
    row = case(factors).row()
    assert row["cpu"]["ratio"] == pytest.approx(math.prod(factors) ** 0.25)
    assert row["step_microseconds"][0] == pytest.approx(1e6 * 0.25)
    (verdict,) = compare_trees.goals({"tiny": [row]}).values()
    assert verdict["met"] == is_met


def test_what_is_no_tree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--old .* is not a source tree"):
        Tree("old", tmp_path)


def test_a_process_must_run_the_files_of_its_tree(tmp_path: Path) -> None:
    (tmp_path / "megatron/early_exit/inference").mkdir(parents=True)  # an empty folder: the package is another
    tree = Tree("old", tmp_path)
    with pytest.raises(RuntimeError, match="which is not of that tree"), tree:
        pass
    assert tree.process.poll() == 0, "the process has ended"
