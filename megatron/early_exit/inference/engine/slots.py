"""Slots of the KV cache: who has which, and which rows of it a new request can share instead of computing them.

Keys and values of a row depend on the tokens up to it alone, so a request can take over the rows of another that
begins with the same tokens: those of a running one are copied, those of one that has ended may be used where they are.
So a slot keeps its rows when its request ends, until another request needs it, and the next turn of a chat finds the
previous ones there.

Only rows that all layers have computed are shared. An exit's block has keys and values of its own for the rows of those
requests that may evaluate the exit; who may evaluate it shares rows of such requests alone.

Keys and values in blocks of a common pool, instead of slots of one length, would change three things: attention
metadata (rows find their keys by a table), the cache (a pool instead of slots), and this class: an assignment would
name blocks that several requests read, a slot's path in the index would be its table, and nothing would be copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron.early_exit.inference.engine.prefix_index import Block, PrefixIndex, blocks_of


class Assignment(NamedTuple):
    """A slot for a request."""

    slot: int
    generation: int
    """Requests that have had the slot, this one included."""
    num_shared: int
    """Rows, from position 0 on, that need not be computed."""
    copy_from: int | None
    """Slot whose rows must be copied; None: the slot holds them already, or there are none."""


class _Wait(NamedTuple):
    """Rows that a running request is about to compute."""

    slot: int
    generation: int
    num_rows: int


@dataclass(eq=False)
class PromptBlocks:
    """A prompt as `Slots` looks for it, made once for each request."""

    tokens: Sequence[int]
    blocks: tuple[Block, ...]
    order: int
    """Counts prompts in the order in which they came."""
    runs_all_layers: bool = True
    waits_for: _Wait | None = None


@dataclass(eq=False)
class _Slot:
    """Rows of one slot. Those before `complete_to` are computed; up to `promised` they will be, with the prompt."""

    tokens: list[int] = field(default_factory=list)
    complete_to: int = 0
    promised: int = 0
    blocks: frozenset[int] = frozenset()
    """Exits whose block has seen all rows, by index."""
    generation: int = 0
    order: int = 0
    """That of its prompt."""
    is_taken: bool = False
    last_used: int = 0


class Slots:
    """Gives slots to requests, with the longest beginning that another slot has of their prompt."""

    def __init__(self, num_slots: int, block_size: int = 16) -> None:
        """block_size: tokens that are looked up at once. Shorter beginnings are computed again rather than shared."""
        self.block_size = block_size
        self._slots = [_Slot() for _ in range(num_slots)]
        self._index = PrefixIndex(num_slots)
        self._num_free = num_slots
        self._orders, self._clock = itertools.count(), itertools.count(1)

    @property
    def num_free(self) -> int:
        return self._num_free

    def prepare(self, tokens: Sequence[int], runs_all_layers: bool = True) -> PromptBlocks:
        """Hash a prompt, which must not change any more. Prompts are prepared in the order in which requests come.

        runs_all_layers: whether its rows will be complete, so that others may wait for them."""
        blocks = blocks_of(tokens, self.block_size, 0, len(tokens) // self.block_size)
        return PromptBlocks(tokens, tuple(blocks), next(self._orders), runs_all_layers)

    def assign(self, tokens: Sequence[int] | PromptBlocks, limit: int, blocks: frozenset[int]) -> Assignment | None:
        """Give a slot to the request with the prompt `tokens`.

        limit: rows that it may share at most; the last row of a prompt is computed in any case. blocks: exits with a
        block that it may evaluate, by index. Returns None if no slot is free, or if a request that came earlier is
        about to compute at least a block of rows more than can be shared now: call it again after the next outputs. As
        no request waits for later ones, each gets its turn.

        Takes at most a look-up for each block of the prompt, log2(blocks) + block_size comparisons for each slot, and
        one update for each block of the prompt and of the slot's last request; while the request waits, nothing."""
        if not self._num_free:
            return None
        prompt = tokens if isinstance(tokens, PromptBlocks) else self.prepare(tokens)
        if prompt.waits_for is not None and self._is_expected(prompt.waits_for):
            return None
        promised = self._shared_rows(prompt, min(limit, len(prompt.tokens) - 1), blocks)
        computed = {slot: min(count, self._slots[slot].complete_to) for slot, count in promised.items()}
        num_shared = max(computed.values(), default=0)
        if num_shared < self.block_size:
            num_shared = 0
        prompt.waits_for = self._worth_waiting_for(prompt, promised, num_shared)
        if prompt.waits_for is not None:
            return None
        donors = [slot for slot, count in computed.items() if num_shared and count == num_shared]
        slot, copy_from = self._place(num_shared, donors, blocks)
        for used in (copy_from, slot):
            if used is not None:
                self._slots[used].last_used = next(self._clock)
        self._take(slot, prompt, num_shared if copy_from is None else 0, num_shared, blocks)
        return Assignment(slot, self._slots[slot].generation, num_shared, copy_from)

    def advance(self, slot: int, tokens: Sequence[int], complete_to: int) -> None:
        """Note that all layers have computed the rows of tokens[:complete_to], which never change again; rows behind
        them (of drafts) may. Takes one step for each new token, and nothing if there are none."""
        one = self._slots[slot]
        assert one.is_taken, f"slot {slot} is free"
        assert complete_to <= len(tokens), f"{complete_to} complete rows of {len(tokens)} tokens"
        if complete_to <= one.complete_to:
            return
        one.tokens += tokens[len(one.tokens) : complete_to]
        one.complete_to, one.promised = complete_to, max(one.promised, complete_to)
        first, stop = self._index.num_blocks(slot), one.promised // self.block_size
        if stop > first:
            self._index.extend(slot, blocks_of(one.tokens, self.block_size, first, stop))

    def free(self, slot: int, is_clean: bool) -> None:
        """Take the slot back; its request has ended. It keeps its rows that are complete, unless it is not clean."""
        one = self._slots[slot]
        assert one.is_taken, f"slot {slot} is free already"
        self._keep(slot, one.complete_to if is_clean else 0)
        one.is_taken, one.last_used = False, next(self._clock)
        self._num_free += 1

    def borrow(self, count: int) -> tuple[int, ...]:
        """Take the slots 0 to `count` - 1, which must be free, to write to them at will; `free` each as not clean.

        Returns their generations."""
        for slot in range(count):
            assert not self._slots[slot].is_taken, f"slot {slot} is not free"
            self._take(slot, self.prepare(()), 0, 0, frozenset())
        return tuple(self._slots[slot].generation for slot in range(count))

    # Which rows to share.

    def _shared_rows(self, prompt: PromptBlocks, limit: int, blocks: frozenset[int]) -> dict[int, int]:
        """Rows of each slot that are, or will be, those of the prompt, at most `limit`; only slots with a whole block
        of them."""
        size = self.block_size
        usable = [slot for slot, one in enumerate(self._slots) if blocks <= one.blocks and one.promised >= size]
        if limit < size or not usable:
            return {}
        wanted, found = prompt.tokens, {}
        for slot, num_blocks in self._index.shared_blocks(prompt.blocks[: limit // size], usable).items():
            if num_blocks:
                one = self._slots[slot]
                count, stop = num_blocks * size, min(limit, one.promised, (num_blocks + 1) * size)
                while count < stop and one.tokens[count] == wanted[count]:
                    count += 1
                found[slot] = count
        return found

    def _worth_waiting_for(self, prompt: PromptBlocks, promised: dict[int, int], num_shared: int) -> _Wait | None:
        """The slot whose request will soon have computed most of what this prompt needs."""
        earlier = {
            slot: count
            for slot, count in promised.items()
            if count >= num_shared + self.block_size and self._slots[slot].order < prompt.order
        }
        if not earlier:
            return None
        slot = max(earlier, key=earlier.__getitem__)
        return _Wait(slot, self._slots[slot].generation, earlier[slot])

    def _is_expected(self, wait: _Wait) -> bool:
        one = self._slots[wait.slot]
        return one.is_taken and one.generation == wait.generation and one.complete_to < wait.num_rows

    # Which slot to take.

    def _place(self, num_shared: int, donors: Sequence[int], blocks: frozenset[int]) -> tuple[int, int | None]:
        """(a free slot, the slot to copy from).

        A donor's own slot is taken if that loses less than a block of its rows, as in the next turn of a chat. Else the
        rows are copied, so that a system prompt or another chat's turns stay, to an empty slot or one that has been of
        no use for long."""
        free = [slot for slot, one in enumerate(self._slots) if not one.is_taken]
        lost = {slot: self._slots[slot].complete_to - num_shared for slot in free}
        without_loss = [
            slot for slot in free
            if slot in donors and self._slots[slot].blocks == blocks and lost[slot] < self.block_size
        ]  # fmt: skip
        if without_loss:
            return min(without_loss, key=lost.__getitem__), None
        slot = self._of_least_use(free)
        if not donors or slot in donors:
            return slot, None
        # The most recently used one: if several hold the same rows, the others may go.
        return slot, max(donors, key=lambda donor: self._slots[donor].last_used)

    def _of_least_use(self, free: Sequence[int]) -> int:
        """An empty slot if there is one, else one of the half of them that have been of no use for longest: of these
        one beside slots that are taken, since rows of consecutive slots attend in one call."""
        by_use = sorted(free, key=self._worth_keeping)
        num_empty = sum(not self._worth_keeping(slot)[0] for slot in free)
        return max(by_use[: num_empty or (len(free) + 1) // 2], key=self._num_taken_neighbours)

    def _num_taken_neighbours(self, slot: int) -> int:
        return sum(self._slots[other].is_taken for other in (slot - 1, slot + 1) if 0 <= other < len(self._slots))

    def _worth_keeping(self, slot: int) -> tuple[bool, int]:
        one = self._slots[slot]
        return one.complete_to >= self.block_size, one.last_used

    # What a slot holds.

    def _take(self, slot: int, prompt: PromptBlocks, num_kept: int, num_shared: int, blocks: frozenset[int]) -> None:
        """Give the slot to a request that takes over its first `num_kept` rows, or `num_shared` of another."""
        one = self._slots[slot]
        self._keep(slot, num_kept)
        one.tokens, one.complete_to = list(prompt.tokens), num_shared
        one.promised = max(len(one.tokens) - 1, 0) if prompt.runs_all_layers else num_shared
        self._index.extend(slot, prompt.blocks[self._index.num_blocks(slot) : one.promised // self.block_size])
        one.blocks, one.order, one.is_taken = blocks, prompt.order, True
        one.generation += 1
        self._num_free -= 1

    def _keep(self, slot: int, count: int) -> None:
        """Forget all rows but the first `count`."""
        one = self._slots[slot]
        del one.tokens[count:]
        one.complete_to = one.promised = count
        self._index.truncate(slot, count // self.block_size)
