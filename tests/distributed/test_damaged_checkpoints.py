"""Damaged checkpoints are named, old ones without checksums still load, and full disks are said."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.early_exit.checkpoint.convert_command import main
from megatron.early_exit.config.checkpoint_files import CHECKSUMS_FILE
from megatron.early_exit.config.run import RunConfig
from tests.configs import make_training_config
from tests.distributed.training_runs import training_run
from tests.distributed.workers import run_distributed


def outcome(call: Callable, **kwargs: object) -> str:
    """What rank 0 of one rank says."""
    return run_distributed(1, _outcome, call=call, kwargs=kwargs)[0]


def _outcome(call: Callable, kwargs: dict) -> str:
    try:
        call(**kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def resume(data: str, load: Path) -> str:
    cfg = make_training_config(data, load.parent / "resumed", load=str(load), lr_decay_iters=9, train_iters=2)
    return outcome(training_run, cfg=cfg)


def inspect(folder: Path, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    status = main(["inspect", "--verify", "--load", str(folder)])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_garbage_in_a_file_of_tensors(trained: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "ck"
    shutil.copytree(trained, folder)
    status, printed = inspect(folder, capsys)
    assert status == 0 and "verified      all " in printed
    file = folder / "iter_0000001" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = os.urandom(2000)
    file.write_bytes(content)
    status, printed = inspect(folder, capsys)
    assert status == 2 and f"{file}: " in printed and "are not what was written" in printed
    said = resume(data, folder)
    assert said.startswith("OSError") and f"{file} is damaged: the bytes of " in said and "--load-iteration" in said
    (folder / "iter_0000001" / CHECKSUMS_FILE).unlink()  # as before there were any
    status, printed = inspect(folder, capsys)
    assert status == 0 and "the others have no checksum" in printed


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_other_files(trained: Path, data: str, tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "ck"
    shutil.copytree(trained, folder)
    file = folder / "iter_0000001" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert f"{file} is damaged" in resume(data, folder)
    status, printed = inspect(folder, capsys)
    assert status == 2 and f"{file} is damaged" in printed


def test_checkpoints_without_checksums_load(trained: Path, data: str, tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    shutil.copytree(trained, folder)
    (folder / "iter_0000001" / CHECKSUMS_FILE).unlink()
    assert resume(data, folder) == "no error"


def test_converted_checkpoints_have_checksums(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of what is written and of what is linked."""
    weights, linked = tmp_path / "weights", tmp_path / "linked"
    for command, source, target in (
        (["add-exits", "--exit-layer-nums", "1"], trained, weights),
        (["remove-exits"], weights, linked),
    ):
        assert main([*command, "--load", str(source), "--save", str(target)]) == 0
        status, printed = inspect(target, capsys)
        assert status == 0 and "verified      all " in printed
    file = next((linked / "iter_0000000").glob("linked_*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert inspect(linked, capsys)[0] == 2


def on_a_full_disk(cfg: RunConfig) -> tuple[str, str]:
    """The disk takes one checkpoint; what is written then never reaches it. Returns the error and what was printed."""
    flush, flushed = os.fsync, []

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        flushed.append(path)
        if path.endswith(".distcp") and "iter_0000004" in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    os.fsync = fsync
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            error = _outcome(training_run, {"cfg": cfg})
    finally:
        os.fsync = flush
    assert flushed
    return error, printed.getvalue()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at /proc")
@pytest.mark.parametrize("changes", [{}, {"async_save": True}], ids=str)
def test_a_full_disk_is_said(data: str, tmp_path: Path, changes: dict) -> None:
    folder = tmp_path / "ck"
    cfg = make_training_config(data, tmp_path, save=str(folder), save_interval=2, **changes)
    ((said, printed),) = run_distributed(1, on_a_full_disk, cfg=cfg)
    assert said.startswith(f"OSError: saving iteration 4 in {folder} failed: no space is left on its disk (")
    assert "rank 0" in said and "Earlier checkpoints are untouched" in said and len(said.splitlines()) == 1
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert [path.name for path in folder.glob("iter_*")] == ["iter_0000002"]  # and the room is free again
    assert "saved iteration 2" in printed and "saved iteration 4" not in printed


def test_a_full_disk_is_said_by_conversions(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's writer of whole files says nothing of it."""

    def save(*args: object) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0\nframe #0: pages")

    monkeypatch.setattr("megatron.early_exit.checkpoint.writing.torch.save", save)
    assert main(["remove-exits", "--load", str(trained), "--save", str(tmp_path / "more")]) == 2
    said = capsys.readouterr().err
    assert "no space is left on its disk" in said and "frame" not in said
    assert list((tmp_path / "more").iterdir()) == []
