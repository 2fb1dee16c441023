"""Rounds in which all that is compared runs in turn, so that a slow moment of the machine hits all of it."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """The items from another one on in each turn: none is always the first."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def progress(text: str) -> None:
    """Print a line on standard error, on rank 0 alone."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)


def show_round(done: int, total: int) -> None:
    """Print how far it is; round 0 warms up."""
    progress(f"  round {done} of {total}")


def in_turn(
    actions: Mapping[str, Callable[[], T]],
    rounds: int,
    warmup: int = 1,
    show: Callable[[int, int], None] = show_round,
) -> dict[str, list[T]]:
    """What every action gave in every round, seconds for instance, after rounds that warm up and do not count. The
    order rotates. show: called with (number of the round that has ended, `rounds`)."""
    given: dict[str, list[T]] = {name: [] for name in actions}
    for turn in range(warmup + rounds):
        gc.collect()  # else one of them would pay for it
        for name in rotated(list(actions), turn):
            one = actions[name]()
            if turn >= warmup:
                given[name].append(one)
        show(max(turn + 1 - warmup, 0), rounds)
    return given
