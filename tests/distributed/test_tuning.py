"""EE-Tuning: gradients of the exits are plain autograd's, all else stays as it is, and the checkpoints are whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.early_exit.checkpoint.store import read_checkpoint
from megatron.early_exit.checkpoint.tensors import EXIT_HEAD
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.settings import with_tuned_stages
from megatron.early_exit.config.validate import problems, warnings
from tests.configs import make_config, make_training_config
from tests.distributed.engines import head_logits
from tests.distributed.training_runs import training_run
from tests.distributed.tuned_exits import compare_with_reference, tuning_config
from tests.distributed.workers import run_distributed

HEADS = {
    "norm": {"use_exit_norm": True},
    "untied": {"untie_exit_output_weights": True, "use_exit_norm": True},
    "mlp": {"use_exit_mlp": True, "use_exit_norm": True},
    "block": {"use_exit_block": True, "untie_exit_output_weights": True},
    "pre_exit": {"pre_exit": True, "use_exit_norm": True},
    "mixed, one with nothing of its own": {
        "exit_layer_nums": (1, 2, 3),
        "use_exit_norm": (False, True, True),
        "use_exit_mlp": (False, False, True),
    },
    "dynamic": {"use_exit_norm": True, "use_dynamic_exit_layer_weight": True, "exit_layer_temperature": (0.7, 1.5)},
}
TP2 = {"tensor_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp 2": (2, {}),
    "tp 2": (2, TP2),
    "tp 2, sequence parallel": (2, {**TP2, "sequence_parallel": True}),
    "one of two stages": (1, {"pipeline_model_parallel_size": 2, "exit_layer_nums": (1, 2)}),
    "two of two stages": (2, {"pipeline_model_parallel_size": 2}),
    "two of four stages": (2, {"pipeline_model_parallel_size": 4, "exit_layer_nums": (1, 2)}),
    "two of two stages, the first with one layer": (
        2,
        {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1},
    ),
    "two of three stages, the last of them cut": (
        2,
        {"pipeline_model_parallel_size": 3, "num_layers": 7, "pipeline_model_parallel_layout": "Et|ttt|tttL"},
    ),
    "three stages, two without exits": (3, {"pipeline_model_parallel_size": 4, "exit_layer_nums": (3,)}),
    "tp 2, two stages": (4, {**TP2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}),
    "two stages, dp 2": (4, {"pipeline_model_parallel_size": 2}),
}


@pytest.mark.parametrize("head", HEADS)
def test_gradients_equal_plain_autograd(head: str) -> None:
    (built,) = run_distributed(1, compare_with_reference, cfg=tuning_config(**HEADS[head]))
    assert built["layers"] == [1, 2, 3] and built["exits"] and not built["has_final_head"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_in_all_layouts(name: str) -> None:
    world_size, changes = LAYOUTS[name]
    cfg = tuning_config(**{**HEADS["mlp"], "untie_exit_output_weights": True}, **changes)
    built = run_distributed(world_size, compare_with_reference, cfg=cfg)
    layers = sorted({layer for one in built for layer in one["layers"]})
    assert layers == list(range(1, cfg.exits.exit_layer_nums[-1] + 1))
    assert not any(one["has_final_head"] for one in built)


def test_a_stage_whose_exits_have_nothing_of_their_own() -> None:
    changes = {"exit_layer_nums": (1, 3), "use_exit_norm": (False, True), "pipeline_model_parallel_size": 2}
    built = run_distributed(2, compare_with_reference, cfg=tuning_config(**changes))
    assert [one["exits"] for one in built] == [0, 1]


UNTIED = {"untie_embeddings_and_output_weights": True}
# Exits that use an output weight whose stage is not built, on the stages that have one.
SHARED_OUTPUT: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "exits on all layers": (1, {"exit_layer_nums": (1, 2, 3, 4), **HEADS["mlp"]}),
    "exit on the last layer": (1, {"exit_layer_nums": (4,), **HEADS["block"], "untie_exit_output_weights": False}),
    "pre-exit": (1, HEADS["pre_exit"]),
    "dp 2": (2, {}),
    "tp 2": (2, {**TP2, "sequence_parallel": True}),
    "one of two stages": (1, {"pipeline_model_parallel_size": 2, "exit_layer_nums": (1, 2)}),
    "two of two stages, exits on both": (2, {"pipeline_model_parallel_size": 2}),
    "two of two stages, exits on the last": (2, {"pipeline_model_parallel_size": 2, "exit_layer_nums": (3, 4)}),
    "two of four stages": (2, {"pipeline_model_parallel_size": 4, "exit_layer_nums": (1, 2)}),
    "two of two stages, own output on the first": (
        2,
        {"pipeline_model_parallel_size": 2, "untie_exit_output_weights": (True, False)},
    ),
    "tp 2, two of four stages": (4, {**TP2, "pipeline_model_parallel_size": 4, "exit_layer_nums": (2,)}),
}


@pytest.mark.parametrize(("name", "tied"), [
    *((name, False) for name in SHARED_OUTPUT),
    *((name, True) for name in ("tp 2", "two of two stages, exits on both", "two of four stages")),
], ids=lambda value: {True: "tied", False: "untied"}.get(value, value))  # fmt: skip
def test_exits_have_the_output_weight_of_the_checkpoint(name: str, tied: bool, tmp_path: Path) -> None:
    """Also where the stage that owns it is not built: losses and gradients after loading are plain autograd's."""
    from tests.distributed.test_added_exits import save

    world_size, changes = SHARED_OUTPUT[name]
    changes = {"use_exit_norm": True, **({} if tied else UNTIED), **changes}
    cfg = tuning_config(**changes)
    whole = {key: value for key, value in changes.items() if "parallel" not in key and "distributed" not in key}
    run_distributed(1, save, cfg=make_config(exit_layer_weight=cfg.exits.exit_layer_weight, **whole), folder=tmp_path)
    built = run_distributed(world_size, compare_with_reference, cfg=cfg, checkpoint=checkpoint_folder(tmp_path))
    assert not any(one["has_final_head"] for one in built) and any(one["exits"] for one in built)


