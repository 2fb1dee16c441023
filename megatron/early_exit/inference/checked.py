"""Values that callers give, as plain Python ones: NumPy's and torch's numbers and arrays pass, other types are refused
by the field's name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def is_integer(value: Any) -> bool:
    """Whether it is one whole number, of Python, NumPy or torch; truth values are none."""
    return not isinstance(value, bool) and getattr(value, "ndim", 0) == 0 and _as_index(value) is not None


def integer(name: str, value: Any) -> int:
    """Raises ValueError with the name unless `value` is a whole number."""
    if not is_integer(value):
        raise ValueError(f"{name} is {value!r}; it must be an integer")
    return operator.index(value)


def number(name: str, value: Any) -> float:
    """Raises ValueError with the name unless `value` is a number."""
    is_number = hasattr(value, "__float__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0
    if not is_number and not is_integer(value):
        raise ValueError(f"{name} is {value!r}; it must be a number")
    return float(value)


def truth(name: str, value: Any) -> bool:
    """Raises ValueError with the name unless `value` is True or False."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):  # NumPy's
        return bool(value)
    raise ValueError(f"{name} is {value!r}; it must be True or False")


def text(name: str, value: Any) -> str:
    """Raises ValueError with the name unless `value` is text."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be text")
    return value


def quantize(value: Any) -> Literal["all"]:
    """Raises ValueError unless `value` says what is kept in int8, which is `all`."""
    if value == "exits":
        raise ValueError(
            "quantize is 'exits', which there is no more, since it did not pay; leave it out: what makes exits cheap "
            "are a shortlist (tools/evaluate.py calibrate --shortlist-size) and probes (tools/evaluate.py probes)"
        )
    if value != "all":
        raise ValueError(f"quantize is {value!r}; choose 'all', or leave it out")
    return "all"


def several(name: str, values: Any, check: Callable[[str, Any], T]) -> tuple[T, ...]:
    """One value, or any number of them, each through `check`; None: none."""
    if values is None:
        return ()
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        return (check(name, values),)
    if isinstance(values, Mapping):
        raise ValueError(f"{name} is {values!r}; give one value or a list of them")
    return tuple(check(name, value) for value in values)


def _as_index(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:  # also of torch's numbers that are not whole
        return None
