"""Which tokens of a token file have a loss, in a second pair of files beside it: PREFIX.mask.bin and PREFIX.mask.idx.

One byte for each token, in the same documents. Training uses the file wherever it lies beside the tokens, alone or in a
blend, so answers of chats are trained on and their prompts are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # core warns when it is imported, before a program has said what is to be shown
    import torch

    from megatron.early_exit.data.token_files import TokenFile

HAS_LOSS = 1
"""Bit of a token that is to be predicted."""
BEGINS = 2
"""Bit of the first token of a text that stands by itself: with --reset-attention-mask it and those behind it do not
attend to what is before, with --reset-position-ids positions begin again."""


def mask_prefix(prefix: str) -> str:
    """Where the mask of a token file lies."""
    return f"{prefix}.mask"


def has_mask(prefix: str) -> bool:
    return any(Path(f"{mask_prefix(prefix)}.{suffix}").exists() for suffix in ("bin", "idx"))


def check_mask(tokens: TokenFile) -> None:
    """Raise ValueError unless the mask of a token file, if it has one, is whole and of these tokens."""
    if not has_mask(tokens.prefix):
        return
    import numpy as np

    from megatron.early_exit.data.token_files import check_token_file

    mask = check_token_file(mask_prefix(tokens.prefix))
    if mask.dtype != np.uint8:
        raise ValueError(f"{mask.prefix}.idx says {mask.dtype}; a loss mask has one byte for each token (uint8)")
    if not np.array_equal(mask.sequence_lengths, tokens.sequence_lengths):
        raise ValueError(
            f"{mask.prefix} is not the loss mask of {tokens.prefix}: it has {mask.num_sequences:,} documents of "
            f"{mask.num_tokens:,} tokens, that has {tokens.num_sequences:,} of {tokens.num_tokens:,}, or others are "
            "longer; make both again together"
        )


def loss_mask_of_labels(marks: torch.Tensor) -> torch.Tensor:
    """[s] float32 from the marks of s + 1 tokens: a position has a loss if the token behind it is to be predicted."""
    return (marks[1:] & HAS_LOSS).float()


def separate_texts(marks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([1, s, s] bool, True where a position may not attend; [s] positions that count from the begin of each text), of
    the marks of s tokens."""
    import torch

    begins = (marks & BEGINS) != 0
    text = begins.cumsum(0)
    place = torch.arange(len(marks))
    start = torch.where(begins, place, 0).cummax(0).values
    forbidden = (text[:, None] != text[None, :]) | (place[None, :] > place[:, None])
    return forbidden[None], place - start