def base_model(data: str, folder: Path, **changes: Any) -> str:
    """A model with exits that was trained for a moment."""
    cfg = make_training_config(data, folder, save=str(folder), no_save_optim=True, train_iters=1, **changes)
    run_distributed(1, training_run, cfg=cfg)
    return str(folder)


def tune(data: str, folder: Path, base: str, world_size: int = 1, **changes: Any) -> list[dict]:
    """Tune into `folder`/ck; returns the log."""
    settings = {"save": str(folder / "ck"), "load": str(folder / "ck"), "train_iters": 6, **changes}
    cfg = make_training_config(data, folder, pretrained_checkpoint=base, tune_exit=True, **settings)
    run_distributed(world_size, training_run, cfg=with_tuned_stages(cfg))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: str | Path, iteration: int | None = None) -> dict[str, torch.Tensor]:
    _, tensors = read_checkpoint(checkpoint_folder(folder, iteration))
    return {name: tensor.read() for name, tensor in tensors.items()}


def test_a_resumed_run_outlives_the_checkpoint_that_it_resumed_from(data: str, tmp_path: Path) -> None:
    """Which --keep-last removes, while the layers that were never trained lie in its files alone."""
    base = base_model(data, tmp_path / "base", **HEADS["norm"])
    settings = {**HEADS["norm"], "save_interval": 1, "keep_last": 1}
    tune(data, tmp_path, base, exit_interval=2, **settings)
    shutil.rmtree(base)
    log = tune(data, tmp_path, base, **settings)
    assert log[-1]["iteration"] == 6
    assert [path.name for path in (tmp_path / "ck").glob("iter_*")] == ["iter_0000006"]
    assert any(name.startswith("decoder.layers.0.mlp") for name in weights_of(tmp_path / "ck"))


OWN_OUTPUT = {"untie_exit_output_weights": True}


@pytest.mark.parametrize(("output", "world_size", "layout"), [
    (OWN_OUTPUT, 1, {}),
    (OWN_OUTPUT, 2, {"use_distributed_optimizer": True}),
    (OWN_OUTPUT, 2, {**TP2, "sequence_parallel": True}),
    (OWN_OUTPUT, 3, {"pipeline_model_parallel_size": 4}),
    (OWN_OUTPUT, 3, {"pipeline_model_parallel_size": 4, "use_distributed_optimizer": True}),
    (OWN_OUTPUT, 4, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True, "bf16": True}),
    (UNTIED, 1, {}),
    (UNTIED, 2, {**TP2, "sequence_parallel": True}),
    (UNTIED, 3, {"pipeline_model_parallel_size": 4, "use_distributed_optimizer": True, "bf16": True}),
], ids=str)  # fmt: skip
def test_a_tuned_model_is_the_old_one_with_other_exits(
    data: str, tmp_path: Path, output: dict, world_size: int, layout: dict
) -> None:
    """The run, stopped and resumed half-way, gives the exits of the one that never stopped; nothing else changes."""
    head = {**HEADS["mlp"], "exit_layer_nums": (3,), "exit_layer_weight": (1.0,), **output}
    head |= {"bf16": True} if "bf16" in layout else {}
    base = base_model(data, tmp_path / "base", **head)
    layout = {**head, **layout}
    log = tune(data, tmp_path / "whole", base, world_size, save_interval=3, **layout)
    assert [line["iteration"] for line in log] == [1, 2, 3, 4, 5, 6]
    # Six iterations teach an output projection something, but little to an MLP branch before a random one.
    assert output is UNTIED or log[-1]["exit_loss/layer_3"] < log[0]["exit_loss/layer_3"]
    assert "lm_loss" not in log[0]
    before, half, after = weights_of(base), weights_of(tmp_path / "whole/ck", 3), weights_of(tmp_path / "whole/ck")
    assert set(before) == set(half) == set(after)
    for name in before:
        assert torch.equal(before[name], after[name]) == (EXIT_HEAD not in name), name
    tune(data, tmp_path / "stopped", base, world_size, exit_interval=3, **layout)
    shutil.rmtree(base)  # what is linked stays
    log_again = tune(data, tmp_path / "stopped", str(tmp_path / "whole/ck"), world_size, **layout)
    assert [line["iteration"] for line in log_again] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(log, log_again, strict=True):
        assert one["exit_loss/layer_3"] == two["exit_loss/layer_3"] and one["grad_norm"] == two["grad_norm"]
    resumed = weights_of(tmp_path / "stopped/ck")
    assert all(torch.equal(after[name], resumed[name]) for name in after)


