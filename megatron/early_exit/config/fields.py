"""The fields of a run's settings, which are flags, keys of YAML files, and parameters of the dataclasses alike."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.early_exit.config.ranges import Bound, bounds_of
from megatron.early_exit.config.settings import RunSettings

SWITCHED_OFF = {"add_bias_linear": "--disable-bias-linear"}
"""Fields that are true by default, and the flag that turns each off."""


@dataclass(frozen=True)
class FieldInfo:
    """One field of one section of a run's settings."""

    section: str
    name: str
    annotation: Any
    """The resolved type: a class, `X | None`, `tuple[X, ...]` or `Literal[...]`."""

    bounds: tuple[Bound, ...]
    """What its values, or the elements of a tuple, must be."""

    default: Any
    """dataclasses.MISSING if the field is required."""

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING


def section_classes() -> dict[str, type]:
    """Sections of a run's settings by name, in order."""
    return dict(typing.get_type_hints(RunSettings))


@functools.cache
def config_fields() -> tuple[FieldInfo, ...]:
    """All fields of all sections, in order. Field names are unique over sections."""
    found = []
    for section, section_class in section_classes().items():
        types = typing.get_type_hints(section_class)
        bounded = typing.get_type_hints(section_class, include_extras=True)
        found += [
            FieldInfo(section, field.name, types[field.name], bounds_of(bounded[field.name]), field.default)
            for field in dataclasses.fields(section_class)
        ]
    return tuple(found)


def build_settings(settings: Mapping[str, Any]) -> RunSettings:
    """Settings from values by field name; what is not in `settings` takes its default."""
    sections: dict[str, Any] = {}
    for section, section_class in section_classes().items():
        names = [field.name for field in dataclasses.fields(section_class)]
        sections[section] = section_class(**{name: settings[name] for name in names if name in settings})
    return RunSettings(**sections)


def flag_of(field_name: str) -> str:
    """The flag of a field (`--kebab-case`)."""
    return SWITCHED_OFF.get(field_name, "--" + field_name.replace("_", "-"))


def words_of(values: Iterable[object]) -> str:
    """Several values as they stand behind a flag."""
    return " ".join(map(str, values))


def inverse_flag_of(field_name: str) -> str:
    """The flag that gives a truth its default back, for what a YAML file has set."""
    if field_name in SWITCHED_OFF:
        return "--" + field_name.replace("_", "-")
    if field_name.startswith("no_"):
        return "--" + field_name.removeprefix("no_").replace("_", "-")
    return "--no-" + field_name.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean NAME?' with the nearest known name, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


@functools.cache
def field_docs(section_class: type) -> dict[str, str]:
    """Docstring below each field of a dataclass, read from its source."""
    class_node = ast.parse(textwrap.dedent(inspect.getsource(section_class))).body[0]
    assert isinstance(class_node, ast.ClassDef), f"{section_class} has no class source"
    return {
        statement.target.id: following.value.value
        for statement, following in itertools.pairwise(class_node.body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }
