"""From `.bin/.idx` files to batches: core's GPT datasets, checked first, and the order in which ranks draw samples.

Every rank builds its own iterator and draws the same samples as the other ranks of its data-parallel replica: any stage
may own an exit and need the labels. Nothing is broadcast.
"""

from __future__ import annotations

import atexit
import copy
import functools
import hashlib
import math
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import normalize
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron.early_exit.config.data import DataConfig, parse_blend, split_shares
from megatron.early_exit.data.index_cache import cached_indices
from megatron.early_exit.data.loss_masks import check_mask, has_mask, loss_mask_of_labels, mask_prefix, separate_texts
from megatron.early_exit.data.token_files import TokenFile, check_token_file, foreign_id
from megatron.early_exit.data.tokenizer import Tokenizer, check_ids_fit
from megatron.early_exit.platform.processes import die_with_parent

SPLITS = ("train", "valid", "test")

CORE_SURPLUS = 0.005

MOST_PASSES_OF_VALIDATION = 100
"""A validation that repeats its data more often is no wish, but a mistake with --eval-iters."""


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


def _check_split(
    split: str, files: Sequence[TokenFile], bounds: tuple[float, float], seq_length: int, hint: str
) -> None:
    """Raise ValueError if a file has not one sample of `seq_length` tokens for the split: core would count epochs of
    nothing for ever, or fill a sample with the same few tokens again and again."""
    for file in files:
        num_documents = round(bounds[1] * file.num_sequences) - round(bounds[0] * file.num_sequences)
        num_tokens = file.num_tokens_between(bounds)
        if num_tokens <= seq_length:
            tokens = f"{num_tokens} tokens" if num_tokens else "no tokens"
            needed = f" and a sample takes {seq_length + 1} (--seq-length {seq_length})" if num_tokens else ""
            raise ValueError(
                f"{tokens} for {split}: {file.prefix} has {file.num_sequences} documents, of which it gets "
                f"{num_documents},{needed} {hint}".replace(",  ", ", ")
            )


class TokenDataset(Dataset):
    """A core dataset whose samples are checked against the tokenizer.

    A sample is a `Batch` without the batch dimension.
    """

    def __init__(self, dataset: Any, vocab_size: int) -> None:
        """vocab_size: ids of the tokenizer, which can be fewer than the embedding has rows."""
        self.dataset = dataset
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        """[s] tensors and a mask [1, s, s] or None. Raises ValueError for an id that is none of the tokenizer's."""
        sample = self.dataset[index]
        smallest, largest = torch.cat((sample["tokens"], sample["labels"])).aminmax()
        if smallest < 0 or largest >= self.vocab_size:
            foreign = int(smallest if smallest < 0 else largest)
            raise ValueError(foreign_id(f"sample {index}{self._origin(index)}", foreign, self.vocab_size))
        return Batch(**{field: sample.get(field) for field in Batch._fields})

    def _origin(self, index: int) -> str:
        """Where the tokens of a sample come from."""
        dataset = self.dataset
        if isinstance(dataset, BlendedDataset):
            dataset, index = dataset.datasets[dataset.dataset_index[index]], dataset.dataset_sample_index[index]
        if not isinstance(dataset, GPTDataset) or dataset.dataset_path is None:
            return ""
        _, documents = dataset._query_document_sample_shuffle_indices(index)
        return f", from the documents {', '.join(map(str, documents.tolist()[:10]))} of {dataset.dataset_path},"


@dataclass
class StampedDatasetConfig(GPTDatasetConfig):
    """Core's configuration, and what tells one content of the files from another."""

    data_stamp: str = ""


class StampedGPTDataset(GPTDataset):
    """Core's dataset, with the loss mask that may lie beside its tokens. Its cached index files are found again only
    for the same data, and only if they are whole.

    Core knows data by their path: after preprocessing again to the same prefix it would use the sample index of the old
    files, silently.
    """

    def __init__(self, indexed_dataset: IndexedDataset, dataset_path: str | None, *arguments: Any) -> None:
        super().__init__(indexed_dataset, dataset_path, *arguments)
        self._masks: StampedGPTDataset | None = None
        if dataset_path is not None and has_mask(dataset_path):
            masks = copy.copy(self)  # the same samples of other files
            masks.dataset = IndexedDataset(mask_prefix(dataset_path))
            self._masks = masks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        if self._masks is None:
            return sample
        marks, _ = self._masks._query_document_sample_shuffle_indices(index)
        marks = torch.from_numpy(marks).clamp(min=0)  # core pads with -1
        sample["loss_mask"] = sample["loss_mask"] * loss_mask_of_labels(marks)
        if self.config.reset_attention_mask or self.config.reset_position_ids:
            forbidden, positions = separate_texts(marks[:-1])
            if self.config.reset_attention_mask:
                sample["attention_mask"] = forbidden
            if self.config.reset_position_ids:
                sample["position_ids"] = positions
        return sample

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "data_stamp"]

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        folder = self.config.path_to_cache or f"{self.dataset.path_prefix}/cache/{type(self).__name__}_indices"
        names = ("document_index", "sample_index", "shuffle_index")
        return cached_indices(self, folder, names, super()._build_document_sample_shuffle_indices)