def test_a_checkpoint_of_exits_is_small_and_runs_alone(data: str, tmp_path: Path) -> None:
    base = base_model(data, tmp_path / "base", use_exit_norm=True, num_layers=4)
    tune(data, tmp_path / "tuned", base, use_exit_norm=True, no_save_optim=True, no_save_rng=True)
    folder = checkpoint_folder(tmp_path / "tuned/ck")
    own = [path for path in folder.glob("*.distcp") if path.stat().st_nlink == 1]
    assert sum(path.stat().st_size for path in own) < 10_000
    tokens = [[1, 2, 3, 4, 5, 6, 7]]
    old, new = (run_distributed(1, head_logits, folder=f, tokens=tokens)[0] for f in (base, tmp_path / "tuned/ck"))
    assert torch.equal(old["final"], new["final"])
    assert not torch.equal(old["exit_2"], new["exit_2"]) and not torch.equal(old["exit_3"], new["exit_3"])
    # And it can be tuned on, under another layout; there the second stage has a copy of the output weight.
    one, two = (
        tune(data, tmp_path / f"more {size}", str(tmp_path / "tuned/ck"), size, use_exit_norm=True,
             pipeline_model_parallel_size=size)
        for size in (1, 2)
    )  # fmt: skip
    assert [line["iteration"] for line in two] == [1, 2, 3, 4, 5, 6]
    for first, second in zip(one, two, strict=True):
        for key in ("exit_loss/layer_2", "exit_loss/layer_3", "grad_norm"):
            assert second[key] == pytest.approx(first[key], rel=1e-4)


@pytest.mark.parametrize(("world_size", "changes", "message"), [
    (1, {"exit_layer_nums": (), "exit_layer_weight": ()}, "--tune-exit without exits"),
    (1, {}, "--tune-exit has nothing to tune"),
    (1, {"use_exit_norm": True}, "needs a model: --pretrained-checkpoint"),
    (2, {"use_exit_norm": True, "pipeline_model_parallel_size": 4, "tune_exit_pipeline_parallel_size": 2},
     "the last exit (layer 3) is on stage 3; give 3"),
    (4, {"use_exit_norm": True, "pipeline_model_parallel_size": 4}, "stages that are tuned (3) = 3"),
    (2, {"use_exit_norm": True, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
     "forward passes need no interleaving"),
    (1, {"use_exit_norm": True, "calculate_per_token_loss": True}, "--calculate-per-token-loss is not supported"),
    (1, {"use_exit_norm": True, "pretrained_checkpoint": "/nowhere"}, "/nowhere: no such folder"),
    (1, {"use_exit_norm": True, "tune_exit_distillation": 1.5}, "a share lies between 0 and 1"),
    (3, {"use_exit_norm": True, "tune_exit_distillation": 0.5, "pipeline_model_parallel_size": 4,
         "tune_exit_pipeline_parallel_size": 3}, "what it reads is not kept; give 4, or --cache-hidden-states"),
    (2, {"use_exit_norm": True, "tune_exit_distillation": 0.5, "pipeline_model_parallel_size": 4,
         "cache_hidden_states": "x", "tune_exit_pipeline_parallel_size": 2}, "the final head is on stage 4; give 4"),
    (3, {"use_exit_norm": True, "tune_exit_distillation": 0.5, "pipeline_model_parallel_size": 4},
     "stages that are tuned (4) = 4"),
])  # fmt: skip
def test_what_cannot_be_tuned_is_refused(world_size: int, changes: dict, message: str) -> None:
    cfg = with_tuned_stages(make_config(tune_exit=True, **changes))
    assert any(message in problem for problem in problems(cfg, world_size)), problems(cfg, world_size)


def test_settings_without_effect_are_said() -> None:
    cfg = make_config(
        tune_exit=True, use_exit_norm=True, recompute_granularity="full", recompute_method="uniform",
        recompute_num_layers=1, overlap_grad_reduce=True,
    )  # fmt: skip
    text = "\n".join(warnings(cfg))
    assert "--recompute-granularity has no effect" in text and "--overlap-grad-reduce has no effect" in text
    cfg = make_config(tune_exit_pipeline_parallel_size=1)
    assert any("without --tune-exit" in problem for problem in problems(cfg, 1))
