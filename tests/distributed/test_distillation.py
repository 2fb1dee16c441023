"""Tuning towards the final head over any layout: gradients are plain autograd's, weights those of one rank."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path

import pytest
import torch

from megatron.early_exit.checkpoint.tensors import EXIT_HEAD
from megatron.early_exit.config.run import RunConfig
from tests.configs import VOCAB_SIZE
from tests.distributed.test_tuning import HEADS, TP2, UNTIED, base_model, tune, weights_of
from tests.distributed.tuned_exits import compare_with_reference, tuning_config
from tests.distributed.workers import run_distributed

PP2, PP4 = ({"pipeline_model_parallel_size": size} for size in (2, 4))
SP = {**TP2, "sequence_parallel": True}
MLP, BLOCK, OUTPUT = HEADS["mlp"], HEADS["block"], {"untie_exit_output_weights": True}


@pytest.mark.parametrize(("world_size", "share", "changes"), [
    (1, 0.4, MLP),
    (1, 1.0, {**MLP, **UNTIED}),
    (2, 1.0, {**MLP, **SP}),
    (2, 0.5, {**MLP, **PP2, "exit_loss_token_fraction": (0.5, 1.0)}),
    (2, 1.0, {**BLOCK, **PP2, "exit_layer_nums": (1, 2)}),  # frozen copy of the embedding; no exit on the last stage
    (2, 0.3, {**OUTPUT, **UNTIED, **PP2}),
    (2, 1.0, {**HEADS["norm"], **UNTIED, **PP2, "exit_layer_nums": (3, 4)}),
    (2, 1.0, {**HEADS["dynamic"], **PP2}),
    (2, 0.5, {**HEADS["pre_exit"], **PP2, "exit_layer_nums": (2, 3)}),
    (4, 0.5, {**MLP, **PP4}),  # nothing comes back to stage 0
    (4, 1.0, {**BLOCK, **UNTIED, **PP4, "exit_layer_nums": (1, 3)}),  # stage 1 passes on
    (4, 0.7, {**MLP, **PP2, **SP}),
    (4, 1.0, {**OUTPUT, **UNTIED, **PP2, **TP2, "exit_layer_nums": (2,)}),
    (4, 0.5, {"use_exit_block": (True, False), "use_exit_norm": True, "untie_exit_output_weights": (True, False),
              **PP2}),
], ids=str)  # fmt: skip
def test_gradients_are_those_of_plain_autograd(world_size: int, share: float, changes: dict) -> None:
    cfg = tuning_config(tune_exit_distillation=share, **changes)
    num_microbatches = 10 if world_size == 4 else 3
    run_distributed(world_size, compare_with_reference, cfg=cfg, num_microbatches=num_microbatches)


LOSSES = ("exit_loss/", "exit_divergence/", "grad_norm", "loss_scale")


def losses(log: list[dict]) -> list[dict]:
    return [{key: line[key] for key in line if key.startswith(LOSSES)} for line in log]


@pytest.mark.parametrize(("world_size", "of_model", "changes"), [
    (2, MLP, PP2),
    (2, {**OUTPUT, **UNTIED, "exit_layer_nums": (1, 2)}, {**PP2, "eval_iters": 1, "eval_interval": 3}),
    (4, {**BLOCK, **UNTIED, "hidden_dropout": 0.1}, {**PP2, **SP}),
    (4, {**OUTPUT, "bf16": True}, {**PP2, "use_distributed_optimizer": True}),
], ids=str)  # fmt: skip
def test_a_whole_run(data: str, tmp_path: Path, world_size: int, of_model: dict, changes: dict) -> None:
    """Stopped and resumed it is, to the last bit, the run on kept hidden states that never stopped; and one rank's."""
    base = base_model(data, tmp_path / "base", **of_model)
    settings = {**of_model, **changes, "tune_exit_distillation": 0.5}
    kept = tune(data, tmp_path / "kept", base, world_size, **settings, cache_hidden_states=str(tmp_path / "cache"))
    tune(data, tmp_path / "live", base, world_size, **settings, exit_interval=3)
    live = tune(data, tmp_path / "live", base, world_size, **settings)
    assert [line["iteration"] for line in live if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert losses(live) == losses(kept) and losses(live)[0]
    divergences = {line["kind"]: [key for key in line if key.startswith("exit_divergence/")] for line in live}
    assert len(divergences.pop("train")) == 2 and not any(divergences.values()), "validation has the text's losses"
    before, one, two = (weights_of(folder) for folder in (base, tmp_path / "live/ck", tmp_path / "kept/ck"))
    assert set(before) == set(one) == set(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name
        assert torch.equal(one[name], before[name]) == (EXIT_HEAD not in name), name
    if not of_model.keys() & {"hidden_dropout", "bf16"}:  # these depend on the layout
        alone = {**of_model, "tune_exit_distillation": 0.5}
        tune(data, tmp_path / "alone", base, **alone)
        for name, value in weights_of(tmp_path / "alone/ck").items():
            assert torch.allclose(value, one[name], rtol=1e-4, atol=1e-6), name


def test_stages_after_the_last_exit_need_not_run_again(data: str, tmp_path: Path) -> None:
    """What the final head reads is kept by a run of all stages. Then one rank is enough, with a frozen copy of the
    final output weight, and ends with the same weights; without the files it is refused."""
    of_model = {**OUTPUT, **UNTIED, "exit_layer_nums": (1, 2)}
    base = base_model(data, tmp_path / "base", **of_model)
    settings = {**of_model, **PP2, "tune_exit_distillation": 1.0, "cache_hidden_states": str(tmp_path / "cache")}
    first_stage = {"tune_exit_pipeline_parallel_size": 1}
    with pytest.raises(Exception, match="lacks what the final head reads of 48 of 48 samples.*Keep it first"):
        tune(data, tmp_path / "refused", base, 1, **settings, **first_stage)
    two = tune(data, tmp_path / "two", base, 2, **settings)
    one = tune(data, tmp_path / "one", base, 1, **settings, **first_stage)
    assert losses(one) == losses(two)
    on_one, on_two = weights_of(tmp_path / "one/ck"), weights_of(tmp_path / "two/ck")
    assert set(on_one) == set(on_two) and all(torch.equal(on_one[name], on_two[name]) for name in on_one)


def first_rank_waits(cfg: RunConfig, second_rank: str) -> tuple[float, str]:
    """(seconds, stack) of the error on a stage that waits for the final head's input, which does not come."""
    from megatron.early_exit.training.planned_pipeline import PlannedPipeline
    from tests.distributed.parallel_model import build_with_reference_parameters, iterators, layout
    from tests.reference import make_batches

    with layout(cfg):
        model = build_with_reference_parameters(cfg)
        shared, torch.distributed.new_group = torch.distributed.new_group, torch.distributed.distributed_c10d.new_group
        try:
            planned = PlannedPipeline(cfg, model, print)
        finally:
            torch.distributed.new_group = shared
        batches = iterators(model, make_batches(cfg, VOCAB_SIZE, 2))
        model.exit_losses.begin_iteration(2)
        start = time.monotonic()
        if torch.distributed.get_rank() == 1:
            if second_rank == "dies":
                os._exit(1)
            time.sleep(3)
            return 0.0, ""
        try:
            planned.run(batches, num_microbatches=2, micro_batch_size=2, seq_length=cfg.training.seq_length)
        except Exception:
            if second_rank == "dies":  # and cannot answer
                raise
            return time.monotonic() - start, traceback.format_exc()
        raise AssertionError("it did not wait")


def test_a_stage_that_hangs() -> None:
    cfg = tuning_config(**MLP, **PP2, tune_exit_distillation=0.5, distributed_timeout_minutes=1 / 60)
    (seconds, stack), _ = run_distributed(2, first_rank_waits, cfg=cfg, second_rank="hangs")
    assert seconds < 3 and "Timed out" in stack and "links.receive(action)" in stack


def test_a_stage_that_dies() -> None:
    cfg = tuning_config(**MLP, **PP2, tune_exit_distillation=0.5)
    with pytest.raises(AssertionError) as error:
        run_distributed(2, first_rank_waits, cfg=cfg, second_rank="dies")
    text = str(error.value)
    assert "rank 1 died" in text and "rank 0 failed" in text and "links.receive(action)" in text