class CachedBlendedDataset(BlendedDataset):
    """Core's blend, whose cached index files are used only if they are whole."""

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.config.path_to_cache:
            return super()._build_indices()
        names = ("dataset_index", "dataset_sample_index")
        return cached_indices(self, self.config.path_to_cache, names, super()._build_indices)


class DatasetBuilder(BlendedMegatronDatasetBuilder):
    """Core's builder, with the classes above."""

    @staticmethod
    def build_generic_dataset(cls: Any, *args: Any) -> Any:
        cls = CachedBlendedDataset if cls is BlendedDataset else cls
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, *args)


def build_datasets(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    seed: int,
    num_samples: tuple[int, int, int],
    vocab_size: int,
) -> tuple[TokenDataset | None, TokenDataset | None, TokenDataset | None]:
    """Datasets for training, validation and test with at least `num_samples` sequences of `seq_length` tokens each.

    A split is None if 0 samples are asked of it or it has no data of its own. vocab_size: rows of the embedding. Every
    rank calls this: rank 0 builds core's index files, the others wait at a barrier and read them. Files are checked on
    every rank before any barrier. Raises ValueError for missing, empty or damaged files, those of another tokenizer,
    bad blends and splits, and a vocabulary that is too small.
    """
    check_ids_fit(tokenizer.vocab_size, vocab_size)
    common = {
        "random_seed": seed,
        "sequence_length": seq_length,
        "tokenizer": tokenizer,
        "reset_position_ids": data.reset_position_ids,
        "reset_attention_mask": data.reset_attention_mask,
        "eod_mask_loss": data.eod_mask_loss,
        # Without resets the mask is the causal one, which attention kernels make themselves.
        "create_attention_mask": data.reset_attention_mask,
    }
    config = _dataset_config(data, num_samples, common)
    dataset_class = MockGPTDataset if data.mock_data else StampedGPTDataset
    datasets = DatasetBuilder(dataset_class, list(num_samples), lambda: True, config).build()
    train, valid, test = (
        None if dataset is None else TokenDataset(dataset, tokenizer.vocab_size) for dataset in datasets
    )
    return train, valid, test


def _dataset_config(data: DataConfig, num_samples: tuple[int, int, int], common: dict[str, Any]) -> GPTDatasetConfig:
    """Core's configuration for the way in which the data are given, after checking the files."""
    has_per_split = bool(data.train_data_path or data.valid_data_path or data.test_data_path)
    if bool(data.data_path) + has_per_split + data.mock_data != 1:
        raise ValueError(
            "give exactly one of --data-path, --train-data-path (with --valid-data-path, --test-data-path), --mock-data"
        )
    if data.data_path:
        return _config_of_one_source(data, num_samples, common)
    if has_per_split:
        return _config_per_split(data, num_samples, common)
    config = GPTDatasetConfig(**common)
    config.split_matrix = _only_wanted(config.split_matrix, num_samples)
    return config


def _config_of_one_source(
    data: DataConfig, num_samples: tuple[int, int, int], common: dict[str, Any]
) -> StampedDatasetConfig:
    """For --data-path, of which every split takes a share."""
    blend, files = _load_blend(data.data_path, common["tokenizer"].vocab_size)
    bounds = _only_wanted(_split_bounds(data.split), num_samples)
    bounds = _drop_empty_test(bounds, files, common["sequence_length"])
    for split, bound in zip(SPLITS, bounds, strict=True):
        if bound:
            hint = f"give it a larger share in --split {data.split}, or more data"
            _check_split(split, files, bound, common["sequence_length"], hint)
    _check_passes(bounds[1], files, num_samples[1], common["sequence_length"])
    config = StampedDatasetConfig(
        blend=blend,
        split=data.split,
        path_to_cache=_cache_path(data, [blend]),
        mid_level_dataset_surplus=_surplus([blend], num_samples),
        data_stamp=_stamp(files),
        **common,
    )
    # Core would build, and want data for, splits that nobody asked for.
    config.split_matrix = bounds
    return config


