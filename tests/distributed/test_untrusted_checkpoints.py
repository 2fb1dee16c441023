"""A checkpoint from somewhere else runs no code on any way in: pickles that would leave a file behind leave none."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.early_exit.checkpoint import safe_pickle
from megatron.early_exit.checkpoint.convert_command import main
from megatron.early_exit.checkpoint.safe_pickle import UnsafeFileError, load_object, read_metadata
from tests.configs import make_training_config
from tests.distributed.training_runs import training_run
from tests.distributed.workers import run_distributed


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def poisoned_metadata(trained: Path, folder: Path) -> Path:
    """A copy of the checkpoint whose metadata run a command. Returns the file that the command makes."""
    shutil.copytree(trained, folder)
    file, marker = folder / "iter_0000001" / ".metadata", folder.parent / f"{folder.name}_attacked"
    read = read_metadata(file.parent)
    read.planner_data = Attack(marker)
    file.write_bytes(pickle.dumps(read))
    (file.parent / "checksums.json").unlink()  # an attacker writes right ones
    pickle.loads(file.read_bytes())
    assert marker.exists(), "the attack is none"
    marker.unlink()
    return marker


def poisoned_object(trained: Path, folder: Path, name: str) -> Path:
    """A copy of the checkpoint in which the object `name` runs a command. Returns the file that the command makes."""
    shutil.copytree(trained, folder)
    inside, marker = folder / "iter_0000001", folder.parent / f"{folder.name}_attacked"
    read = read_metadata(inside)
    (index,) = [index for index in read.storage_data if index.fqn == name]
    buffer = io.BytesIO()
    torch.save([Attack(marker)], buffer)
    (inside / "more.distcp").write_bytes(buffer.getvalue())
    read.storage_data[index] = replace(
        read.storage_data[index], relative_path="more.distcp", offset=0, length=len(buffer.getvalue())
    )
    (inside / ".metadata").write_bytes(pickle.dumps(read))
    (inside / "checksums.json").unlink()
    torch.load(inside / "more.distcp", weights_only=False)
    assert marker.exists(), "the attack is none"
    marker.unlink()
    return marker


def resume(data: str, load: Path, **changes: object) -> str:
    cfg = make_training_config(data, load.parent / "resumed", load=str(load), lr_decay_iters=9, **changes)
    return error_of(training_run, cfg=cfg)


def error_of(function: Callable, **kwargs: object) -> str:
    """What the one rank says."""
    return run_distributed(1, _error_of, call=function, kwargs=kwargs)[0]


def _error_of(call: Callable, kwargs: dict) -> str:
    try:
        call(**kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def load_for_inference(load: Path) -> None:
    from megatron.early_exit.inference.llm import LLM

    LLM.load(str(load))


def test_metadata_on_every_way_in(trained: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "ck"
    marker = poisoned_metadata(trained, folder)
    said = f"{folder / 'iter_0000001' / '.metadata'} is not loaded: it asks for "
    assert said in resume(data, folder)
    assert said in resume(data, folder, tune_exit=True, finetune=True)
    assert said in error_of(load_for_inference, load=folder)
    for words in (
        ["inspect", "--load", folder],
        ["to-hf", "--load", folder, "--output", tmp_path / "hf"],
        ["add-exits", "--load", folder, "--save", tmp_path / "more", "--exit-layer-nums", "1"],
        ["remove-exits", "--load", folder, "--save", tmp_path / "fewer"],
    ):
        assert main([str(word) for word in words]) == 2, words
        printed = capsys.readouterr().err
        assert said in printed and "system" in printed and "get the checkpoint again" in printed
        assert "Traceback" not in printed and "damaged" not in printed
    assert not marker.exists()
    assert not list(tmp_path.glob("hf/*")) and not list(tmp_path.glob("more/*"))


@pytest.mark.parametrize("name", ["rng_state/shard_0.0_1.1", "decoder.layers.1.mlp.linear_fc1._extra_state/shard_0_1"])
def test_objects_when_training_and_generating(trained: Path, data: str, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "ck"
    marker = poisoned_object(trained, folder, name)
    said = resume(data, folder)
    if "extra_state" in name:  # layers that have no such state do not read it
        assert said == error_of(load_for_inference, load=folder) == "no error"
    else:
        assert said.startswith(f"UnsafeFileError: {name} in {folder / 'iter_0000001' / 'more.distcp'} is not loaded")
        assert "system" in said and "Traceback" not in said
    assert not marker.exists()


def load_extra_state(folder: Path, name: str) -> None:
    """As layers of Transformer Engine ask for theirs."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron.early_exit.checkpoint.core_loading import load_sharded

    state = ShardedObject(name.split("/")[0], torch.empty(0, dtype=torch.uint8), (1,), (0,))
    try:
        load_sharded({"state": state}, folder)
    except CheckpointException as error:
        raise safe_pickle.first_failure(error) from None


