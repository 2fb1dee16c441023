"""Takes the rows of one step up the layers, in one batch: where exits are asked, rows leave and wait or join.

Rows that exit leave the batch and wait where they left; when a later row of the same request passes that layer, they go
on with it. So no layer sees a row twice, and every cache entry is what the full model computes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.early_exit.inference.engine.request import RunningRequest
from megatron.early_exit.inference.results import HeadPrediction
from megatron.early_exit.inference.worker.attention import AttentionMetadata, Segment
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.head_output import HeadOutput


@dataclass
class Feed:
    """The rows of one request in one step."""

    request: RunningRequest
    tokens: list[int]
    asks: tuple[int, ...] = ()
    """Exits to ask, by index."""
    is_draft: bool = False
    """The exit that is asked is taken, whatever it says."""
    is_prefill: bool = False
    is_forced: bool = False
    wanted_from: int | None = None
    """The final head is asked for the rows from this position on; None: for none."""
    first: int = 0
    """First position of its rows in the batch: those that waited have joined."""
    predictions: list[HeadPrediction] = field(default_factory=list)
    taken: tuple[int, HeadOutput, int] | None = None
    """(exit, its output, row) of the exit that was taken."""
    final: tuple[HeadOutput, int] | None = None
    """(final head's output, row of position `wanted_from`)"""

    @property
    def stop(self) -> int:
        return self.request.num_rows

    @property
    def num_rows(self) -> int:
        return self.stop - self.first

    @property
    def segment(self) -> Segment:
        return Segment(self.request.slot, self.first, self.num_rows)

    @property
    def is_finite(self) -> bool:
        """Whether the numbers that it got are numbers."""
        if self.taken is not None and not self.taken[1].is_finite(self.taken[2]):
            return False
        if self.final is None:
            return True
        output, row = self.final
        return all(output.is_finite(row + i) for i in range(self.stop - self.wanted_from))


@dataclass
class _Batch:
    """Rows on their way up: feeds in the order of slots, their rows one after the other."""

    feeds: list[Feed]
    hidden: Tensor
    attention: AttentionMetadata

    def offsets(self) -> list[int]:
        """Where each feed's rows begin."""
        return [0, *itertools.accumulate(feed.num_rows for feed in self.feeds)][:-1]


class Walk:
    """The way up the layers of one decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.exit_at_depth = {one.depth: index for index, one in enumerate(decoder.exits)}

    def blocks_of(self, request: RunningRequest) -> list[int]:
        """Exits of the request that have a block, by index: it has seen every row that passed them."""
        return [index for index in request.asked if self.decoder.exits[index].block is not None]

    def run(self, feeds: list[Feed]) -> None:
        """Take the rows of `feeds`, in the order of slots, up the layers until all have exited or reached the end.

        Sets `predictions`, `taken` and `final` of each, and keeps rows that left with their requests."""
        attention = self.decoder.attention_metadata([feed.segment for feed in feeds])
        hidden = self.decoder.embed([token for feed in feeds for token in feed.tokens], attention)
        batch, residual, depth = _Batch(feeds, hidden, attention), hidden, 0
        while True:
            if depth in self.exit_at_depth:
                batch = self._at_exit(self.exit_at_depth[depth], depth, batch, residual)
            if not batch.feeds or depth == self.decoder.num_layers:
                break
            following = self._next_depth(depth, batch.feeds)
            batch.hidden, residual = self.decoder.run_layers(batch.hidden, batch.attention, depth, following)
            for feed in batch.feeds:
                self._count(feed, feed.num_rows * (following - depth), following - depth)
            depth = following
        self._ask_final_head(batch)

    def _next_depth(self, depth: int, feeds: list[Feed]) -> int:
        """The next depth at which something happens to one of `feeds`."""
        depths = (
            at
            for at, index in self.exit_at_depth.items()
            if at > depth
            and any(
                index in feed.asks
                or at in feed.request.waiting
                or (self.decoder.exits[index].block is not None and index in feed.request.asked)
                for feed in feeds
            )
        )
        return min(depths, default=self.decoder.num_layers)

    @staticmethod
    def _count(feed: Feed, passes: int, runs: int) -> None:
        if not feed.is_prefill:
            feed.request.layer_passes += passes
            feed.request.layer_runs += runs

    def _at_exit(self, index: int, depth: int, batch: _Batch, residual: Tensor) -> _Batch:
        """Ask the exit, let rows leave, and let the rows that wait here join those that go on."""
        head = self.decoder.exits[index]
        states = residual if head.mlp is not None else batch.hidden
        offsets = batch.offsets()
        if head.block is not None:
            states = self._run_block(index, batch, offsets)
        asking = [i for i, feed in enumerate(batch.feeds) if index in feed.asks]
        if asking:
            last_rows = [offsets[i] + batch.feeds[i].num_rows - 1 for i in asking]
            self._ask(index, [batch.feeds[i] for i in asking], _take_rows(states, last_rows))
        staying, parts, changed = [], [], False
        for feed, offset in zip(batch.feeds, offsets, strict=True):
            rows = slice(offset, offset + feed.num_rows)
            if feed.taken is not None:
                changed = True
                # A row that has run all layers is complete, but a draft waits for its verification.
                if depth < self.decoder.num_layers or feed.is_draft:
                    feed.request.defer(depth, feed.first, batch.hidden[rows])
                continue
            staying.append(feed)
            waiting = feed.request.waiting.pop(depth, None)
            if waiting is not None:
                assert waiting.stop == feed.first, "rows that wait are not followed by those that join them"
                changed = True
                parts.append(waiting.hidden)
                feed.first = waiting.first
            parts.append(batch.hidden[rows])
        if not changed:
            return batch
        if not staying:
            return _Batch([], batch.hidden[:0], batch.attention)
        return _Batch(staying, torch.cat(parts), self.decoder.attention_metadata([feed.segment for feed in staying]))

    def _ask(self, index: int, feeds: list[Feed], states: Tensor) -> None:
        """Ask the exit about each feed's last row. A cheap head only says which rows may leave: the exit's own head
        then decides, and gives the token. Drafts come from the cheap head, since they are verified anyway.

        states: [feeds, h]"""
        layer_number = self.decoder.exits[index].layer_number
        output = self.decoder.probe_exit(index, states)
        reading = lambda said, row, **kind: HeadPrediction(layer_number, said.token(row), said.confidence(row), **kind)
        candidates = []
        for row, feed in enumerate(feeds):
            if feed.is_draft:
                feed.taken = (index, output, row)
            elif self.decoder.has_approximate_heads and not feed.request.policy.should_exit(
                layer_number, output.confidence(row)
            ):
                feed.predictions.append(reading(output, row, is_approximate=True))
            else:
                candidates.append(row)
        if not candidates:
            return
        rows = candidates
        if self.decoder.has_approximate_heads:
            output, rows = self.decoder.exit_output(index, _take_rows(states, candidates)), range(len(candidates))
        for row, feed in zip(rows, (feeds[candidate] for candidate in candidates), strict=True):
            feed.predictions.append(reading(output, row))
            if feed.request.policy.should_exit(layer_number, output.confidence(row)):
                feed.taken = (index, output, row)

    def _run_block(self, index: int, batch: _Batch, offsets: list[int]) -> Tensor:
        """The exit's block over the rows of all requests that may ask this exit, now or later; the rows that wait here
        have been through it. Returns states for every row of the batch; those of other requests are as before."""
        users = [i for i, feed in enumerate(batch.feeds) if index in feed.request.asked]
        if not users:
            return batch.hidden
        attention, rows = batch.attention, list(range(batch.attention.num_rows))
        if len(users) < len(batch.feeds):
            attention = self.decoder.attention_metadata([batch.feeds[i].segment for i in users])
            rows = [offsets[i] + row for i in users for row in range(batch.feeds[i].num_rows)]
        for i in users:
            self._count(batch.feeds[i], batch.feeds[i].num_rows, 1)
        out = self.decoder.run_exit_block(index, _take_rows(batch.hidden, rows), attention)
        if len(rows) == batch.attention.num_rows:
            return out
        return batch.hidden.index_copy(0, torch.tensor(rows, device=out.device), out)

    def _ask_final_head(self, batch: _Batch) -> None:
        wanted: list[int] = []
        for feed, offset in zip(batch.feeds, batch.offsets(), strict=True):
            if feed.wanted_from is not None:
                feed.final = (None, len(wanted))
                wanted += range(offset + feed.wanted_from - feed.first, offset + feed.num_rows)
        if wanted:
            output = self.decoder.final_output(_take_rows(batch.hidden, wanted))
            for feed in batch.feeds:
                if feed.final is not None:
                    feed.final = (output, feed.final[1])


def _take_rows(hidden: Tensor, rows: list[int]) -> Tensor:
    if rows == list(range(hidden.size(0))):
        return hidden
    if len(rows) == 1:
        return hidden[rows[0] : rows[0] + 1]
    return hidden[torch.tensor(rows, device=hidden.device)]
