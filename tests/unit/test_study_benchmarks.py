"""The benchmarks of plans that run and of tuning: their settings are valid, and what they print follows from times."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import pipeline_plans, tuning_study
from megatron.early_exit.checkpoint.convert_command import build_parser
from megatron.early_exit.config.validate import problems


@pytest.mark.parametrize("num_stages", [2, 4])
def test_variants_of_plans_are_valid_runs(num_stages: int) -> None:
    settings = pipeline_plans.Settings()
    for name, pipeline in settings.variants.items():
        config = pipeline_plans.run_config(settings, num_stages, name != "plain", pipeline)
        assert problems(config, num_stages) == []
    assert config.exit_stages == ((0,) if num_stages == 2 else (1, 2))


def test_ratios_of_plans_are_of_pairs() -> None:
    settings = pipeline_plans.Settings(num_microbatches=10)
    measured = {
        "seconds": {"plain": [1.0, 2.0, 4.0], "filled": [1.1, 2.4, 4.4]},
        "fill": {"filled": [1, 2]},
        "predicted_sec": {"filled": 1.2},
    }
    plain, filled = pipeline_plans.compare(4, measured, settings)
    assert plain == ["PP 4 plain", 2000.0, 1.0, "0 + 0", 1.0, None]
    assert filled[:1] + filled[3:] == ["PP 4 filled", "1 + 2", 1.3, 0.5]
    assert filled[2] == pytest.approx(1.1)  # of 1.1, 1.2 and 1.1


def test_the_study_asks_for_exits_that_there_are() -> None:
    folders = [variant.folder for variant in tuning_study.VARIANTS]
    assert len(set(folders)) == len(folders)
    kinds = {(variant.exits, variant.init) for variant in tuning_study.VARIANTS}
    assert len(kinds) == 6  # three kinds of exits, copied and random
    for variant in tuning_study.VARIANTS:
        words = ["add-exits", "--load", "a", "--save", "b", "--init", variant.init, "--exit-layer-nums", "8"]
        assert build_parser().parse_args([*words, *variant.exits]).exit_layer_nums == [8]


def test_the_study_draws_every_variant(tmp_path: Path) -> None:
    head = {"loss": 3.0, "agreement": 0.5}
    results = [
        {"variant": {"name": variant.name}, "curve": [{"tokens": n, "heads": [head] * 3} for n in (0, 1000)]}
        for variant in tuning_study.VARIANTS
    ]
    tuning_study.draw(results, (8, 15, 22), tmp_path / "study.svg")
    text = (tmp_path / "study.svg").read_text()
    assert all(f"<!-- {variant.name} -->" in text for variant in tuning_study.VARIANTS)