def _config_per_split(
    data: DataConfig, num_samples: tuple[int, int, int], common: dict[str, Any]
) -> StampedDatasetConfig:
    """For --train-data-path and its companions."""
    if num_samples[0] and not data.train_data_path:
        raise ValueError("--valid-data-path and --test-data-path need --train-data-path")
    paths = (data.train_data_path, data.valid_data_path, data.test_data_path)
    loaded = {
        split: _load_blend(values, common["tokenizer"].vocab_size)
        for split, values, count in zip(SPLITS, paths, num_samples, strict=True)
        if values and count
    }
    if not loaded:
        raise ValueError(f"no split has both data and samples to draw; samples asked for: {num_samples}")
    for split, (_, files) in loaded.items():
        _check_split(split, files, (0.0, 1.0), common["sequence_length"], "give it more data")
    if "valid" in loaded:
        _check_passes((0.0, 1.0), loaded["valid"][1], num_samples[1], common["sequence_length"])
    blends = [blend for blend, _ in loaded.values()]
    return StampedDatasetConfig(
        blend_per_split=[loaded[split][0] if split in loaded else None for split in SPLITS],
        path_to_cache=_cache_path(data, blends),
        mid_level_dataset_surplus=_surplus(blends, num_samples),
        data_stamp=_stamp([file for _, files in loaded.values() for file in files]),
        **common,
    )


def _check_passes(
    bounds: tuple[float, float] | None, files: Sequence[TokenFile], num_samples: int, seq_length: int
) -> None:
    """Raise ValueError if one validation would pass over its data again and again; warn if it repeats some."""
    if bounds is None:
        return
    available = sum((file.num_tokens_between(bounds) - 1) // seq_length for file in files)
    if num_samples <= available:
        return
    message = (
        f"one validation takes {num_samples:,} samples (--eval-iters x --global-batch-size), but its data hold "
        f"{available:,} of --seq-length {seq_length}"
    )
    if num_samples > MOST_PASSES_OF_VALIDATION * available:
        raise ValueError(f"{message}: give fewer --eval-iters, or validation more data")
    warnings.warn(f"{message}: it uses some of them several times", stacklevel=2)


def _load_blend(values: Sequence[str], vocab_size: int) -> tuple[tuple[list[str], list[float] | None], list[TokenFile]]:
    """A blend in core's form, and its files, checked.

    Without weights, several prefixes are weighted by their tokens. Core's own way then stops after one epoch.
    """
    prefixes, weights = parse_blend(values)
    files = [check_token_file(prefix) for prefix in prefixes]
    for file in files:
        file.check_ids(vocab_size)
        check_mask(file)
    if len(prefixes) == 1:
        return (prefixes, None), files
    return (prefixes, weights or [float(file.num_tokens) for file in files]), files


def _stamp(files: list[TokenFile]) -> str:
    """Sizes, and the lengths of the first documents: core's index depends on lengths alone."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.num_sequences} {file.num_tokens} ".encode() + file.sequence_lengths[:65536].tobytes())
    return digest.hexdigest()


def _split_bounds(split: str) -> list[tuple[float, float] | None]:
    """Where each split begins and ends, as shares of the documents; None for a share of 0."""
    return convert_split_vector_to_split_matrix(normalize(split_shares(split)))


def _only_wanted(bounds: list, num_samples: tuple[int, int, int]) -> list:
    return [bound if count else None for bound, count in zip(bounds, num_samples, strict=True)]


def _drop_empty_test(bounds: list, files: list[TokenFile], seq_length: int) -> list:
    """The default split gives one document in a thousand to the test: a small corpus goes without, with a warning."""
    test = bounds[2]
    if test and any(file.num_tokens_between(test) <= seq_length for file in files):
        warnings.warn(
            "no documents for the test after training, or fewer tokens than one sample has; give it a larger share in "
            "--split",
            stacklevel=2,
        )
        return [*bounds[:2], None]
    return bounds


def _cache_path(data: DataConfig, blends: list) -> str | None:
    """Where core keeps its index files; None puts them beside the data."""
    has_blend = any(len(prefixes) > 1 for prefixes, _ in blends)
    # With a cache, core's BlendedDataset asks for its rank (0.16.1), which fails without a process group.
    if has_blend and not torch.distributed.is_initialized():
        return None
    return data.data_cache_path


def _surplus(blends: list, num_samples: tuple[int, int, int]) -> float:
    """How many more samples than its share each member of a blend must hold, as a fraction.

    Core rounds every member's share up and then draws as many samples as the sum. With few samples and many members a
    heavy one is asked for more than its share, and core stops with 'oversamples'.
    """
    surplus = CORE_SURPLUS
    for _, weights in blends:
        shares = normalize(weights) if weights else []
        for count in num_samples:
            targets = [math.ceil(count * share) for share in shares]
            for target, share in zip(targets, shares, strict=True):
                drawn = math.floor(sum(targets) * share) + 1  # greedy blending is off by less than 1
                if target > 0 and math.ceil(target * (1 + CORE_SURPLUS)) < drawn:
                    surplus = max(surplus, drawn / target - 1)
    return surplus


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
