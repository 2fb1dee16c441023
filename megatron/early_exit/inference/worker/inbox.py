"""The rows that have come to a pipeline stage and have not run: which run next, and which never will.

Rows of one slot run in the order in which they came; only rows of different slots overtake each other. So each layer
sees the positions of a slot one after the other, and attention finds all that lie before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from megatron.early_exit.inference.protocol import StageRows


class _Entry(NamedTuple):
    number: int
    rows: StageRows
    hidden: Tensor | None


class Inbox:
    """Rows by slot. Each is known by its number in the order in which all came."""

    def __init__(self) -> None:
        self._entries: dict[int, deque[_Entry]] = {}
        self._num_added = 0

    @property
    def num_rows(self) -> int:
        return sum(entry.rows.num_rows for entries in self._entries.values() for entry in entries)

    def add(self, rows: StageRows, hidden: Tensor | None) -> int:
        """Add what has come. hidden: [rows, h], None at the first stage.

        Drops rows that a newer epoch replaces: drafts that were rejected. Returns how many fill rows were dropped."""
        entries = self._entries.setdefault(rows.rows.slot, deque())
        stale = [one for one in entries if one.rows.rows.epoch < rows.rows.epoch and one.rows.first >= rows.first]
        for one in stale:
            entries.remove(one)
        entries.append(_Entry(self._num_added, rows, hidden))
        self._num_added += 1
        return _num_fill_rows(stale)

    def drop(self, slot: int) -> int:
        """Drop all rows of a slot. Returns how many of them were fill rows."""
        return _num_fill_rows(self._entries.pop(slot, ()))

    def choose(
        self, max_rows: int, fill_budget: int, is_link_free: bool = True, max_not_exiting: int | None = None
    ) -> list[int]:
        """Numbers of the rows to run next, in the order of slots.

        Rows that a request's next token depends on come first, then those of prompts, then fill rows, each in the order
        in which they came. max_rows: in all. What comes first runs, however many rows it has, and so do the first rows
        of a prompt, or others that decode could keep it waiting for ever. fill_budget: fill rows that may run by
        themselves, for the next stage must take them; those before another row of their slot always may, and so may the
        first ones where no fill row is on its way to the next stage (`is_link_free`). max_not_exiting: rows in the
        phases of decoding that no exit may answer; None: any number."""
        chosen: list[tuple[int, _Entry]] = []
        num_rows = num_not_exiting = 0
        has_prompt = False
        candidates = [(slot, list(_next_of(entries))) for slot, entries in self._entries.items() if entries]
        for slot, entries in sorted(candidates, key=lambda one: _priority(one[1])):
            last = entries[-1].rows
            count = sum(entry.rows.num_rows for entry in entries)
            is_prompt = _is_prompt(last)
            if num_rows + count > max_rows and chosen and (has_prompt or not is_prompt):
                continue
            has_prompt |= is_prompt
            if last.is_fill:
                if count > fill_budget and not is_link_free:
                    continue
                fill_budget, is_link_free = fill_budget - count, False
            if not is_prompt and not last.is_fill and not last.rows.exits:
                if num_not_exiting == max_not_exiting:
                    continue
                num_not_exiting += 1
            num_rows += count
            chosen += [(slot, entry) for entry in entries]
        return [entry.number for _, entry in sorted(chosen, key=lambda one: (one[0], one[1].number))]

    def take(self, numbers: Collection[int]) -> tuple[list[tuple[StageRows, Tensor | None]], int]:
        """Take these rows out; those of one slot, which are the first ones of it, as one, in the order of slots.

        Returns them with their hidden states, and how many of them were fill rows."""
        wanted, taken, num_fill_rows = set(numbers), [], 0
        for slot in sorted(self._entries):
            entries = self._entries[slot]
            mine = []
            while entries and entries[0].number in wanted:
                mine.append(entries.popleft())
                wanted.remove(mine[-1].number)
            if mine:
                num_fill_rows += _num_fill_rows(mine)
                taken.append(_merged(mine))
        assert not wanted, f"rows {sorted(wanted)} are not there, or not the first ones of their slots"
        self._entries = {slot: entries for slot, entries in self._entries.items() if entries}
        return taken, num_fill_rows


def _is_prompt(rows: StageRows) -> bool:
    return rows.rows.phase in ("prefill", "score") and not rows.is_fill


def _num_fill_rows(entries: Iterable[_Entry]) -> int:
    return sum(entry.rows.num_fill_rows for entry in entries)


def _next_of(entries: Iterable[_Entry]) -> Iterator[_Entry]:
    """The first rows of a slot that can run as one."""
    before = None
    for entry in entries:
        if before is not None and not _can_follow(before.rows, entry.rows):
            return
        yield entry
        before = entry


def _can_follow(before: StageRows, rows: StageRows) -> bool:
    """Whether rows can run as one with those before them: of both only the newest row may have an exit to evaluate, and
    the final head can draw for several rows alone if all of them are drafts to compare with."""
    if before.stop != rows.first:
        return False  # `rows` replaces some of them
    is_compared = before.rows.phase == rows.rows.phase == "speculate" and not before.rows.exits
    return before.is_fill or (is_compared and not rows.is_fill)


def _priority(entries: Sequence[_Entry]) -> tuple[int, int]:
    last = entries[-1].rows
    return 2 if last.is_fill else int(_is_prompt(last)), entries[0].number


def _merged(entries: Sequence[_Entry]) -> tuple[StageRows, Tensor | None]:
    """Consecutive rows of one slot as one: those before the newest are taken along, and drafts are drawn for."""
    if len(entries) == 1:
        return entries[0].rows, entries[0].hidden
    each = [entry.rows for entry in entries]
    newest, owed = each[-1], [one for one in each if not one.is_fill]
    drawn_from = [one.rows.sample_from for one in owed if one.rows.sample_from is not None]
    rows = StageRows(
        rows=msgspec.structs.replace(newest.rows, sample_from=min(drawn_from, default=None)),
        first=each[0].first,
        tokens=tuple(token for one in each for token in one.tokens),
        answers=sum(one.answers for one in each),
        predictions=newest.predictions,
        layer_passes=sum(one.layer_passes for one in each),
        layer_runs=newest.layer_runs,
    )
    hidden = [entry.hidden for entry in entries if entry.hidden is not None]
    return rows, torch.cat(hidden) if hidden else None
