"""What several files train on and read; none of them changes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.configs import VOCAB_SIZE, make_training_config
from tests.data_files import write_token_files
from tests.distributed.workers import run_distributed


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of a small data set."""
    return write_token_files(tmp_path_factory.mktemp("data"), VOCAB_SIZE)


@pytest.fixture(scope="session")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a model that was trained for an iteration."""
    from tests.distributed.training_runs import training_run

    folder = tmp_path_factory.mktemp("trained")
    cfg = make_training_config(data, folder, save=str(folder / "ck"), train_iters=1, lr_decay_iters=9)
    run_distributed(1, training_run, cfg=cfg)
    return folder / "ck"
