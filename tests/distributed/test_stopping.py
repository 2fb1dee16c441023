"""SIGTERM while a validation runs: what is due is saved before it, and the run ends without waiting for its end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.model.build import Model
from megatron.early_exit.model.exit_losses import ExitStrategy
from megatron.early_exit.model.exit_strategies import Evaluation
from tests.configs import VOCAB_SIZE, make_config, make_training_config
from tests.data_files import write_token_files
from tests.distributed.workers import run_distributed


def stopped_run(cfg: RunConfig, signalled_rank: int, signalled_pass: int) -> tuple[int, list[str], list[int]]:
    """Train; one rank gets SIGTERM in one pass of the first validation. Returns how many passes of validation ran, the
    last saved iteration that each of them saw, and the iterations that were saved."""
    from megatron.early_exit.training import pretrain
    from tests.distributed.parallel_model import release_models

    handler, run_schedule, seen = signal.getsignal(signal.SIGTERM), pretrain.run_schedule, []
    latest = Path(cfg.checkpoint.save) / "latest_checkpointed_iteration.txt"

    def schedule(model: Model, iterators: list, strategy: ExitStrategy, **sizes: int) -> None:
        if isinstance(strategy, Evaluation):
            torch.distributed.barrier()
            seen.append(latest.read_text() if latest.exists() else "none")
            if torch.distributed.get_rank() == signalled_rank and len(seen) == signalled_pass:
                os.kill(os.getpid(), signal.SIGTERM)
        run_schedule(model, iterators, strategy, **sizes)

    pretrain.run_schedule, saved = schedule, []
    try:
        run = pretrain.build_run(cfg)
        save = run.saver.save
        run.saver.save = lambda *args: (saved.append(run.state.iteration), save(*args))
        assert pretrain.train(run) is False
        run.reporter.close()
        return len(seen), seen, saved
    finally:
        pretrain.run_schedule = run_schedule
        signal.signal(signal.SIGTERM, handler)
        release_models()


@pytest.mark.parametrize(("save_interval", "before"), [(2, "2"), (None, "none")])
def test_sigterm_in_a_validation(tmp_path: Path, save_interval: int | None, before: str) -> None:
    data = write_token_files(tmp_path / "data", VOCAB_SIZE)
    cfg = make_training_config(
        data, tmp_path, save=str(tmp_path / "ck"), save_interval=save_interval, eval_interval=2, eval_iters=20,
        exit_signal_handler=True, pipeline_model_parallel_size=2,
    )  # fmt: skip
    for passes, seen, saved in run_distributed(2, stopped_run, cfg=cfg, signalled_rank=1, signalled_pass=3):
        assert passes == 3
        assert seen == [before] * 3
        assert saved == [2]  # once
    assert (tmp_path / "ck" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert '"valid"' not in (tmp_path / "metrics.jsonl").read_text()


def timeout_of_groups(cfg: RunConfig) -> float:
    """Minutes that core is told."""
    from megatron.early_exit.platform import distributed

    with pytest.MonkeyPatch.context() as patch:
        told: dict = {}
        patch.setattr(distributed.parallel_state, "initialize_model_parallel", lambda **kwargs: told.update(kwargs))
        patch.setattr(distributed, "seed_generators", lambda seed: None)
        distributed.initialize_model_parallel(cfg.parallel, cfg.model.num_layers, cfg.training.seed)
    return told["distributed_timeout_minutes"]


def test_parts_of_a_minute_are_kept() -> None:
    assert run_distributed(1, timeout_of_groups, cfg=make_config(distributed_timeout_minutes=0.25)) == [0.25]
