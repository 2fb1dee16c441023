"""Values of settings and their types: from the words of a command line, and as YAML gives them."""

from __future__ import annotations

import math
import types
import typing
from typing import Any, Literal


def is_one_or_each(annotation: Any) -> bool:
    """Whether the type is `X | tuple[X, ...]`: one value for all, or a list with one for each."""
    return any(typing.get_origin(argument) is tuple for argument in typing.get_args(annotation))


def is_truth(annotation: Any) -> bool:
    """Whether the type is `bool`, or true or false for each of several."""
    return annotation is bool or (is_one_or_each(annotation) and typing.get_args(annotation)[0] is bool)


def optional_type(annotation: Any) -> tuple[Any, bool]:
    """(X, True) for `X | None`, (X, False) for `X | tuple[X, ...]`, (annotation, False) for anything else."""
    if is_one_or_each(annotation):
        return typing.get_args(annotation)[0], False
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        inner = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
        return inner[0], True
    return annotation, False


def convert_value(value: Any, annotation: Any) -> Any:
    """`value`, as YAML gives it, as a value of type `annotation`.

    Integers pass as floats and lists become tuples; nothing else is converted. Raises ValueError with the reason."""
    if is_one_or_each(annotation) and isinstance(value, (list, tuple)):
        annotation = typing.get_args(annotation)[1]
    inner, is_optional = optional_type(annotation)
    if value is None:
        if is_optional:
            return None
        raise ValueError(f"expected {type_name(annotation)}, got nothing")
    if typing.get_origin(inner) is tuple:
        element = typing.get_args(inner)[0]
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert_element(item, element) for item in values)
    return _convert_scalar(value, inner)


def _convert_element(value: Any, element: Any) -> Any:
    if element is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # the weights of a data blend stand among its paths
    return _convert_scalar(value, element)


def _convert_scalar(value: Any, scalar: Any) -> Any:
    if typing.get_origin(scalar) is Literal:
        if value not in typing.get_args(scalar):
            raise ValueError(f"expected {type_name(scalar)}, got {value!r}")
        return value
    if scalar is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not scalar:
        raise ValueError(f"expected {type_name(scalar)}, got {value!r} ({type(value).__name__})")
    if scalar is float and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    if scalar is str and not value:
        raise ValueError("the text is empty: is a shell variable not set?")
    return value


def parse_text(text: str, annotation: Any) -> Any:
    """A command-line word as a value of type `annotation` (of its elements, for a tuple).

    Raises ValueError with the reason."""
    inner, _ = optional_type(annotation)
    if typing.get_origin(inner) is tuple:
        inner = typing.get_args(inner)[0]
    if inner is bool:
        if text not in ("true", "false"):
            raise ValueError(f"expected true or false, got {text!r}")
        return text == "true"
    if inner in (int, float):
        try:
            return _convert_scalar(inner(text), inner)
        except ValueError:
            raise ValueError(f"expected {type_name(inner)}, got {text!r}") from None
    return _convert_scalar(text, inner)


def type_name(annotation: Any) -> str:
    """A type in words, for messages and documentation."""
    if is_one_or_each(annotation):
        one, _ = typing.get_args(annotation)
        return f"{type_name(one)}, or a list of them"
    inner, _ = optional_type(annotation)
    if typing.get_origin(inner) is tuple:
        return f"a list ({type_name(typing.get_args(inner)[0])} each)"
    if typing.get_origin(inner) is Literal:
        return "one of " + ", ".join(typing.get_args(inner))
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[inner]
