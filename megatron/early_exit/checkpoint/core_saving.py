"""Writes sharded checkpoints through core's `dist_checkpointing`, by this process alone.

Core starts a process that hands over results and one for each file, which outlive a killed run and keep its output
open. Here core plans, a thread of this process writes with core's function, and core's metadata are written at the end.
"""

from __future__ import annotations

import inspect
import queue
import threading
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_finalize
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron.early_exit.checkpoint.checksums import Checksums, Extent
from megatron.early_exit.checkpoint.folders import why_not_written
from megatron.early_exit.platform.device import device


class ShardedSave:
    """One checkpoint on its way to the disk. All ranks make it, start it and finish it together."""

    def __init__(self, sharded_state: dict[str, Any], folder: Path, content_metadata: dict[str, Any]) -> None:
        """Plan who writes what into `folder`, which is empty, and write what is the same on all ranks."""
        self._folder = folder
        strategy = _PlanningStrategy()
        dist_checkpointing.save(sharded_state, str(folder), strategy, content_metadata=content_metadata)
        assert strategy.planned is not None, "core saves by its strategy"
        self._writer, self._plan = strategy.planned
        self._thread: threading.Thread | None = None
        self._checksums = Checksums()
        self._error: str | None = None

    def write(self) -> None:
        """Write this rank's part now. An error comes out of `finish`."""
        self._write(FileSystemWriterAsync.preload_tensors(self._writer.write_buckets or [], False))

    def start(self) -> None:
        """Copy this rank's part and have the copy written in the background."""
        buckets = _copied(self._writer.write_buckets or [])
        self._thread = threading.Thread(target=self._write, args=(buckets,), daemon=True)
        self._thread.start()

    def is_written(self) -> bool:
        """Whether the parts of all ranks are. A collective: all ranks call it together and get the same answer."""
        is_writing = self._thread is not None and self._thread.is_alive()
        flag = torch.tensor([is_writing], dtype=torch.int, device=device())
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return not flag.item()

    def finish(self) -> Checksums:
        """Wait for the parts of all ranks and write the metadata. Returns the checksums of what all ranks wrote.

        Raises OSError on all ranks with the first error that any met."""
        if self._thread is not None:
            self._thread.join()
        outcomes: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(outcomes, (self._error, self._checksums))
        for rank, (error, _) in enumerate(outcomes):
            if error is not None:
                raise OSError(f"{error} (rank {rank})")
        save_state_dict_async_finalize(*self._plan)
        checksums = Checksums()
        for _, of_rank in outcomes:
            checksums |= of_rank
        return checksums

    def _write(self, buckets: list[Any]) -> None:
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        written: dict[int, list[Any]] = {}
        try:
            for index, bucket in enumerate(buckets):
                written[index] = _write_file(transforms, index, bucket)
            extents = [Extent(*_place(result.storage_data)) for results in written.values() for result in results]
            self._checksums = Checksums.of_extents(self._folder, extents)
        except Exception as error:
            self._error = why_not_written(error, self._folder)
        if self._writer.results_queue is not None:
            self._writer.results_queue.put(written)


def _write_file(transforms: list[Any], index: int, bucket: Any) -> list[Any]:
    """Write one file by core's function, which puts what it wrote, or its error, into a queue."""
    results: queue.Queue[tuple[int, list[Any] | Exception]] = queue.Queue()
    being_written: queue.Queue[int] = queue.Queue()
    being_written.put(index)
    FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, results, being_written, True)
    _, outcome = results.get_nowait()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _place(info: Any) -> tuple[str, int, int]:
    return info.relative_path, info.offset, info.length


def _copied(buckets: list[Any]) -> list[Any]:
    """The buckets with copies of all tensors in this process's memory, which training changes meanwhile."""
    copies = []
    for path, key, (objects, tensors) in buckets:
        copied = [(item, torch.empty_like(t, device="cpu").copy_(t, non_blocking=True)) for item, t in tensors]
        copies.append((path, key, (objects, copied)))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


class _PlanningStrategy(TorchDistSaveShardedStrategy):
    """Core's strategy up to the moment at which files are written; one file for each rank."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.planned: tuple[FileSystemWriterAsync, tuple[Any, ...]] | None = None
        # Core would start a process that holds this queue.
        assert hasattr(filesystem_async, "_results_queue"), "this core passes its results in another way"
        filesystem_async._results_queue = queue.Queue()

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Called by `dist_checkpointing.save`."""
        names = inspect.signature(super().async_save).parameters
        settings = {"async_strategy": "mcore"} if "async_strategy" in names else {}
        self.planned = self.async_save(sharded_state_dict, checkpoint_dir, **settings)

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, plan: tuple[Any, ...], *_: Any) -> Any:
        """Called by `async_save` with the writer, which knows this rank's part, and what finishing needs."""
        return writer, plan
