"""`pretrain` called from Python refuses settings that cannot work, with all reasons, before it starts anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.settings import normalised
from megatron.early_exit.training import pretrain
from tests.configs import make_config

RUNS = {"train_iters": 4, "mock_data": True}
"""What a run needs beside the small configuration."""


@pytest.mark.parametrize(("world_size", "changes", "reasons"), [
    (1, {**RUNS, "mock_data": False}, ["no data: give --data-path"]),
    (3, {**RUNS, "pipeline_model_parallel_size": 2, "global_batch_size": 5}, ["3 ranks", "global-batch-size"]),
    (1, {**RUNS, "load": "/nowhere"}, ["--load /nowhere"]),
    (2, {**RUNS, "pipeline_model_parallel_size": 2, "global_batch_size": 4, "fill_explicit_bubbles": True,
         "num_fill_warmup_microbatches": 9, "num_fill_cooldown_microbatches": 0}, ["fill"]),
])  # fmt: skip
def test_settings_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch, world_size: int, changes: dict[str, Any], reasons: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    config = make_config(**changes)
    with pytest.raises(ValueError) as refused:
        pretrain.pretrain(config)
    assert all(reason in str(refused.value) for reason in reasons)
    assert not torch.distributed.is_initialized()


def test_all_problems_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError) as refused:
        pretrain.pretrain(make_config(global_batch_size=3))
    assert len(refused.value.problems) >= 3  # no data, no length, a batch that microbatches do not divide


def test_what_is_left_open_is_filled_in(caplog: pytest.LogCaptureFixture) -> None:
    config = pretrain.checked(make_config(**RUNS, sequence_parallel=True, load_iteration=0), world_size=1)
    assert not config.parallel.sequence_parallel and "--sequence-parallel is turned off" in caplog.text
    assert config.checkpoint.load_iteration is None


def test_stages_that_are_tuned() -> None:
    config = make_config(tune_exit=True, use_exit_norm=True, pipeline_model_parallel_size=4, exit_layer_nums=(1, 2))
    assert normalised(config, pytest.fail).parallel.num_stages == 2
