"""What a run says about a checkpoint that it cannot start from: the reason, and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron.early_exit.checkpoint.safe_pickle import read_metadata
from megatron.early_exit.config.checkpoint_files import DESCRIPTION_FILE, METADATA_FILE, RUN_CONFIG_FILE
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.settings import with_tuned_stages
from megatron.early_exit.training.dry_run import describe
from tests.configs import make_training_config
from tests.distributed.test_resume import comparable, records
from tests.distributed.training_runs import training_run
from tests.distributed.workers import run_distributed

BF16, FP16 = {"bf16": True}, {"fp16": True, "initial_loss_scale": 256.0}
SGD, DISTRIBUTED = {"optimizer": "sgd"}, {"use_distributed_optimizer": True}
TUNING = {"tune_exit": True, "use_exit_norm": True}


def refusal(cfg: RunConfig) -> str | None:
    """The error that ends the run before its first iteration, or None if it runs."""
    try:
        training_run(cfg)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def start(data: str, tmp_path: Path, checkpoint: Path, world_size: int = 1, **changes: Any) -> str | None:
    """A run from this checkpoint to iteration 2; its first error."""
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    cfg = make_training_config(data, tmp_path / "run", **{"load": str(checkpoint), "train_iters": 2, **changes})
    cfg = with_tuned_stages(cfg) if cfg.training.tune_exit else cfg
    errors = set(run_distributed(world_size, refusal, cfg=cfg))
    assert len(errors) == 1, errors  # all ranks find the same
    return errors.pop()


def save(data: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint of iteration 1."""
    settings = {"save": str(folder), "train_iters": 1, **changes}
    run_distributed(1, training_run, cfg=make_training_config(data, folder, **settings))
    return folder


@pytest.mark.parametrize(("saved", "loaded", "reason"), [
    ({}, BF16, "that of a run in fp32 (neither --bf16 nor --fp16), not in bf16 (--bf16)"),
    ({}, FP16, "that of a run in fp32 (neither --bf16 nor --fp16), not in fp16 (--fp16)"),
    (BF16, {}, "that of a run in bf16 (--bf16), not in fp32 (neither --bf16 nor --fp16)"),
    ({}, SGD, "that of --optimizer adam, not of sgd"),
    (SGD, {}, "that of --optimizer sgd, not of adam"),
    ({**SGD, "sgd_momentum": 0.0}, SGD, "that of --sgd-momentum 0, not of 0.9"),
    ({}, DISTRIBUTED, "that of a run without --use-distributed-optimizer, in another form"),
    (DISTRIBUTED, {}, "that of a run with --use-distributed-optimizer, in another form"),
], ids=str)  # fmt: skip
def test_another_optimizer_state_is_named(data: str, tmp_path: Path, saved: dict, loaded: dict, reason: str) -> None:
    folder = save(data, tmp_path / "ck", **saved)
    error = start(data, tmp_path, folder, **loaded)
    assert error == (
        f"MismatchError: the optimizer state of {folder}/iter_0000001 is {reason}. Resume with the settings of the run "
        "that saved it, or go on without its optimizer state with --no-load-optim."
    )
    with pytest.raises(ValueError) as dry_run:
        describe(make_training_config(data, tmp_path, load=str(folder), **loaded), world_size=1)
    assert str(dry_run.value) in error
    assert start(data, tmp_path, folder, no_load_optim=True, **loaded) is None
    assert [record["iteration"] for record in records(tmp_path / "run")] == [2]


@pytest.mark.parametrize(("saved", "loaded"), [
    (BF16, FP16), (FP16, BF16), ({**DISTRIBUTED}, {**DISTRIBUTED, **BF16}), ({**DISTRIBUTED, **BF16}, DISTRIBUTED),
], ids=str)  # fmt: skip
def test_states_that_other_precisions_can_take(data: str, tmp_path: Path, saved: dict, loaded: dict) -> None:
    """The run goes on where it stopped, within the rounding of the narrower type."""
    settings = {"save": str(tmp_path / "ck"), "save_interval": 3, "train_iters": 6, **saved}
    run_distributed(1, training_run, cfg=make_training_config(data, tmp_path / "whole", **settings))
    error = start(data, tmp_path, tmp_path / "ck", load_iteration=3, train_iters=6, **loaded)
    assert error is None
    pairs = zip(records(tmp_path / "whole")[3:], records(tmp_path / "run"), strict=True)
    for expected, actual in pairs:
        assert actual["lm_loss"] == pytest.approx(expected["lm_loss"], rel=5e-3)
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)


