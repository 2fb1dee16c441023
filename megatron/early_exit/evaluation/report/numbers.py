"""Numbers for readers: as they are shown, with the exact value of the document in the element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.early_exit.evaluation.report.markup import Content, element
from megatron.early_exit.evaluation.report.schema import Interval, Number, known_interval

UNKNOWN = "–"
Format = Callable[[float], str]


def decimals(places: int, unit: str = "") -> Format:
    """3.14159 -> "3.14"."""
    return lambda value: f"{value:,.{places}f}{unit}"


def percent(value: float) -> str:
    """0.98765 -> "98.8%": one place, and one more near the ends where it says something."""
    hundreds = 100 * value
    is_near_an_end = 0 < abs(hundreds) < 1 or 99 < hundreds < 100
    return f"{hundreds:.{2 if is_near_an_end else 1}f}%"


def plain_percent(value: float) -> str:
    """0.95 -> "95%", for numbers that somebody has chosen."""
    return f"{100 * value:.6g}%"


def times(value: float) -> str:
    """1.1634 -> "1.16×"."""
    return f"{value:.2f}×"


def p_value(value: float) -> str:
    """0.01234 -> "0.012"; small ones with an exponent."""
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3f}"


def seconds(value: float) -> str:
    """0.01234 -> "12.3 ms"."""
    scaled, unit = (value, "s") if value >= 1 else (1e3 * value, "ms") if value >= 1e-3 else (1e6 * value, "µs")
    return f"{scaled:,.{0 if scaled >= 1000 else 1 if scaled >= 10 else 2}f} {unit}"


def number(value: Any, format_: Format | None = None) -> Content:
    """Unknown ones are a dash. format_: default three decimals."""
    return UNKNOWN if value is None else element("data", (format_ or decimals(3))(value), value=repr(value))


def with_interval(value: Number, interval: Interval, format_: Format) -> Content:
    """`98.8% (97.9% – 99.4%)`."""
    bounds = known_interval(interval)
    if value is None or bounds is None or bounds[0] == bounds[1]:
        return number(value, format_)
    low, high = (number(bound, format_) for bound in bounds)
    return [number(value, format_), element("span", " (", low, " – ", high, ")", class_="interval")]
