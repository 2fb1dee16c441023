"""Every numeric flag with odd values and every path flag with the wrong kind of thing: it works, or a sentence says why
not, soon and before anything is built."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.early_exit.config.checkpoint_files import LATEST_FILE
from megatron.early_exit.config.checks.files import OUTPUT_FILES, OUTPUT_FOLDERS
from megatron.early_exit.config.fields import FieldInfo, config_fields, flag_of
from megatron.early_exit.config.flags import parse_run_config
from megatron.early_exit.config.validate import check_outputs
from megatron.early_exit.config.values import type_name
from megatron.early_exit.training import memory  # noqa: F401: --dry-run imports it late
from megatron.early_exit.training.dry_run import describe

BASE = {
    "--num-layers": "4", "--hidden-size": "64", "--num-attention-heads": "4", "--seq-length": "32", "--lr": "1e-3",
    "--train-iters": "100", "--vocab-size": "128",
}  # fmt: skip
NUMBERS = [
    field
    for field in config_fields()
    if "number" in type_name(field.annotation) or "integer" in type_name(field.annotation)
]
TEXTS = [field for field in config_fields() if type_name(field.annotation) == "text"]
NO_PATHS = ("split", "wandb_project", "wandb_group", "wandb_exp_name", "wandb_entity")
INTEGERS = ["0", "-1", "1000000000", str(10**15), str(2**63), str(10**400), "-" + str(10**30)]
FLOATS = ["0", "-1", "nan", "inf", "-inf", "1e-30", "1e30", "1e300", str(10**15)]
SECONDS = 1.0


def flags_with(name: str, value: str, **others: str) -> list[str]:
    flag = flag_of(name)
    flags = {**BASE, **{flag_of(other): text for other, text in others.items()}}
    if name in ("train_samples", "lr_decay_samples", "lr_warmup_samples"):
        del flags["--train-iters"]
        flags.setdefault("--train-samples", "400")
    if name.startswith("exit_layer") and name != "exit_layer_nums":
        flags["--exit-layer-nums"] = "2"
    flags[flag] = value
    words = [word for pair in flags.items() for word in pair] + ["--mock-data"]
    if name == "rampup_batch_size":
        words[words.index(flag) + 2 : words.index(flag) + 2] = [value, value]
    return words


@pytest.fixture(autouse=True, scope="module")
def machine() -> Iterator[None]:
    """A machine without a GPU that has 16 GiB, whose libraries are loaded."""
    importlib.import_module("megatron.early_exit.training.hidden_state_caching")  # by --dry-run of such a run
    describe(parse_run_config(flags_with("seed", "1"), world_size=1), world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "use_cuda", lambda: False)
        patch.setattr(memory, "machine_memory_bytes", lambda: 16 * 2**30)
        yield


def refusal(words: list[str], world_size: int = 1, of_paths: bool = False) -> str | None:
    """What is said of these flags, or None if the run could be built. Fails if that takes long.

    of_paths: look no further than at the flags and at what would be written, not into what would be read."""
    start = time.process_time()
    try:
        config = parse_run_config(words, world_size=world_size, warn=lambda message: None)
        check_outputs(config)
        if of_paths:
            return None
        describe(config, world_size)
        training, config = config.training, config.resolved(config.data.vocab_size)
        batch = training.global_batch_size or training.micro_batch_size
        drawn = (training.train_iters or 0) * batch + (training.train_samples or 0)
        memory.check_memory(config, world_size, (drawn, training.eval_iters * batch, training.eval_iters * batch))
        said = None
    except ValueError as error:
        said = str(error)
    assert time.process_time() - start < SECONDS, said
    return said


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_numbers(field: FieldInfo) -> None:
    is_integer = "integer" in type_name(field.annotation)
    for value in INTEGERS if is_integer else FLOATS:
        said = refusal(flags_with(field.name, value))
        in_memory = said is not None and said.startswith("memory cannot hold")
        assert said is None or in_memory or flag_of(field.name) in said, (value, said)
        assert said is not None or value not in ("nan", "inf", "-inf", str(10**400)), value


@pytest.mark.parametrize(("name", "value", "parts"), [
    ("num_layers", "1000000000", ["--num-layers 1000000000: must be at most 10000"]),
    ("hidden_size", "10000000", ["memory cannot hold this run: stage 0 needs at least", "16.00 GiB", "--dry-run"]),
    ("vocab_size", str(10**12), ["memory cannot hold this run"]),
    ("seq_length", str(10**9), ["inputs of layers 953.67", "--seq-length"]),
    ("micro_batch_size", str(10**8), ["inputs of layers", "--micro-batch-size"]),
    ("train_iters", str(10**15), ["the order of 1,000,000,000,000,200 samples", "--train-iters"]),
    ("train_samples", str(10**15), ["the order of 1,000,000,000,000,200 samples", "--train-samples"]),
    ("eval_iters", str(10**12), ["samples", "--eval-iters"]),
    ("global_batch_size", str(10**15), ["--global-batch-size", "microbatches of one iteration"]),
    ("seed", str(2**32), ["--seed 4294967296: must be at most 4294967295"]),
    ("distributed_timeout_minutes", "1e30", ["--distributed-timeout-minutes 1e+30", "a year"]),
    ("distributed_timeout_minutes", "0.001", ["1/60"]),
    ("num_workers", "1000000", ["--num-workers 1000000: must be at most 512"]),
    ("rope_scaling_factor", "0", ["--rope-scaling-factor 0.0: must be greater than 0"]),
    ("sgd_momentum", "1", ["--sgd-momentum 1.0: must be at least 0 and less than 1"]),
    ("tune_exit_distillation", "0.5", ["--tune-exit-distillation 0.5 without --tune-exit"]),
])  # fmt: skip
def test_numbers_that_cannot_work(name: str, value: str, parts: list[str]) -> None:
    said = refusal(flags_with(name, value))
    assert said is not None and all(part in said for part in parts), said


def test_every_stage_adds_to_the_seed() -> None:
    words = [*flags_with("seed", str(2**32 - 1)), "--pipeline-model-parallel-size", "2"]
    assert "--seed 4294967295: must be at most 4294967195 on 2 pipeline stages" in refusal(words, world_size=2)


def test_a_long_ramp_is_not_counted_through() -> None:
    words = ["--rampup-batch-size", "2", "2", "10", "--pipeline-model-parallel-size", "2",
             "--num-layers-per-virtual-pipeline-stage", "1"]  # fmt: skip
    flags = flags_with("global_batch_size", str(10**6))
    assert refusal([*flags, *words], world_size=2) is None


def test_memory_of_the_machine_is_shared_by_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """About 9 GiB a replica: two of them do not fit into 16 GiB, but on two machines they do."""
    words = flags_with("hidden_size", "3456")
    assert refusal(words, world_size=1) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "this machine for 2 of 2 ranks has 16.00 GiB" in refusal(words, world_size=2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert refusal(words, world_size=2) is None


# Paths


def odd_paths(folder: Path, suffix: str = "") -> dict[str, Path]:
    (folder / f"file{suffix}").write_text("x")
    (folder / f"folder{suffix}").mkdir()
    (folder / f"folder{suffix}" / LATEST_FILE).write_text("1")
    (folder / f"folder{suffix}" / "iter_0000001").mkdir()
    (folder / f"folder{suffix}" / "iter_0000001" / "model.yaml").touch()
    (folder / f"link{suffix}").symlink_to(folder / "nothing")
    return {
        "file": folder / f"file{suffix}",
        "folder": folder / f"folder{suffix}",
        "missing": folder / "a" / f"b{suffix}",
        "below a file": folder / f"file{suffix}" / f"b{suffix}",
        "link to nothing": folder / f"link{suffix}",
        "long name": folder / ("x" * 300 + suffix),
        "read-only": Path(f"/proc/sys/kernel/x{suffix}"),
    }


WORKING = {
    "missing": {*OUTPUT_FOLDERS, *OUTPUT_FILES},
    "folder": {
        *OUTPUT_FOLDERS,
        "load",
        "pretrained_checkpoint",
        "tokenizer_model",
    },
    "file": set(OUTPUT_FILES),
}

COMPANIONS = {
    "wandb_save_dir": ["--wandb-project", "p"],
    "cache_hidden_states": ["--tune-exit", "--exit-layer-nums", "2", "--use-exit-norm"],
    "profile_pipeline": ["--pipeline-model-parallel-size", "2"],
}
"""What flags need beside them."""


@pytest.mark.parametrize("name", [field.name for field in TEXTS if field.name not in NO_PATHS])
def test_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))  # tests may run as root
    paths = odd_paths(tmp_path, ".svg" if name == "profile_pipeline" else "")
    words = COMPANIONS.get(name, [])
    if name == "cache_hidden_states":
        words = [*words, "--load", str(paths["folder"])]
    for kind, path in paths.items():
        world_size = 2 if name == "profile_pipeline" else 1
        said = refusal([*flags_with(name, str(path)), *words], world_size, of_paths=True)
        if name in WORKING.get(kind, ()):
            assert said is None, (kind, said)
        else:
            assert said is not None and flag_of(name) in said, (kind, said)


@pytest.mark.parametrize(("name", "kind", "expected"), [
    ("save", "file", "this is a file; give a folder"),
    ("save", "below a file", "is a file, in which nothing can be created"),
    ("save", "link to nothing", "is a link to something that is not there"),
    ("save", "long name", "file name too long"),
    ("save", "read-only", "/proc/sys/kernel cannot be written"),
    ("metrics_file", "folder", "this is a folder; give the name of a file in it"),
    ("metrics_file", "below a file", "is a file, in which nothing can be created"),
    ("load", "file", "this is a file; give the folder that holds the checkpoints"),
    ("tensorboard_dir", "file", "this is a file; give a folder"),
])  # fmt: skip
def test_what_is_said_of_paths(
    name: str, kind: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = odd_paths(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))
    said = refusal(flags_with(name, str(paths[kind])), of_paths=True)
    assert f"{flag_of(name)} {paths[kind]}: " in said and expected in said


def test_a_configuration_that_is_a_folder(tmp_path: Path) -> None:
    assert "--config: cannot read" in refusal([*flags_with("seed", "1"), "--config", str(tmp_path)])
