"""The benchmark of simulated pipelines: its cases, its verdicts, and one row."""

from __future__ import annotations

import pytest

from benchmarks import pipeline_simulation
from megatron.early_exit.schedules.cases import CASES, setup_of_case
from megatron.early_exit.schedules.comparison import compare


def test_cases_have_the_papers_tensor_parallel_sizes() -> None:
    setups = pipeline_simulation.all_cases()
    assert set(setups) == {f"{n} TP {size}" for n in ("1.3B", "7B", "13B", "30B") for size in (1, 2, 4)} | {
        "70B",
        "405B",
    }
    for setup in setups.values():
        batch = setup.config.training.global_batch_size
        replicas = setup.config.parallel.data_parallel_size(setup.world_size)
        assert setup.num_microbatches * setup.config.training.micro_batch_size * replicas == batch
    assert setups["405B"].world_size == setups["70B"].world_size == 1024
    assert len(CASES) == 6


def test_the_last_stage_hides_all_exits() -> None:
    plain, _, in_idle_time, _ = compare(setup_of_case("7B").with_num_microbatches(8))
    assert in_idle_time.iteration_sec == pytest.approx(plain.iteration_sec)


def test_a_row_and_its_verdicts() -> None:
    row = pipeline_simulation.measure(setup_of_case("70B"))
    assert row["num_microbatches"] == 16 and row["fits"]
    assert 0.2 < row["plain_mfu"] < 0.6
    # Two exits of 6 h V.
    assert row["added_flops_share"] == pytest.approx(0.0281, abs=1e-3)
    assert 0 <= row["time_added_in_idle_time"] <= row["time_added_in_backward"]
    goals = pipeline_simulation.goals(
        {"70B": row, "other": row | {"time_added_in_idle_time": 0.02, "memory_added": 0.1}}
    )
    met = [one["met"] for one in goals.values()]
    assert met == [False, False]
    assert [check["met"] for check in next(iter(goals.values()))["checks"]] == [True, False]
