"""Results that come one by one and are kept in parts of some each, so that an interruption loses none that was written.

A part is a .npz with one row for each item in some columns, and as many values as the item has in others, joined."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.early_exit.platform.files import replaced

_LENGTHS = "lengths"


class Parts:
    """Keeps items in parts of `count`, or of what has come in so many seconds; an interruption keeps what is left."""

    def __init__(self, keep: Callable[[Sequence[Any]], None], count: int, seconds: float) -> None:
        """keep: writes a part, and nothing if there are no items."""
        self._keep, self._count, self._seconds = keep, count, seconds
        self._items: list[Any] = []
        self._last = time.monotonic()

    def add(self, item: Any) -> None:
        self._items.append(item)
        if len(self._items) >= self._count or time.monotonic() - self._last > self._seconds:
            self._keep_rest()

    def _keep_rest(self) -> None:
        self._keep(self._items)
        self._items, self._last = [], time.monotonic()

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self._keep_rest()


def write_part(
    folder: Path, number: str, of_items: Mapping[str, Sequence[Any]], joined: Mapping[str, Sequence[np.ndarray]]
) -> None:
    """Write some items, at once or not at all; nothing if there are none. number: the column of `of_items` that tells
    items apart. joined: of each column an array for each item, equally long in all columns."""
    numbers = of_items[number]
    if not numbers:
        return
    path = folder / f"part_{min(numbers):06}_{len(numbers)}.npz"
    lengths = [len(values) for values in next(iter(joined.values()))]
    columns: dict[str, Any] = {name: np.array(values) for name, values in of_items.items()}
    columns |= {_LENGTHS: np.array(lengths)}
    columns |= {name: np.concatenate(arrays) for name, arrays in joined.items()}
    with replaced(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **columns)


def read_parts(folder: Path, of_items: Sequence[str], joined: Sequence[str], advice: str) -> Iterator[tuple[Any, ...]]:
    """The items of all parts: their values in the columns `of_items`, and then their arrays of `joined`.

    Raises ValueError, with this advice, for a part that cannot be read."""
    for path in sorted(folder.glob("part_*.npz")):
        try:
            with np.load(path) as arrays:
                cuts = np.cumsum(arrays[_LENGTHS])[:-1]
                columns = [arrays[name].tolist() for name in of_items]
                columns += [np.split(arrays[name], cuts) for name in joined]
                items = list(zip(*columns, strict=True))
        except Exception as error:  # of the archive, of an array in it, of what should be in it
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {error}); remove it, and {advice}"
            ) from error
        yield from items
