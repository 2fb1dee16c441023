"""Where the tokens come from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron.early_exit.config.ranges import PositiveInt, at_least, at_most

TokenizerType = Literal[
    "HuggingFaceTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer",
    "ByteLevelTokenizer", "NullTokenizer",
]  # fmt: skip

TOKENIZERS_WITHOUT_MODEL = ("ByteLevelTokenizer", "NullTokenizer")


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer, and where it lies."""

    tokenizer_type: TokenizerType
    tokenizer_model: str | None = None
    """Folder (Hugging Face) or `.model` file (SentencePiece); None for those without files."""

    vocab_size: int | None = None
    """Number of ids, for NullTokenizer."""


@dataclass(frozen=True)
class DataConfig:
    """Datasets, their split and the tokenizer."""

    data_path: tuple[str, ...] = ()
    """Prefix of `.bin/.idx` files, or a blend: WEIGHT PREFIX WEIGHT PREFIX ..., or PREFIX PREFIX ..."""

    train_data_path: tuple[str, ...] = ()
    """As --data-path, for training only; with --valid-data-path and --test-data-path."""

    valid_data_path: tuple[str, ...] = ()
    """As --data-path, for validation only."""

    test_data_path: tuple[str, ...] = ()
    """As --data-path, for the test after training only."""

    split: str = "969,30,1"
    """Shares of documents for training, validation and test, with --data-path."""

    data_cache_path: str | None = None
    """Folder for the index files that map samples to documents. Default: beside the data."""

    mock_data: bool = False
    """Train on made-up tokens (speed tests)."""

    reset_position_ids: bool = False
    """Count positions from 0 again after each end of document."""

    reset_attention_mask: bool = False
    """Do not attend across an end of document."""

    eod_mask_loss: bool = False
    """No loss on end-of-document tokens."""

    num_workers: Annotated[int, at_least(0), at_most(512)] = 2
    """Processes that load data on each rank."""

    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """Library of the tokenizer."""

    tokenizer_model: str | None = None
    """Folder (Hugging Face) or `.model` file (SentencePiece) of the tokenizer."""

    vocab_size: PositiveInt | None = None
    """Number of ids, for NullTokenizer and --mock-data."""

    @property
    def tokenizer(self) -> TokenizerConfig:
        """The tokenizer that is used: made-up tokens without one are those of the NullTokenizer."""
        has_none = self.tokenizer_type not in TOKENIZERS_WITHOUT_MODEL and not self.tokenizer_model
        kind = "NullTokenizer" if self.mock_data and has_none else self.tokenizer_type
        return TokenizerConfig(kind, self.tokenizer_model, self.vocab_size)


def parse_blend(values: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of `--data-path`: PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ...

    Weights are None if none are given. Raises ValueError for a mixture of both forms, a weight that is not positive,
    and a prefix that is named twice."""
    values = [value.strip() for value in values]
    prefixes, weights = values, None
    if any(map(_is_number, values)):
        prefixes, weights = values[1::2], _numbers(values[0::2])
        if weights is None or len(prefixes) != len(weights) or any(map(_is_number, prefixes)):
            raise ValueError(f"a blend is PREFIX PREFIX ... or WEIGHT PREFIX WEIGHT PREFIX ..., not {' '.join(values)}")
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"blend weights must be positive numbers, not {' '.join(values[0::2])}")
        if not math.isfinite(sum(weights)) or not all(weight / sum(weights) > 0 for weight in weights):
            raise ValueError(f"blend weights {' '.join(values[0::2])} are too large or too far apart to be divided")
    if len(set(prefixes)) != len(prefixes) or "" in prefixes:
        raise ValueError(f"a blend names each prefix once, not {' '.join(prefixes)}; add up the weights")
    return prefixes, weights


def split_shares(split: str) -> list[float]:
    """Three shares (training, validation, test) of a `--split` text such as '969,30,1'. Raises ValueError."""
    words = [word for word in re.split(r"[,/\s]+", split.strip()) if word]
    shares = _numbers(words)
    if shares is None or not 1 <= len(shares) <= 3 or min(shares) < 0 or not math.isfinite(sum(shares)):
        raise ValueError(f"--split {split}: expected up to three shares that are not negative, such as 969,30,1")
    if shares[0] == 0:
        raise ValueError(f"--split {split} leaves nothing for training: its first share is 0")
    return shares + [0.0] * (3 - len(shares))


def _numbers(words: Sequence[str]) -> list[float] | None:
    """The words as numbers, or None if one of them is none."""
    try:
        return [float(word) for word in words]
    except ValueError:
        return None


def _is_number(word: str) -> bool:
    return _numbers([word]) is not None
