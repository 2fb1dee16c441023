"""Single values: the ranges that stand at the fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.early_exit.config.fields import config_fields, flag_of
from megatron.early_exit.config.ranges import Bound, at_most
from megatron.early_exit.config.settings import RunSettings

_FITS_64_BITS = at_most(2**63 - 1)
"""Of every integer, whatever its field says."""


def range_problems(cfg: RunSettings) -> Iterator[str]:
    """Fields whose value is out of range, in order."""
    for field in config_fields():
        value = getattr(getattr(cfg, field.section), field.name)
        elements = value if isinstance(value, tuple) else (value,)
        for element in elements:
            if broken := _broken(element, field.bounds):
                yield f"{flag_of(field.name)} {element}: must be {broken.words}"
                break


def _broken(value: Any, bounds: tuple[Bound, ...]) -> Bound | None:
    """The first bound that `value` breaks."""
    if value is None:
        return None
    asked = (*bounds, _FITS_64_BITS) if isinstance(value, int) else bounds
    return next((bound for bound in asked if not bound.holds(value)), None)
