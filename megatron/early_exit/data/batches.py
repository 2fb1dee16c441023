"""Batches of samples, and the order in which ranks draw them.

Every rank builds its own iterator and draws the same samples as the other ranks of its data-parallel replica: any stage
may own an exit and need the labels. Nothing is broadcast.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron.early_exit.platform.processes import die_with_parent


class Batch(NamedTuple):
    """One microbatch."""

    tokens: torch.Tensor
    """[b, s] int64: what the model reads."""

    labels: torch.Tensor
    """[b, s] int64: the token after each token."""

    loss_mask: torch.Tensor
    """[b, s] float32: 0 where there is no loss."""

    position_ids: torch.Tensor
    """[b, s] int64."""

    attention_mask: torch.Tensor | None
    """[b, 1, s, s] bool, True where attention is forbidden (core's convention); None for plain causal attention."""

    hidden_states: dict[str, torch.Tensor] | None = None
    """[b, s, h] each: what frozen layers made of the tokens, where that is kept (`data.hidden_states`)."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; from pinned memory the copy runs beside the CPU."""

        def move(field: Any) -> Any:
            if isinstance(field, dict):
                return {name: move(value) for name, value in field.items()}
            return None if field is None else field.to(device, non_blocking=True)

        return Batch(*map(move, self))


class DataExhaustedError(RuntimeError):
    """Training asked for more samples than its dataset has."""


class ReplicaSampler(Sampler[list[int]]):
    """Sample numbers of each microbatch of one data-parallel replica, in Megatron's order.

    Step k takes the samples from consumed_samples + k * micro_batch_size * dp_size on, `micro_batch_size` of them for
    each replica in turn. So a global batch holds the same samples whatever the micro batch size and the number of
    replicas. The last samples, too few for a microbatch on every replica, are left out; with `is_cyclic` it then starts
    again at sample 0.
    """

    def __init__(
        self,
        num_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        is_cyclic: bool,
    ) -> None:
        stride = micro_batch_size * dp_size
        if micro_batch_size < 1 or not 0 <= dp_rank < dp_size or consumed_samples < 0:
            raise ValueError(
                f"micro_batch_size {micro_batch_size} must be at least 1, dp_rank {dp_rank} below dp_size {dp_size}, "
                f"consumed_samples {consumed_samples} at least 0"
            )
        if num_samples < stride:
            raise ValueError(
                f"the dataset has {num_samples} samples, fewer than one microbatch on every replica: "
                f"micro_batch_size({micro_batch_size}) * dp_size({dp_size}) = {stride}"
            )
        self.num_samples, self.consumed_samples, self.micro_batch_size = num_samples, consumed_samples, micro_batch_size
        self.dp_rank, self.stride, self.is_cyclic = dp_rank, stride, is_cyclic

    def __iter__(self) -> Iterator[list[int]]:
        start = self.consumed_samples
        if self.is_cyclic:
            start %= self.num_samples // self.stride * self.stride
        while True:
            for first in range(start, self.num_samples - self.stride + 1, self.stride):
                mine = first + self.dp_rank * self.micro_batch_size
                yield list(range(mine, mine + self.micro_batch_size))
            if not self.is_cyclic:
                return
            start = 0


def collate(samples: list[Batch]) -> Batch:
    """Stack samples along a new first dimension."""

    def stack(fields: list[Any]) -> Any:
        if isinstance(fields[0], dict):
            return {name: stack([field[name] for field in fields]) for name in fields[0]}
        return None if fields[0] is None else torch.stack(fields)

    return Batch(*(stack(list(fields)) for fields in zip(*samples, strict=True)))


class Samples(Protocol):
    """What microbatches are made of."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch:
        """Without the batch dimension. Raises ValueError or OSError for what the user can mend."""


def build_iterator(
    dataset: Samples,
    *,
    consumed_samples: int = 0,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    is_cyclic: bool = False,
) -> Iterator[Batch]:
    """Microbatches of replica `dp_rank` on `device`, from sample `consumed_samples` (of all replicas together) on.

    Without `is_cyclic` it raises DataExhaustedError when no whole microbatch is left; with it (validation) it starts
    again. num_workers: processes that load ahead; 0 loads in this one. Raises ValueError if the dataset is too small
    for one microbatch.
    """
    sampler = ReplicaSampler(len(dataset), consumed_samples, micro_batch_size, dp_rank, dp_size, is_cyclic)
    loader = DataLoader(
        _ErrorsAsValues(dataset),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate_or_error,
        pin_memory=torch.device(device).type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=functools.partial(_begin_to_load, os.getpid()),
        generator=torch.Generator(),  # else it draws from the generator of dropout, and a resumed run would differ
    )
    return _draw(loader, sampler, device)


class _ErrorsAsValues(Dataset):
    """A dataset that returns what the user can mend, which processes that load data can raise as tracebacks only."""

    def __init__(self, dataset: Samples) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch | Exception:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return error


def _collate_or_error(samples: list[Batch | Exception]) -> Batch | Exception:
    batches = []
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
        batches.append(sample)
    return collate(batches)


def _begin_to_load(trainer: int, worker: int) -> None:
    """End with the trainer, not before: torchrun sends SIGTERM to whole process groups, and the trainer saves and stops
    then."""
    die_with_parent(trainer)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _draw(loader: DataLoader, sampler: ReplicaSampler, device: torch.device | str) -> Iterator[Batch]:
    batches = iter(loader)
    # A program that ends with an iterator in use would wait for ever: Python ends processes by the signal they ignore.
    end_workers = getattr(batches, "_shutdown_workers", lambda: None)
    atexit.register(end_workers)
    try:
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            yield batch.to(device)
    finally:
        atexit.unregister(end_workers)
    raise DataExhaustedError(
        f"training has used all {sampler.num_samples} samples of its dataset (from {sampler.consumed_samples} on, "
        f"{sampler.stride} at a time); ask for fewer iterations or build the dataset for more samples"
    )
