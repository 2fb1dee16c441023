"""The folder of a run: names, locks, checksums, and what killed runs and full disks leave."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.early_exit.checkpoint import folders
from megatron.early_exit.checkpoint.checksums import Checksums, DamagedFileError, Extent
from megatron.early_exit.config import checkpoint_files
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.checkpoint_files import CHECKSUMS_FILE, LOCK_FILE, finished_iterations
from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.platform import folder_lock
from megatron.early_exit.platform.folder_lock import FolderLock

LATEST = "latest_checkpointed_iteration.txt"


def finished(save: Path, iteration: int, content: str = "") -> Path:
    folders.begin(save, iteration)
    (folders.partial_folder(save, iteration) / "run_config.yaml").write_text(content)
    return folders.publish(folders.partial_folder(save, iteration), iteration)


def test_the_tree_shows_every_name() -> None:
    names = {value for name, value in vars(checkpoint_files).items() if name.isupper() and isinstance(value, str)}
    assert len(names) > 15
    assert [name for name in sorted(names) if name not in (checkpoint_files.__doc__ or "")] == []


def test_the_latest_checkpoint_of_any_writer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"holds no checkpoint: {LATEST} is missing"):
        checkpoint_files.chosen_folder(tmp_path, None)
    assert checkpoint_files.chosen_folder(tmp_path, 3) == tmp_path / "iter_0000003"
    for text, name in (("12\n", "iter_0000012"), ("release", "release"), ("12345678", "iter_12345678")):
        (tmp_path / LATEST).write_text(text)
        assert checkpoint_files.chosen_folder(tmp_path, None) == tmp_path / name
    assert checkpoint_files.chosen_folder(tmp_path, 0) == tmp_path / "iter_0000000"
    assert checkpoint_files.iteration_of(tmp_path / "iter_0000012.replaced") == 12
    with pytest.raises(ValueError, match="release is not named as the checkpoint of an iteration is"):
        checkpoint_files.iteration_of(tmp_path / "release")


def test_a_missing_target_names_the_newest_checkpoint(tmp_path: Path) -> None:
    finished(tmp_path, 2)
    finished(tmp_path, 10)
    (tmp_path / LATEST).unlink()
    with pytest.raises(ConfigError, match=f"{LATEST} is missing.*--load-iteration 10"):
        checkpoint_folder(tmp_path)
    with pytest.raises(ConfigError, match="--load-iteration 11: .*--load-iteration 10"):
        checkpoint_folder(tmp_path, 11)
    with pytest.raises(ConfigError, match="--pretrained-checkpoint nowhere: no such folder"):
        checkpoint_folder("nowhere", flag="--pretrained-checkpoint")
    (tmp_path / LATEST).write_text("12")
    with pytest.raises(ConfigError) as error:
        checkpoint_folder(tmp_path)
    said = str(error.value)
    assert "names iteration 12" in said and str(tmp_path / "iter_0000012") in said
    assert "--load-iteration 10" in said and f"write 10 into {LATEST}" in said
    assert checkpoint_folder(tmp_path, 10) == tmp_path / "iter_0000010"
    (tmp_path / "iter_0000010" / "run_config.yaml").unlink()
    with pytest.raises(ConfigError, match="no finished checkpoint.*--load-iteration 2"):
        checkpoint_folder(tmp_path, 10)


def test_clearing_up_finishes_what_a_killed_run_was_doing(tmp_path: Path) -> None:
    finished(tmp_path, 2, "old")
    (tmp_path / "iter_0000002").rename(tmp_path / "iter_0000002.replaced")
    finished(tmp_path, 4)
    for name in ("iter_0000004.replaced", "iter_0000006.partial", "iter_0000001.removed", "iter_x.partial", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / LATEST).with_suffix(".tmp").write_text("6")
    done = folders.clean_up(tmp_path)
    assert len(done) == 4 and any("iter_0000002" in one and "restored" in one for one in done)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000002", "iter_0000004", "iter_x.partial", LATEST, "mine",
    ]  # fmt: skip
    assert (tmp_path / "iter_0000002" / "run_config.yaml").read_text() == "old"
    (tmp_path / LATEST).unlink()
    assert "iteration 4 the latest" in folders.clean_up(tmp_path)[0]
    assert (tmp_path / LATEST).read_text() == "4"
    assert folders.clean_up(tmp_path) == []


def test_old_checkpoints_are_gone_or_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for iteration in (1, 2, 3):
        finished(tmp_path, iteration)
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)  # killed in between
    folders.remove_old(tmp_path, 2, 3)
    assert finished_iterations(tmp_path) == [2, 3]


OWNER = """
import sys
from pathlib import Path
from megatron.early_exit.platform.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("owned", flush=True)
sys.stdin.read()
"""


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert owner.stdout.readline() == "owned\n"
    with pytest.raises(BlockingIOError, match=rf"{tmp_path} is being written by process {owner.pid} on .*, since 20"):
        FolderLock(tmp_path)
    owner.kill()
    owner.wait()
    lock = FolderLock(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    lock.release()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some NFS mounts: a warning, unless the file names a process that runs here."""

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": folder_lock.socket.gethostname(), "pid": os.getppid()}))
    with pytest.raises(BlockingIOError, match=str(os.getppid())):
        FolderLock(tmp_path)
    (tmp_path / LOCK_FILE).write_text("torn {")
    FolderLock(tmp_path).release()


