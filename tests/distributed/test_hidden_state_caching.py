"""Tuning on kept hidden states is tuning on the layers' own, in all layouts; and the files serve other exits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.settings import with_tuned_stages
from megatron.early_exit.config.validate import problems
from tests.configs import make_config, make_training_config
from tests.distributed.test_tuning import HEADS, TP2, UNTIED, base_model, tune, weights_of
from tests.distributed.workers import run_distributed

POINTS = {"mlp": "attention"}  # what exits read; all others the layer's output


@pytest.mark.parametrize(("head", "world_size", "changes"), [
    ("norm", 1, {}),
    ("untied", 1, {"eval_iters": 1, "eval_interval": 2, "split": "70,30,0"}),
    ("mlp", 1, {**UNTIED, "tune_exit_distillation": 0.5}),
    ("mlp", 1, {**UNTIED, "tune_exit_distillation": 0.5, "exit_loss_token_fraction": (0.4,)}),
    ("norm", 2, {**UNTIED, "pipeline_model_parallel_size": 2}),
    ("block", 1, {}),
    ("pre_exit", 1, {"reset_attention_mask": True}),
    ("dynamic", 2, {"use_distributed_optimizer": True}),
    ("mlp", 1, {"bf16": True}),
    ("mlp", 2, {**TP2, "sequence_parallel": True, "hidden_dropout": 0.1}),
    ("block", 2, {**TP2, "sequence_parallel": True}),
    ("mlp", 4, {"pipeline_model_parallel_size": 4, "tensor_model_parallel_size": 2, "exit_layer_nums": (2,),
                "exit_layer_weight": (1.0,)}),
], ids=str)  # fmt: skip
def test_the_same_losses_and_weights_to_the_last_bit(
    data: str, tmp_path: Path, head: str, world_size: int, changes: dict
) -> None:
    settings = {**HEADS[head], **changes}
    of_model = {key: settings[key] for key in settings if key in (*HEADS[head], *UNTIED, "exit_layer_nums",
                                                                  "exit_layer_weight", "bf16")}  # fmt: skip
    base = base_model(data, tmp_path / "base", **of_model)
    cache = {"cache_hidden_states": str(tmp_path / "cache")}
    plain = tune(data, tmp_path / "plain", base, world_size, **settings)
    kept = tune(data, tmp_path / "kept", base, world_size, **settings, **cache)
    losses = lambda log: [{key: line[key] for key in line if "loss" in key or "norm" in key} for line in log]
    assert losses(plain) == losses(kept)
    one, two = weights_of(tmp_path / "plain/ck"), weights_of(tmp_path / "kept/ck")
    assert all(torch.equal(one[name], two[name]) for name in one)
    # 6 iterations of 8 samples of 12 tokens, 32 wide
    layer = settings.get("exit_layer_nums", (2, 3))[0] - bool(settings.get("pre_exit"))
    file = tmp_path / f"cache/layer_{layer}_{POINTS.get(head, 'output')}.bin"
    assert file.stat().st_size == 48 * 12 * 32 * (2 if settings.get("bf16") else 4)


@pytest.mark.parametrize(("world_size", "layout"), [
    (1, {}), (2, {}), (2, {"pipeline_model_parallel_size": 2}),
    (2, {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1}),
], ids=str)  # fmt: skip
def test_a_number_of_samples_that_no_batch_divides(data: str, tmp_path: Path, world_size: int, layout: dict) -> None:
    base = base_model(data, tmp_path / "base", **HEADS["norm"])
    cache = {"cache_hidden_states": str(tmp_path / "cache")}
    length = {"train_iters": None, "train_samples": 33, "lr_decay_iters": None, "lr_warmup_iters": 0}
    log = tune(data, tmp_path / "tuned", base, world_size, **HEADS["norm"], **cache, **length, **layout)
    assert log[-1]["consumed_samples"] == 40


def test_several_passes_stop_and_resume(data: str, tmp_path: Path) -> None:
    """Sixteen samples, three times; the run that is stopped draws what the other draws. Losses fall faster than over
    new samples at the second pass: these are the samples of the first."""
    base = base_model(data, tmp_path / "base", **HEADS["mlp"])
    cache = {"cache_hidden_states": str(tmp_path / "cache"), "cache_samples": 16}
    whole = tune(data, tmp_path / "whole", base, **HEADS["mlp"], **cache)
    tune(data, tmp_path / "stopped", base, exit_interval=3, **HEADS["mlp"], **cache)
    resumed = tune(data, tmp_path / "stopped", base, **HEADS["mlp"], **cache)
    assert [line["exit_loss/layer_3"] for line in whole] == [line["exit_loss/layer_3"] for line in resumed]
    assert (tmp_path / "cache/layer_2_attention.done").read_bytes() == b"\1" * 16


def test_other_exits_and_layouts_use_the_files(data: str, tmp_path: Path) -> None:
    """A norm and a projection read the same hidden states, and nothing is computed again."""
    cache = {"cache_hidden_states": str(tmp_path / "cache")}
    norm = base_model(data, tmp_path / "norm", **HEADS["norm"])
    tune(data, tmp_path / "first", norm, 2, **TP2, **HEADS["norm"], **cache)
    files = sorted((tmp_path / "cache").glob("*.bin"))
    assert [file.name for file in files] == ["layer_2_output.bin", "layer_3_output.bin"]
    written = [file.stat().st_mtime_ns for file in files]
    two = {"pipeline_model_parallel_size": 2}
    other = base_model(data, tmp_path / "other", **HEADS["untied"])  # drawn with the same seed: the same layers
    with pytest.raises(Exception, match="holds hidden states of something else: other weights"):
        tune(data, tmp_path / "second", other, 2, **two, **HEADS["untied"], **cache)
    log = tune(data, tmp_path / "third", norm, 2, **two, **HEADS["norm"], **cache)
    assert [file.stat().st_mtime_ns for file in files] == written
    again = tune(data, tmp_path / "plain", norm, 2, **two, **HEADS["norm"])
    for one, two in zip(log, again, strict=True):
        assert one["exit_loss/layer_3"] == pytest.approx(two["exit_loss/layer_3"], rel=1e-5)


def test_other_data_are_refused(data: str, tmp_path: Path) -> None:
    cache = {"cache_hidden_states": str(tmp_path / "cache")}
    base = base_model(data, tmp_path / "base", **HEADS["norm"])
    tune(data, tmp_path / "first", base, **HEADS["norm"], **cache)
    with pytest.raises(Exception, match="holds hidden states of something else: other data"):
        tune(data, tmp_path / "second", base, **HEADS["norm"], **cache, seed=7)


def interrupted_fill(cfg: RunConfig) -> list[str]:
    """Fill the cache, asked to stop at the third call, and again to its end; what was said."""
    from megatron.core import parallel_state

    from megatron.early_exit.training.pretrain import build_run
    from tests.distributed.parallel_model import release_models

    said: list[str] = []
    answers = iter([None, None, "SIGTERM"])
    try:
        run = build_run(cfg)
        assert not run.caching.fill(said.append, lambda: next(answers))
        assert run.caching.cache.num_leading(run.caching.capture_points) == 16
        assert run.caching.fill(said.append, lambda: None)
        assert run.caching.cache.done("layer_3_output").all()
        said.append("now complete")
        assert run.caching.fill(said.append, lambda: None)
        run.reporter.close()
    finally:
        release_models()
        parallel_state.destroy_model_parallel()
    return said


def test_filling_goes_on_where_it_stopped(data: str, tmp_path: Path) -> None:
    base = base_model(data, tmp_path / "base", **HEADS["norm"])
    cfg = make_training_config(
        data, tmp_path, pretrained_checkpoint=base, tune_exit=True, cache_hidden_states=str(tmp_path / "cache"),
        train_iters=6, **HEADS["norm"],
    )  # fmt: skip
    (said,) = run_distributed(1, interrupted_fill, cfg=with_tuned_stages(cfg))
    text = "\n".join(said)
    assert "caching hidden states of 48 samples" in text
    assert "stopped at 16 of 48 samples: SIGTERM" in text and "caching hidden states of 32 samples" in text
    assert said[-1] == "now complete"  # and nothing was left to say


@pytest.mark.parametrize(("changes", "message"), [
    ({"tune_exit": False, "cache_hidden_states": "x"}, "--cache-hidden-states x without --tune-exit"),
    ({"cache_samples": 8}, "--cache-samples 8 without --cache-hidden-states"),
    ({"cache_hidden_states": "x", "cache_samples": 9}, "a multiple of micro batch size x data-parallel size = 4"),
])  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    cfg = with_tuned_stages(make_config(**{"tune_exit": True, "use_exit_norm": True, **changes}))
    assert any(message in problem for problem in problems(cfg, 2)), problems(cfg, 2)
