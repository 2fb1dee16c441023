"""What a worker keeps of the requests that have a slot: their settings, their ids, the rows that are deferred."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.early_exit.inference.protocol import Admit


@dataclass
class DeferredRows:
    """Rows first, first + 1, ... of a slot, which left at the same exit and have not run the layers behind it."""

    first: int
    hidden: Tensor
    """[rows, h]"""

    @property
    def stop(self) -> int:
        return self.first + self.hidden.size(0)


@dataclass
class SlotState:
    """One slot and its request.

    Going past an exit takes all earlier rows of the request along, so earlier rows have never run fewer layers than
    later ones: the deferred rows are a few runs of consecutive positions, and each layer has cached a prefix of the
    slot's rows."""

    request: Admit
    ids: list[int]
    """Of all rows so far, by position: the history of penalties."""
    complete_to: int
    """Positions before this one have keys and values in all layers."""
    deferred: dict[int, DeferredRows] = field(default_factory=dict)
    """By the index of the exit where they left."""
    written_to: int = 0
    """Positions before this one may have been written since the request came."""
    has_failed: bool = False
    """Rows of it were lost, so that those behind them cannot run; the request will be ended."""

    @property
    def num_deferred(self) -> int:
        return sum(rows.hidden.size(0) for rows in self.deferred.values())

    def excluded(self, index: int) -> tuple[int, ...]:
        """Ids that cannot be drawn as token number `index` of the answer, from 0."""
        return self.request.ends if index < self.request.min_tokens else ()

    def begin(self, first: int, tokens: tuple[int, ...]) -> None:
        """Note the ids of new rows. Rows from `first` on that ran before are as if they never had: they were drafts
        that were rejected."""
        assert first <= len(self.ids), f"rows from {first} on come, but only {len(self.ids)} rows came before them"
        del self.ids[first:]
        self.ids += tokens
        self.complete_to = min(self.complete_to, first)
        self.written_to = max(self.written_to, len(self.ids))
        for index, rows in list(self.deferred.items()):
            if rows.first >= first:
                del self.deferred[index]
            elif rows.stop > first:
                self.deferred[index] = DeferredRows(rows.first, rows.hidden[: first - rows.first])

    def defer(self, exit_index: int, first: int, hidden: Tensor) -> None:
        """Keep rows that leave at an exit, behind those that left there before. hidden: [rows, h]"""
        before = self.deferred.get(exit_index)
        if before is not None:
            first, hidden = before.first, torch.cat([before.hidden, hidden])
        self.deferred[exit_index] = DeferredRows(first, hidden)
