"""Settings of a run as plain data: dictionaries, and the YAML file in a checkpoint."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# benchmarks/trees/ looks for it here, in earlier versions too.
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder as checkpoint_folder
from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.fields import nearest, section_classes
from megatron.early_exit.config.settings import RunSettings
from megatron.early_exit.config.values import convert_value
from megatron.early_exit.config.yaml_files import naming, read_yaml, write_yaml


def to_dict(cfg: RunSettings) -> dict[str, dict[str, Any]]:
    """Sections of field values in YAML's types (tuples become lists)."""
    return {section: plain_values(getattr(cfg, section)) for section in section_classes()}


def plain_values(section: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(section).items()}


def from_dict(data: Mapping[str, Any]) -> RunSettings:
    """The inverse of `to_dict`. Fields that are absent take their defaults.

    Raises ConfigError with all unknown names, wrong types and missing required fields."""
    return RunSettings(**build_sections(data, section_classes()))


def build_sections(data: Mapping[str, Any], classes: Mapping[str, type]) -> dict[str, Any]:
    """An object of each section's class from its values by name. Raises ConfigError with all problems."""
    issues: list[str] = []
    settings: dict[str, dict[str, Any]] = {section: {} for section in classes}
    seen: set[tuple[str, str]] = set()
    for section, values in data.items():
        if section not in classes:
            issues.append(f"unknown section {section}{nearest(section, classes)}")
        elif not isinstance(values, Mapping):
            issues.append(f"section {section}: expected names and values, got {values!r}")
        else:
            hints = typing.get_type_hints(classes[section])
            for name, value in values.items():
                seen.add((section, name))
                if name not in hints:
                    issues.append(f"{section}.{name}: unknown name{nearest(name, hints)}")
                    continue
                try:
                    settings[section][name] = convert_value(value, hints[name])
                except ValueError as error:
                    issues.append(f"{section}.{name}: {error}")
    issues += [
        f"{section}.{field.name} is missing"
        for section, section_class in classes.items()
        for field in dataclasses.fields(section_class)
        if field.default is dataclasses.MISSING and (section, field.name) not in seen
    ]
    if issues:
        raise ConfigError(issues)
    return {section: section_class(**settings[section]) for section, section_class in classes.items()}


def save_run_config(cfg: RunSettings, path: str | Path) -> None:
    """Write all settings to the YAML file `path`; `load_run_config` gives an equal object back."""
    write_yaml(to_dict(cfg), Path(path))


def load_run_config(path: str | Path) -> RunSettings:
    """Settings that `save_run_config` wrote. Raises ConfigError that names the path and every problem."""
    with naming(path):
        return from_dict(read_yaml(path))
