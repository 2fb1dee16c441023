"""Ranges of single values. They stand in the types of the settings' fields, as in `lr: PositiveFloat`.

`checks/ranges.py` checks values against them, and docs/flags.md shows them."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Bound:
    """What every value of a field must be."""

    words: str
    """Behind 'must be'."""

    holds: Callable[[float], bool]


def at_least(smallest: int) -> Bound:
    """A bound from below."""
    return Bound(f"at least {smallest}", lambda value: value >= smallest)


def at_most(largest: int) -> Bound:
    """A bound from above."""
    return Bound(f"at most {largest}", lambda value: value <= largest)


PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
PositiveFloat = Annotated[float, Bound("greater than 0", lambda value: value > 0)]
NonNegativeFloat = Annotated[float, at_least(0)]
ProperFraction = Annotated[float, Bound("at least 0 and less than 1", lambda value: 0 <= value < 1)]
Fraction = Annotated[float, Bound("greater than 0 and at most 1", lambda value: 0 < value <= 1)]


def bounds_of(annotation: Any) -> tuple[Bound, ...]:
    """The bounds in a type such as `PositiveInt | None`, or of the elements of a tuple."""
    if typing.get_origin(annotation) is Annotated:
        return tuple(extra for extra in annotation.__metadata__ if isinstance(extra, Bound))
    return tuple(bound for argument in typing.get_args(annotation) for bound in bounds_of(argument))
