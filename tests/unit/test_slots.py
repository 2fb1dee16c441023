"""Slots that keep their rows as prefixes: policy case by case, and a cache of written-down rows against brute force."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.inference.engine import prefix_index
from megatron.early_exit.inference.engine.prefix_index import PrefixIndex, blocks_of
from megatron.early_exit.inference.engine.slots import Assignment, PromptBlocks, Slots

NONE = frozenset()
SYSTEM = list(range(1000, 1040))
"""A system prompt; longer than two blocks."""


def assign(slots: Slots, tokens: list[int], limit: int = 10**6, blocks: frozenset[int] = NONE) -> Assignment:
    assignment = slots.assign(tokens, limit, blocks)
    assert assignment is not None
    return assignment


def run(slots: Slots, tokens: list[int], num_incomplete: int = 0, blocks: frozenset[int] = NONE) -> Assignment:
    """A request from admission to its end; `tokens`: prompt and answer, all of whose rows are fed."""
    assignment = assign(slots, tokens, blocks=blocks)
    slots.advance(assignment.slot, tokens, len(tokens) - num_incomplete)
    slots.free(assignment.slot, is_clean=True)
    return assignment


# Which rows are shared.


def test_the_next_turn_of_a_chat_shares_prompt_and_answer_in_place() -> None:
    slots = Slots(2)
    first = assign(slots, SYSTEM)
    assert first == Assignment(slot=0, generation=1, num_shared=0, copy_from=None)
    answer = list(range(21))
    slots.advance(0, SYSTEM, len(SYSTEM) - 1)
    for length in range(1, len(answer) + 1):
        slots.advance(0, SYSTEM + answer[:length], len(SYSTEM) + max(length - 4, -1))  # some rows are deferred
    slots.free(0, is_clean=True)
    num_complete = len(SYSTEM) + len(answer) - 4
    second = assign(slots, SYSTEM + answer + [7] * 30)
    assert second == Assignment(slot=0, generation=2, num_shared=num_complete, copy_from=None)


@pytest.mark.parametrize("common", [15, 16, 17, 31, 32, 35, 39])
def test_a_match_is_as_long_as_the_tokens_are_equal(common: int) -> None:
    slots = Slots(2)
    run(slots, SYSTEM)
    other = SYSTEM[:common] + [1] * 20
    assert assign(slots, other).num_shared == (common if common >= 16 else 0)


def test_the_last_row_of_a_prompt_and_rows_beyond_the_limit_are_computed() -> None:
    for limit, expected in ((10**6, 39), (40, 39), (38, 38), (20, 20), (16, 16), (15, 0), (0, 0)):
        slots = Slots(2)
        run(slots, [*SYSTEM, 1])
        assert assign(slots, SYSTEM, limit).num_shared == expected


def test_rows_of_a_running_request_are_copied() -> None:
    slots = Slots(2)
    slots.advance(assign(slots, SYSTEM).slot, SYSTEM, 40)
    assert assign(slots, [*SYSTEM, 1]) == Assignment(slot=1, generation=1, num_shared=40, copy_from=0)


def test_rows_that_not_all_blocks_saw_are_not_shared() -> None:
    one, both = frozenset({1}), frozenset({1, 2})
    slots = Slots(4)
    run(slots, SYSTEM, blocks=one)
    assert assign(slots, [*SYSTEM, 1], blocks=both) == Assignment(1, 1, 0, None)
    slots.advance(1, SYSTEM, 40)
    assert assign(slots, [*SYSTEM, 2], blocks=frozenset({2})) == Assignment(2, 1, 40, 1)
    # Slot 1 and 2 hold the same rows, but the block of exit 1 saw those of the copy no more.
    slots.free(1, is_clean=False)
    slots.advance(2, [*SYSTEM, 2], 41)
    assert assign(slots, [*SYSTEM, 3], blocks=both) == Assignment(3, 1, 0, None)


def test_a_slot_is_not_reused_in_place_by_a_request_whose_rows_fewer_blocks_see() -> None:
    slots = Slots(2)
    run(slots, SYSTEM, blocks=frozenset({1, 2}))
    assert run(slots, [*SYSTEM, 1], blocks=frozenset({1})) == Assignment(1, 1, 40, 0)
    assert assign(slots, [*SYSTEM, 2], blocks=frozenset({1, 2})) == Assignment(0, 2, 40, None)


def test_rows_of_a_slot_that_is_not_clean_are_not_shared() -> None:
    slots = Slots(1)
    slots.advance(assign(slots, SYSTEM).slot, SYSTEM, 40)
    slots.free(0, is_clean=False)
    assert assign(slots, [*SYSTEM, 1]) == Assignment(0, 2, 0, None)


def test_later_rows_of_a_reused_slot_are_not_shared() -> None:
    slots = Slots(1)
    run(slots, SYSTEM)
    other = SYSTEM[:20] + [3] * 20
    assert run(slots, other) == Assignment(0, 2, 20, None)
    assert run(slots, SYSTEM) == Assignment(0, 3, 20, None)
    assert assign(slots, other) == Assignment(0, 4, 20, None)
    slots.free(0, is_clean=True)  # before it has computed anything
    assert assign(slots, SYSTEM) == Assignment(0, 5, 20, None)


def test_rows_that_a_copied_prefix_overwrote_are_not_shared() -> None:
    slots = Slots(2)
    slots.advance(assign(slots, SYSTEM).slot, SYSTEM, 40)
    run(slots, [1] * 40)
    assert run(slots, [*SYSTEM, 2]) == Assignment(1, 2, 40, 0)
    assert assign(slots, [1] * 40) == Assignment(1, 3, 0, None)


# Which slot is taken.


def test_chats_that_alternate_stay_in_their_slots() -> None:
    slots = Slots(2)
    chats = [[*SYSTEM, *([number] * 40)] for number in (1, 2)]
    assert [run(slots, chat)[::2] for chat in chats] == [(0, 0), (1, 40)]
    for _ in range(3):
        for number, chat in enumerate(chats):
            length = len(chat)
            chat += [3] * 20
            assert run(slots, chat, num_incomplete=5)[::3] == (number, None)
            assert run(slots, chat + [4])[2] >= length


def test_a_turn_that_drops_a_few_tokens_of_the_answer_stays_in_its_slot() -> None:
    """Templates put other tokens behind an answer than the model did."""
    slots = Slots(2)
    run(slots, SYSTEM + [1, 2, 3])
    assert assign(slots, SYSTEM + [1, 9, 9, 9]) == Assignment(0, 2, 41, None)


def test_a_system_prompt_s_slot_is_left_to_it_while_others_are_free() -> None:
    slots = Slots(3)
    run(slots, SYSTEM + [1] * 30)
    assert run(slots, SYSTEM + [2] * 30) == Assignment(1, 1, 40, 0)
    assert run(slots, SYSTEM + [3] * 30) == Assignment(2, 1, 40, 1)
    # All hold something: the least recently used one is overwritten behind the prompt.
    assert run(slots, SYSTEM + [4] * 30) == Assignment(0, 2, 40, None)
    assert run(slots, SYSTEM + [3] * 31) == Assignment(2, 2, 70, None)


def test_the_only_free_slot_is_reused_in_place() -> None:
    slots = Slots(2)
    assert assign(slots, [5] * 50).slot == 0
    run(slots, SYSTEM + [1] * 30)
    assert assign(slots, SYSTEM + [2]) == Assignment(1, 2, 40, None)
    assert slots.num_free == 0
    assert slots.assign([1], 0, NONE) is None


def test_the_only_free_slot_takes_a_longer_prefix_of_a_running_request() -> None:
    slots = Slots(2)
    slots.advance(assign(slots, SYSTEM).slot, SYSTEM, 40)
    run(slots, SYSTEM[:20] + [1] * 20)
    assert assign(slots, [*SYSTEM, 2]) == Assignment(1, 2, 40, 0)


def test_the_least_recently_used_slot_goes_first_and_empty_ones_before_it() -> None:
    slots = Slots(4)
    prompts = [[number] * 40 for number in range(3)]
    assert [run(slots, prompt).slot for prompt in prompts] == [0, 1, 2]
    # Used as a donor: the prompt of slot 0 is worth keeping.
    assert run(slots, [*prompts[0][:20], *([9] * 40)]) == Assignment(3, 1, 20, 0)
    assert [run(slots, [number] * 40).slot for number in (5, 6, 7, 8)] == [1, 2, 0, 3]
    slots.advance(assign(slots, [5] * 40 + [1]).slot, [], 0)
    slots.free(1, is_clean=False)  # empty now
    assert run(slots, [10] * 40).slot == 1


def test_of_the_older_slots_one_beside_a_running_request_is_taken() -> None:
    slots = Slots(8)
    for number in range(8):
        assert run(slots, [number] * 40).slot == number
    assert assign(slots, [3] * 40).slot == 3  # in place
    assert [assign(slots, [number] * 40).slot for number in (11, 12, 13)] == [2, 1, 0], "not 0, the oldest one, first"
    slots.free(0, is_clean=False)  # empty now: it goes first
    assert [assign(slots, [number] * 40).slot for number in (14, 15, 16)] == [0, 4, 5]


def test_generations_rise_with_every_request() -> None:
    slots = Slots(1)
    assert [run(slots, SYSTEM).generation for _ in range(4)] == [1, 2, 3, 4]


def test_borrowed_slots_lose_their_rows() -> None:
    slots = Slots(3)
    for number in range(3):
        run(slots, [number] * 40)
    assert slots.borrow(2) == (2, 2)
    assert slots.num_free == 1
    for slot in (0, 1):
        slots.free(slot, is_clean=False)
    assert [run(slots, [number] * 41).num_shared for number in (2, 1, 0)] == [40, 0, 0]
    slots.assign([1], 0, NONE)
    with pytest.raises(AssertionError):
        slots.borrow(3)


def test_a_slot_is_freed_once() -> None:
    slots = Slots(1)
    run(slots, SYSTEM)
    with pytest.raises(AssertionError):
        slots.free(0, is_clean=True)
    with pytest.raises(AssertionError):
        slots.advance(0, SYSTEM, 3)


# Who waits for rows that are being computed.


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    slots = Slots(4)
    prompt = list(range(20, 40))
    queue = [slots.prepare(one) for one in (prompt, prompt, prompt[:18] + [3, 4], prompt[:10] + [3, 4] * 5)]
    shared: dict[int, int] = {}
    for rows in (0, 8, 16, 19):
        if rows:
            slots.advance(0, prompt, rows)
        for request in queue:
            if request.order not in shared and (assignment := slots.assign(request, 19, NONE)) is not None:
                shared[request.order] = assignment.num_shared
        assert set(shared) == ({0, 1, 2, 3} if rows == 19 else {0, 3})
    assert shared == {0: 0, 1: 19, 2: 18, 3: 0}


def test_who_would_gain_less_than_a_block_does_not_wait() -> None:
    slots = Slots(3)
    run(slots, SYSTEM)
    assert assign(slots, SYSTEM + [1] * 20).num_shared == 40  # of its 60 rows 20 are yet to be computed
    assert assign(slots, SYSTEM + [1] * 14 + [2]).num_shared == 40
    assert slots.assign(SYSTEM + [1] * 16 + [2], 100, NONE) is None


def test_who_waits_for_a_request_that_ends_early_takes_what_it_computed() -> None:
    slots = Slots(3)
    first, *others = (slots.prepare(SYSTEM) for _ in range(3))
    slots.assign(first, 39, NONE)
    assert [slots.assign(one, 39, NONE) for one in others] == [None, None]
    slots.advance(0, SYSTEM, 18)
    slots.free(0, is_clean=True)
    # The second computes the rest, and the third waits for it.
    assert slots.assign(others[0], 39, NONE) == Assignment(0, 2, 18, None)
    assert slots.assign(others[1], 39, NONE) is None
    slots.advance(0, SYSTEM, 38)
    assert slots.assign(others[1], 39, NONE) is None
    slots.advance(0, SYSTEM, 39)
    assert slots.assign(others[1], 39, NONE) == Assignment(1, 1, 39, 0)


def test_nobody_waits_for_who_came_later() -> None:
    """Else a stream of prompts that begin the same way could keep a request waiting for ever."""
    slots = Slots(3)
    first, second = slots.prepare(SYSTEM), slots.prepare(SYSTEM)
    assert slots.assign(second, 0, NONE) is not None
    assert slots.assign(first, 39, NONE) == Assignment(1, 1, 0, None)
    assert slots.assign(slots.prepare(SYSTEM), 39, NONE) is None


def test_nobody_waits_for_rows_that_will_not_run_all_layers() -> None:
    slots = Slots(3)
    assert slots.assign(slots.prepare(SYSTEM, runs_all_layers=False), 39, NONE) is not None
    assert assign(slots, SYSTEM) == Assignment(1, 1, 0, None)
    slots.advance(1, SYSTEM, 39)
    slots.free(1, is_clean=True)
    # What it shares itself it can hand on.
    assert slots.assign(slots.prepare(SYSTEM, runs_all_layers=False), 38, NONE) == Assignment(1, 2, 38, None)
    assert assign(slots, SYSTEM) == Assignment(2, 1, 38, 1)


# Collisions, and work.


class WeakHash(bytes):
    """All blocks have the same hash."""

    def __hash__(self) -> int:
        return 0


def test_blocks_of_the_same_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    as_block = prefix_index.as_block
    monkeypatch.setattr(prefix_index, "as_block", lambda tokens: WeakHash(as_block(tokens)))
    slots = Slots(4)
    assert run(slots, SYSTEM) == Assignment(0, 1, 0, None)
    assert run(slots, SYSTEM[::-1]) == Assignment(1, 1, 0, None)
    assert run(slots, SYSTEM[:16] + [1] * 40) == Assignment(2, 1, 16, 0)
    assert run(slots, [1] * 16 + SYSTEM[16:]) == Assignment(3, 1, 0, None)
    assert run(slots, SYSTEM[:16] + [1] * 16 + [2] * 20).num_shared == 32


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), max_size=9)), max_size=12), st.data())
def test_the_index_finds_common_blocks_and_forgets_all_that_is_cut(paths: list, data: st.DataObject) -> None:
    index, held = PrefixIndex(3), {slot: [] for slot in range(3)}
    for slot, tokens in paths:
        keep = data.draw(st.integers(0, len(held[slot])))
        index.truncate(slot, keep)
        index.extend(slot, blocks_of(tokens, 1, 0, len(tokens)))
        held[slot] = held[slot][:keep] + tokens
        assert index.num_blocks(slot) == len(held[slot])
        wanted = data.draw(st.lists(st.integers(0, 1), max_size=9))
        expected = {one: common_length(held[one], wanted) for one in range(3)}
        assert index.shared_blocks(list(blocks_of(wanted, 1, 0, len(wanted))), range(3)) == expected
    for slot in range(3):
        index.truncate(slot, 0)
    assert not index._root.children


class Counted(bytes):
    """A block that counts look-ups."""

    lookups = 0

    def __hash__(self) -> int:
        Counted.lookups += 1
        return super().__hash__()


class Token(int):
    """A token id that counts comparisons; no two are the same object."""

    comparisons = 0
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        Token.comparisons += 1
        return super().__eq__(other)


class Tokens(list):
    """Counts how many of its tokens are read."""

    reads = 0

    def __getitem__(self, key: int | slice) -> object:
        found = super().__getitem__(key)
        Tokens.reads += len(found) if isinstance(key, slice) else 1
        return found


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    as_block, num_slots, length = prefix_index.as_block, 17, 2048
    monkeypatch.setattr(prefix_index, "as_block", lambda tokens: Counted(as_block(tokens)))
    slots = Slots(num_slots)
    prompt = lambda: [Token(7) for _ in range(length - 1)] + [Token(8)]
    assert slots.assign(slots.prepare(prompt()), length, NONE) is not None
    waiting = [slots.prepare(prompt()) for _ in range(20)]

    def work(requests: list[PromptBlocks]) -> tuple[int, int, int]:
        """(assigned, look-ups, comparisons) at most of one request."""
        most = [0, 0]
        assigned = 0
        for request in requests:
            Counted.lookups = Token.comparisons = 0
            assigned += slots.assign(request, length, NONE) is not None
            most = [max(most[0], Counted.lookups), max(most[1], Token.comparisons)]
        return assigned, *most

    num_blocks = length // 16
    assert work(waiting) == (0, num_blocks - 1, 15)
    slots.advance(0, prompt(), 1000)
    assert work(waiting) == (0, 0, 0)  # nothing, step for step
    slots.advance(0, prompt(), length - 1)
    assigned, lookups, comparisons = work(waiting[: num_slots - 1])
    assert assigned == num_slots - 1
    assert num_blocks < lookups <= 4 * num_blocks
    assert comparisons <= num_slots * 16
    assert work(waiting[num_slots - 1 :]) == (0, 0, 0)  # no slot is free
    # All rows are held by all slots: what a scan compares token by token.
    slots.free(3, is_clean=True)
    _, lookups, comparisons = work(waiting[-1:])
    assert lookups <= 4 * num_blocks
    assert comparisons <= num_slots * 16


def test_new_tokens_cost_nothing_for_the_old_ones() -> None:
    slots = Slots(1)
    assert assign(slots, [7] * 2048).slot == 0
    tokens = Tokens([7] * 2048)
    slots.advance(0, tokens, 2048)
    Tokens.reads = 0
    for _ in range(500):
        tokens.append(8)
        slots.advance(0, tokens, len(tokens) - 1)
        slots.advance(0, tokens, len(tokens) - 1)
    assert Tokens.reads <= 500


# Against brute force: a cache in which each row says what it was computed from.

BLOCK = 3
VOCABULARY = st.integers(0, 1)
BLOCKS = st.sampled_from([NONE, NONE, NONE, frozenset({0}), frozenset({1}), frozenset({0, 1})])
GARBAGE = "a row of a draft, or of nothing"


def common_length(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@dataclass(eq=False)
class Request:
    prompt: PromptBlocks
    limit: int
    blocks: frozenset[int]
    tokens: list[int]
    slot: int | None = None
    complete_to: int = 0
    was_waiting: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.tokens)


@dataclass(eq=False)
class World:
    """An engine that computes nothing but writes down what it would compute."""

    num_slots: int
    slots: Slots = None
    rows: list[list[object]] = field(default_factory=list)
    """Of each slot; a row is (tokens up to it, exits whose blocks saw it)."""
    complete_to: list[int] = field(default_factory=list)
    """Rows of each slot that may be shared."""
    generations: list[int] = field(default_factory=list)
    queue: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)
    """Tokens of all requests."""

    def __post_init__(self) -> None:
        self.slots = Slots(self.num_slots, BLOCK)
        self.rows = [[] for _ in range(self.num_slots)]
        self.complete_to, self.generations = [0] * self.num_slots, [0] * self.num_slots

    def add(self, tokens: list[int], limit: int, blocks: frozenset[int]) -> None:
        self.queue.append(Request(self.slots.prepare(tuple(tokens)), limit, blocks, tokens))
        self.seen.append(tokens)

    def common(self, request: Request, tokens: list[int], seen: frozenset[int]) -> int:
        """Rows of somebody's `tokens` that the request could share."""
        limit = min(request.limit, request.num_prompt_tokens - 1)
        return min(limit, common_length(tokens, request.tokens)) if request.blocks <= seen else 0

    def shareable(self, request: Request, slot: int) -> int:
        """Rows of a slot that the request could share."""
        limit = min(request.limit, request.num_prompt_tokens - 1, self.complete_to[slot])
        count = 0
        while count < limit:
            tokens, seen = self.rows[slot][count]
            if tokens != tuple(request.tokens[: count + 1]) or not request.blocks <= seen:
                break
            count += 1
        return count

    def admit(self) -> None:
        for request in list(self.queue):
            taken = {one.slot for one in self.running}
            assert self.slots.num_free == self.num_slots - len(taken)
            best = max(self.shareable(request, slot) for slot in range(self.num_slots))
            best = best if best >= BLOCK else 0
            earlier = [one for one in self.running if one.prompt.order < request.prompt.order]
            promised = {
                one: self.common(request, one.tokens[: one.num_prompt_tokens - 1], one.blocks) for one in earlier
            }
            assignment = self.slots.assign(request.prompt, request.limit, request.blocks)
            gains = [count - best for count in promised.values()]
            if assignment is None:
                is_expecting = any(one.complete_to < count for one, count in promised.items())
                if len(taken) < self.num_slots:
                    assert any(gain >= BLOCK for gain in gains) or (request.was_waiting and is_expecting)
                    request.was_waiting = True
                continue
            assert all(gain < BLOCK for gain in gains)
            self.check_and_take(request, assignment, best, taken)

    def check_and_take(self, request: Request, assignment: Assignment, best: int, taken: set[int]) -> None:
        slot, generation, num_shared, source = assignment
        assert slot not in taken
        assert generation == self.generations[slot] + 1
        assert num_shared == best
        lost = self.complete_to[slot] - num_shared
        if source is None and num_shared and lost >= BLOCK:
            # Rows of others go only if there is nothing else: no other free slot is empty.
            free = set(range(self.num_slots)) - taken
            assert all(self.complete_to[other] >= BLOCK for other in free)
        if source is not None:
            assert source != slot
            self.rows[slot][:num_shared] = self.rows[source][:num_shared]
        self.rows[slot] = [(tokens, seen & request.blocks) for tokens, seen in self.rows[slot][:num_shared]]
        assert [tokens for tokens, _ in self.rows[slot]] == [
            tuple(request.tokens[: i + 1]) for i in range(num_shared)
        ], "rows of other tokens are shared"
        assert all(seen == request.blocks for _, seen in self.rows[slot]), "a block has not seen a shared row"
        request.slot, request.complete_to = slot, num_shared
        self.generations[slot], self.complete_to[slot] = generation, num_shared
        self.queue.remove(request)
        self.running.append(request)

    def progress(self, request: Request, count: int, token: int) -> None:
        """Compute rows of the prompt, or generate a token; `count` - 1 rows at the end are not complete."""
        if request.complete_to < request.num_prompt_tokens - 1:
            complete_to = min(request.complete_to + count, request.num_prompt_tokens - 1)
        else:
            request.tokens.append(token)
            complete_to = max(request.complete_to, len(request.tokens) - count)
        rows = self.rows[request.slot]
        for row in range(request.complete_to, complete_to):
            rows[row:] = [(tuple(request.tokens[: row + 1]), request.blocks)]
        rows += [GARBAGE] * (count - 1)  # deferred rows, and rejected drafts
        request.complete_to = self.complete_to[request.slot] = complete_to
        self.slots.advance(request.slot, request.tokens, complete_to)

    def end(self, request: Request, is_clean: bool) -> None:
        self.running.remove(request)
        if not is_clean:
            self.rows[request.slot], self.complete_to[request.slot] = [], 0
        self.slots.free(request.slot, is_clean)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from("aaaaiiiippppppppee!b"), st.integers(0, 10**6), st.integers(1, 9), VOCABULARY, BLOCKS),
    min_size=20,
    max_size=100,
)


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 4), OPERATIONS)
def test_slots_against_brute_force(num_slots: int, operations: list) -> None:
    world = World(num_slots)
    for operation, number, count, token, blocks in operations:
        if operation == "a":
            # Begin as what is held, or was, and go on in the same way or another.
            base = world.seen[number % len(world.seen)] if world.seen else []
            tokens = base[: number // 7 % (len(base) + 1)] + [token] * count
            world.add(tokens, number % (len(tokens) + 1) if number % 5 == 0 else len(tokens), blocks)
        elif operation == "i":
            world.admit()
        elif operation == "b" and not world.running and number % 4 == 0:
            for slot, generation in enumerate(world.slots.borrow(num_slots)):
                world.slots.free(slot, is_clean=False)
                world.generations[slot], world.complete_to[slot], world.rows[slot] = generation, 0, []
        elif world.running:
            request = world.running[number % len(world.running)]
            if operation == "p":
                world.progress(request, count, token)
            elif operation in "e!":
                world.end(request, is_clean=operation == "e")
    # Everybody's turn comes.
    for _ in range(10**4):
        if not world.queue and not world.running:
            break
        world.admit()
        for request in list(world.running):
            if request.complete_to < request.num_prompt_tokens - 1:
                world.progress(request, 2, 0)
            else:
                world.end(request, is_clean=True)
    assert not world.queue
