"""From `.bin/.idx` files to datasets for training, validation and test; the files are checked first."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import normalize

from megatron.early_exit.config.data import DataConfig, parse_blend, split_shares
from megatron.early_exit.data.core_datasets import DatasetBuilder, StampedDatasetConfig, StampedGPTDataset, TokenDataset
from megatron.early_exit.data.loss_masks import check_mask
from megatron.early_exit.data.token_files import TokenFile, check_token_file
from megatron.early_exit.data.tokenizer import Tokenizer, check_ids_fit

SPLITS = ("train", "valid", "test")

CORE_SURPLUS = 0.005

MOST_PASSES_OF_VALIDATION = 100
"""A validation that repeats its data more often is no wish, but a mistake with --eval-iters."""


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
