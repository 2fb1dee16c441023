"""Saves training checkpoints in core's `torch_dist` format, readable under any TP/PP/DP layout.

A finished checkpoint is core's files, with checksums, plus `model.yaml` (what the model is), `run_config.yaml` (all
settings of the run) and `tokenizer/` (so that the folder stands alone). It gets its name when it is complete
(`checkpoint/folders.py`), so a killed save never damages an older one. A run owns the folder that it saves into, from
its start to its end.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron.early_exit.checkpoint import folders
from megatron.early_exit.checkpoint.checksums import Checksums
from megatron.early_exit.checkpoint.core_saving import ShardedSave
from megatron.early_exit.checkpoint.links import link_rest
from megatron.early_exit.checkpoint.writing import CONTENT_METADATA, write_checksums
from megatron.early_exit.config.checkpoint_files import RUN_CONFIG_FILE, TOKENIZER_FOLDER
from megatron.early_exit.config.run import ResolvedConfig
from megatron.early_exit.config.saved_description import save_description
from megatron.early_exit.config.serialize import save_run_config
from megatron.early_exit.data.tokenizer_files import read_tokenizer_files, write_tokenizer
from megatron.early_exit.model.build import Model
from megatron.early_exit.platform.distributed import on_rank_zero
from megatron.early_exit.platform.folder_lock import FolderLock
from megatron.early_exit.training.checkpoint_state import keep_exits_alone, sharded_state
from megatron.early_exit.training.state import TrainingState


class SaveFolder:
    """The folder of --save, which this run owns until `release` or the end of rank 0's process."""

    def __init__(self, path: str | Path) -> None:
        """Make the folder, lock it, and clear away what a killed run left. All ranks call it together.

        Raises OSError on all ranks if it cannot be written, or if another run owns it."""
        self.path = Path(path)
        self.cleared: list[str] = []
        """What was done about a killed run, in words; on rank 0."""
        self._lock: FolderLock | None = None
        on_rank_zero(self._own)

    def _own(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        self.cleared = folders.clean_up(self.path)

    def check_room(self, checkpoint_bytes: int) -> None:
        """Raise OSError on all ranks if it cannot hold one checkpoint."""
        on_rank_zero(lambda: self._check_room(checkpoint_bytes))

    def _check_room(self, checkpoint_bytes: int) -> None:
        free = shutil.disk_usage(self.path).free
        if free < checkpoint_bytes:
            raise OSError(
                f"--save {self.path} has {free / 2**30:.2f} GiB free, one checkpoint takes about "
                f"{checkpoint_bytes / 2**30:.2f} GiB. Free some space or choose another folder."
            )

    def release(self) -> None:
        """Let other runs save here."""
        if self._lock is not None:
            self._lock.release()


class CheckpointSaver:
    """Writes checkpoints of one run, at once or in the background (`--async-save`). All ranks call it together."""

    def __init__(
        self, config: ResolvedConfig, base: Path | None = None, announce: Callable[[str], None] | None = None
    ) -> None:
        """base: of a run that tunes exits, the checkpoint with everything else; the files of that are linked, so that
        checkpoints of the exits alone are whole ones. announce: told when a checkpoint is complete."""
        self.config, self._base = config, base
        assert config.checkpoint.save is not None, "a run without --save saves nothing"
        self.folder = Path(config.checkpoint.save)
        self._tokenizer = read_tokenizer_files(config.description.tokenizer)
        self._announce = announce
        self._pending: tuple[ShardedSave, int] | None = None
        """What is being written in the background, and its iteration."""

    def save(
        self,
        model: Model,
        optimizer: MegatronOptimizer | None,
        scheduler: OptimizerParamScheduler | None,
        state: TrainingState,
    ) -> None:
        """Write the checkpoint of `state.iteration`. With asynchronous saving it is finished by a later call, or by
        `finalize`. Raises OSError if it cannot be written; the checkpoints before it are as they were."""
        self.finalize(wait=True)  # one save at a time
        iteration = state.iteration
        with self._saying(iteration):
            on_rank_zero(functools.partial(folders.begin, self.folder, iteration))
            checkpoint = self.config.checkpoint
            sharded = sharded_state(
                model,
                None if checkpoint.no_save_optim else optimizer,
                None if checkpoint.no_save_optim else scheduler,
                state,
                with_rng=not checkpoint.no_save_rng,
            )
            if self._base is not None:
                keep_exits_alone(sharded)
            save = ShardedSave(sharded, folders.partial_folder(self.folder, iteration), dict(CONTENT_METADATA))
            if checkpoint.async_save:
                save.start()
            else:
                save.write()
        self._pending = save, iteration
        if not checkpoint.async_save:
            self.finalize(wait=True)

    def finalize(self, wait: bool = False) -> None:
        """Complete the checkpoint that is being written if all of it is; with `wait`, wait for that."""
        if self._pending is None or not (wait or self._pending[0].is_written()):
            return
        (save, iteration), self._pending = self._pending, None
        with self._saying(iteration):
            checksums = save.finish()
            on_rank_zero(lambda: self._publish(iteration, checksums))
        if self._announce is not None:
            self._announce(f" saved iteration {iteration} in {self.folder}")

    def _publish(self, iteration: int, checksums: Checksums) -> None:
        partial = folders.partial_folder(self.folder, iteration)
        if self._base is not None:
            checksums |= link_rest(partial, self._base)
        save_run_config(self.config, partial / RUN_CONFIG_FILE)
        write_tokenizer(self._tokenizer, partial / TOKENIZER_FOLDER)
        save_description(self.config.description, partial)
        write_checksums(partial, checksums)
        published = folders.publish(partial, iteration)
        if self._base is not None:
            self._base = published  # the one that the run began with may be removed as too old
        if self.config.checkpoint.keep_last is not None:
            folders.remove_old(self.folder, self.config.checkpoint.keep_last, iteration)

    @contextmanager
    def _saying(self, iteration: int) -> Iterator[None]:
        """Turn any failure into an OSError that says what failed and what to do."""
        try:
            yield
        except (Exception, CheckpointException) as error:
            reason = folders.why_not_written(error, self.folder)
            if torch.distributed.get_rank() == 0:  # what was written of it only takes room
                shutil.rmtree(folders.partial_folder(self.folder, iteration), ignore_errors=True)
            raise OSError(
                f"saving iteration {iteration} in {self.folder} failed: {reason}. Earlier checkpoints are untouched: "
                "make room and resume with --load."
            ) from error