@pytest.mark.parametrize("settings", [SGD, {**SGD, "sgd_momentum": 0.0}, {**SGD, **BF16}], ids=str)
def test_sgd_resumes_to_the_last_bit(data: str, tmp_path: Path, settings: dict) -> None:
    whole = {"save": str(tmp_path / "ck"), "save_interval": 3, "train_iters": 6, **settings}
    digests = run_distributed(1, training_run, cfg=make_training_config(data, tmp_path / "whole", **whole))
    resumed = make_training_config(
        data, tmp_path / "resumed", load=str(tmp_path / "ck"), load_iteration=3, train_iters=6, **settings
    )
    assert run_distributed(1, training_run, cfg=resumed) == digests
    expected = [comparable(record) for record in records(tmp_path / "whole")[3:]]
    assert [comparable(record) for record in records(tmp_path / "resumed")] == expected


def test_tuning_does_not_go_on_from_training_nor_training_from_tuning(data: str, tmp_path: Path) -> None:
    trained = save(data, tmp_path / "trained", use_exit_norm=True)
    error = start(data, tmp_path, trained, **TUNING)
    assert "is of a run that trained the whole model" in error and "--pretrained-checkpoint" in error
    settings = {"save": str(tmp_path / "tuned"), "train_iters": 1, "pretrained_checkpoint": str(trained), **TUNING}
    assert start(data, tmp_path, trained, **settings, load=None) is None
    error = start(data, tmp_path, tmp_path / "tuned", use_exit_norm=True)
    assert "is of a run that tuned exits alone" in error and "--pretrained-checkpoint" in error


def why_not_served(folder: Path) -> str | None:
    from megatron.early_exit.inference.llm import LLM

    try:
        LLM.load(str(folder))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", [METADATA_FILE, "metadata.json", "common.pt", "__0_0.distcp"])
def test_a_missing_file_is_named(data: str, tmp_path: Path, name: str) -> None:
    folder = save(data, tmp_path / "ck")
    next((folder / "iter_0000001").glob(name)).unlink()
    error = start(data, tmp_path, folder)
    assert error.startswith(f"FileNotFoundError: the checkpoint {folder}/iter_0000001 is not whole: {name} is missing.")
    assert "Copy it again" in error and "\n" not in error
    assert run_distributed(1, why_not_served, folder=folder) == [error]


def test_other_tensors_than_the_settings_say(data: str, tmp_path: Path) -> None:
    import pickle

    folder = save(data, tmp_path / "ck")
    other = save(data, tmp_path / "other", ffn_hidden_size=64)
    shutil.copytree(folder, tmp_path / "mixed")
    for name in (RUN_CONFIG_FILE, DESCRIPTION_FILE):
        shutil.copy(other / "iter_0000001" / name, tmp_path / "mixed/iter_0000001" / name)
    error = start(data, tmp_path, tmp_path / "mixed", ffn_hidden_size=64)
    assert "does not hold the model that its settings describe" in error
    assert "decoder.layers.0.mlp.linear_fc1.weight has the shape [96, 32], not [128, 32]" in error and "\n" not in error

    def without(beginning: str) -> Path:
        changed = Path(shutil.copytree(folder, tmp_path / beginning))
        metadata = read_metadata(changed / "iter_0000001")
        for name in [name for name in metadata.state_dict_metadata if name.startswith(beginning)]:
            del metadata.state_dict_metadata[name]
        (changed / "iter_0000001" / METADATA_FILE).write_bytes(pickle.dumps(metadata))
        (changed / "iter_0000001" / "checksums.json").unlink(missing_ok=True)
        return changed

    error = start(data, tmp_path, without("decoder.layers.2.self_attention"), world_size=2)
    assert "it has no decoder.layers.2.self_attention.linear_proj.weight, decoder.layers.2.self_attention" in error
    changed = without("optimizer.state.exp_avg.decoder")
    error = start(data, tmp_path, changed)
    assert "the optimizer state of" in error and "and 22 more. Go on without it with --no-load-optim." in error
    assert start(data, tmp_path, changed, no_load_optim=True) is None


def test_only_what_cannot_be_read_may_be_damaged(data: str, tmp_path: Path) -> None:
    folder = save(data, tmp_path / "ck")
    for name, length in (("common.pt", 100), ("__0_0.distcp", 2000)):
        broken = Path(shutil.copytree(folder, tmp_path / name))
        file = broken / "iter_0000001" / name
        file.write_bytes(file.read_bytes()[:length])
        error = start(data, tmp_path, broken)
        assert error.startswith("OSError") and "damaged" in error and "--load-iteration" in error
        assert len(error) < 700 and "Traceback" not in error
    file = folder / "iter_0000001" / "metadata.json"
    file.write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    assert "cannot be read" in start(data, tmp_path, folder)