def test_state_beside_parameters(trained: Path, tmp_path: Path) -> None:
    name = "decoder.layers.1.mlp.linear_fc1._extra_state/shard_0_1"
    marker = poisoned_object(trained, tmp_path / "ck", name)
    said = error_of(load_extra_state, folder=tmp_path / "ck" / "iter_0000001", name=name)
    assert "more.distcp is not loaded" in said and "system" in said
    assert not marker.exists()


def test_a_checkpoint_reads_no_files_outside_its_folder(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000001"
    shutil.copytree(trained / "iter_0000001", folder)
    (folder / "checksums.json").unlink()
    read = read_metadata(folder)
    index, info = next(iter(read.storage_data.items()))
    for path in ("../secret.distcp", "/etc/passwd", ""):
        read.storage_data[index] = replace(info, relative_path=path)
        (folder / ".metadata").write_bytes(pickle.dumps(read))
        with pytest.raises(UnsafeFileError, match="outside its folder"):
            read_metadata(folder)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04N.", b"\x80\x04}."], ids=str)
def test_metadata_that_are_none_are_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(OSError, match=r"\.metadata cannot be read, it is damaged"):
        read_metadata(tmp_path)


def test_names_that_look_like_the_allowed_are_refused(tmp_path: Path) -> None:
    for module, name in (("torch", "load"), ("torch.distributed.checkpoint.metadata", "os.system"), ("torch", "Size.x"),
                         ("builtins", "eval"), ("torch.serialization", "load"), ("pathlib", "os")):  # fmt: skip
        (tmp_path / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
        with pytest.raises(UnsafeFileError, match=name):
            read_metadata(tmp_path)


_ENUM = "torch.distributed.checkpoint.planner\nWriteItemType"


@pytest.mark.parametrize(("of", "name"), [("torch\nSize", "numel"), (_ENUM, "__class__"), (_ENUM, "mro")])
def test_attributes_are_those_of_enumerations_alone(tmp_path: Path, of: str, name: str) -> None:
    (tmp_path / ".metadata").write_bytes(f"cbuiltins\ngetattr\n(c{of}\nS'{name}'\ntR.".encode())
    with pytest.raises(UnsafeFileError, match="builtins.getattr of "):
        read_metadata(tmp_path)


def test_enumerations_are_read_as_every_python_writes_them(tmp_path: Path) -> None:
    """Python 3.11.0 to 3.11.3 names their members, the others give their values."""
    from torch.distributed.checkpoint.planner import WriteItemType

    unpickled = lambda data: safe_pickle._MetadataUnpickler(io.BytesIO(data), tmp_path / ".metadata").load()
    assert unpickled(f"cbuiltins\ngetattr\n(c{_ENUM}\nS'SHARD'\ntR.".encode()) is WriteItemType.SHARD
    assert unpickled(pickle.dumps(WriteItemType.SHARD)) is WriteItemType.SHARD


def test_what_runs_write_is_read(tmp_path: Path) -> None:
    import random

    import numpy

    states = [{"random": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}, None]
    buffer = io.BytesIO()
    torch.save(states, buffer)
    loaded = load_object(buffer.getvalue(), "here")
    assert loaded[0]["random"] == states[0]["random"] and loaded[1] is None
    assert (loaded[0]["numpy"][1] == states[0]["numpy"][1]).all()
    assert torch.equal(loaded[0]["torch"], states[0]["torch"])
    with pytest.raises(OSError, match="damaged"):
        load_object(buffer.getvalue()[:200], "here")


def test_state_of_fp8_is_not_handed_to_those_that_unpickle_it() -> None:
    safe_pickle._check_extra_state([None, io.BytesIO(), torch.empty(0, dtype=torch.uint8)], "here")
    with pytest.raises(UnsafeFileError, match="FP8"):
        safe_pickle._check_extra_state([torch.ones(3, dtype=torch.uint8)], "here")


def test_settings_beside_the_weights_run_nothing(trained: Path, data: str, tmp_path: Path) -> None:
    """common.pt, which core reads with PyTorch's `weights_only`."""
    folder = tmp_path / "ck"
    shutil.copytree(trained, folder)
    file = folder / "iter_0000001" / "common.pt"
    torch.save({"training_state": Attack(tmp_path / "attacked")}, file)
    (file.parent / "checksums.json").unlink()
    assert f"{file} is not loaded" in resume(data, folder)
    assert not (tmp_path / "attacked").exists()


def test_settings_run_nothing(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "ck")
    folder = tmp_path / "ck" / "iter_0000001"
    attack = f"!!python/object/apply:os.system ['touch {tmp_path / 'attacked'}']\n"
    (folder / "model.yaml").write_text(attack)
    assert main(["inspect", "--load", str(tmp_path / "ck")]) == 2
    (folder / "model.yaml").unlink()  # as earlier versions wrote checkpoints
    (folder / "run_config.yaml").write_text(attack)
    assert main(["inspect", "--load", str(tmp_path / "ck")]) == 2
    assert not (tmp_path / "attacked").exists()
