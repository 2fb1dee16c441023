"""Numbers for readers: as they are shown, with the exact value of the document in the element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.early_exit.evaluation.report.markup import Content, Markup, element

UNKNOWN = "–"
Interval = tuple[float | None, float | None] | None
Format = Callable[[float], str]


def decimals(places: int, unit: str = "") -> Format:
    """3.14159 -> "3.14"."""
    return lambda value: f"{value:,.{places}f}{unit}"


def percent(value: float) -> str:
    """0.98765 -> "98.8%": one place, and one more near the ends where it says something."""
    hundreds = 100 * value
    is_near_an_end = 0 < abs(hundreds) < 1 or 99 < hundreds < 100
    return f"{hundreds:.{2 if is_near_an_end else 1}f}%"


def times(value: float) -> str:
    """1.1634 -> "1.16×"."""
    return f"{value:.2f}×"


def p_value(value: float) -> str:
    """0.01234 -> "0.012"; small ones with an exponent."""
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3f}"


def seconds(value: float) -> str:
    """0.01234 -> "12.3 ms"."""
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"


def number(value: Any, format_: Format = decimals(3)) -> Content:
    """Unknown ones are a dash."""
    return UNKNOWN if value is None else element("data", format_(value), value=repr(value))


def with_interval(value: float | None, interval: Interval, format_: Format) -> Content:
    """`98.8% (97.9% – 99.4%)`."""
    if value is None or not interval or None in interval:
        return number(value, format_)
    low, high = (number(bound, format_) for bound in interval)
    return [number(value, format_), element("span", " (", low, " – ", high, ")", class_="interval")]


def no_break(content: Content) -> Markup:
    return element("span", content, class_="whole")