def test_checksums_find_what_changed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    (tmp_path / "whole").write_bytes(b"content")
    parts = [Extent("a", 0, 40), Extent("a", 40, 60)]
    sums = Checksums.of_extents(tmp_path, parts) | Checksums.of_files(tmp_path, ["whole"])
    sums.write(tmp_path)
    read = Checksums.read(tmp_path)
    assert read.damaged(tmp_path, parts) == []
    content = bytearray(range(100))
    content[50] ^= 1
    (tmp_path / "a").write_bytes(content)
    assert read.damaged(tmp_path, parts) == [parts[1]]
    (tmp_path / "a").write_bytes(bytes(range(99)))
    assert read.damaged(tmp_path, parts) == [parts[1]]
    (tmp_path / "a").unlink()
    assert read.damaged(tmp_path, parts) == parts
    read.check_file(tmp_path, "whole")
    for wrong in (b"Content", b"content and more", b""):
        (tmp_path / "whole").write_bytes(wrong)
        with pytest.raises(DamagedFileError, match="whole is damaged"):
            read.check_file(tmp_path, "whole")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"crc32": {"a": [1]}}', '{"crc32": {"a": [[0, 1'])
def test_damaged_checksums_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / CHECKSUMS_FILE).write_text(content)
    with pytest.raises(DamagedFileError, match=r"checksums\.json is damaged"):
        Checksums.read(tmp_path)


def test_no_space_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert folders.why_not_written(full, tmp_path).startswith("no space is left on its disk (")
    wrapped = RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed\nframe #0: pages")
    assert folders.why_not_written(wrapped, tmp_path) == f"RuntimeError: {str(wrapped).splitlines()[0]}"
    wrapped.__cause__ = full
    assert "no space" in folders.why_not_written(wrapped, tmp_path)
    quota = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "quota" in folders.why_not_written(quota, tmp_path)
    usage = folders.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "no space" in folders.why_not_written(RuntimeError("unexpected pos"), tmp_path / "not" / "there")


def test_a_checkpoint_without_its_description_is_not_taken_for_another_kind(tmp_path: Path) -> None:
    folder = finished(tmp_path, 3)
    (folder / "run_config.yaml").unlink()
    (folder / ".metadata").touch()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_settings.json").touch()
    with pytest.raises(ConfigError, match=r"no finished checkpoint \(.*model.yaml is missing\)"):
        checkpoint_folder(tmp_path)
