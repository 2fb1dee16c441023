"""A YAML file of settings, whose keys are flags' names -> values by field name."""

from __future__ import annotations

from typing import Any

from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.fields import SWITCHED_OFF, config_fields, nearest, section_classes
from megatron.early_exit.config.flag_notes import ALIASES, note_of
from megatron.early_exit.config.reading_notes import Notes, hint_for
from megatron.early_exit.config.values import convert_value, parse_text
from megatron.early_exit.config.yaml_files import read_yaml


def settings_from_yaml(path: str, notes: Notes) -> dict[str, Any]:
    """Values by field name. Keys are flag or field names, alone or below the name of their section."""
    try:
        data = read_yaml(path)
    except ConfigError as error:
        notes.bad_value(f"--config: {error.problems[0]}")
        return {}
    sections = section_classes()
    entries: list[tuple[str, str | None, Any]] = []
    for key, value in data.items():
        if key in sections and (isinstance(value, dict) or key != "optimizer"):  # `optimizer: adam` is a flag
            if isinstance(value, dict):
                entries += [(str(name), key, item) for name, item in value.items()]
            else:
                notes.bad_value(f"{path}: {key}: expected names and values below it, got {value!r}")
        else:
            entries.append((key, None, value))
    settings: dict[str, Any] = {}
    for key, section, value in entries:
        _add_yaml_entry(settings, f"{path}: {section + '.' if section else ''}{key}", key, section, value, notes)
    return settings


def _add_yaml_entry(
    settings: dict[str, Any], label: str, key: str, section: str | None, value: Any, notes: Notes
) -> None:
    """Convert one entry into `settings`, or note what is wrong with it. label: file and key, for messages."""
    fields = {field.name: field for field in config_fields()}
    name = key.replace("-", "_")
    flag = "--" + key.replace("_", "-")
    aliases = {alias.flag.replace("_", "-"): alias for alias in ALIASES}
    negated = {switch: field_name for field_name, switch in SWITCHED_OFF.items()}
    if name not in fields and (flag in aliases or flag in negated):
        name = aliases[flag].field if flag in aliases else negated[flag]
        switch_value = aliases[flag].value if flag in aliases else "false"
        if switch_value is not None:
            if not isinstance(value, bool):
                notes.bad_value(f"{label}: expected true or false, got {value!r}")
                return
            if not value:
                return
            value = parse_text(switch_value, fields[name].annotation)
    elif name not in fields:
        _note_foreign_yaml_key(label, flag, value, notes)
        return
    field = fields[name]
    if section is not None and field.section != section:
        notes.bad_value(f"{label}: belongs below {field.section}, not {section}")
    elif name in settings:
        notes.bad_value(f"{label}: {name} stands twice in the file")
    else:
        try:
            settings[name] = convert_value(value, field.annotation)
        except ValueError as error:
            notes.bad_value(f"{label}: {error}{hint_for(name, value)}")


def _note_foreign_yaml_key(label: str, flag: str, value: Any, notes: Notes) -> None:
    """A key that is no setting of ours: a known flag of the originals, or unknown."""
    if note_of(flag) is None:
        known = [field.name for field in config_fields()]
        notes.problems.append(f"{label}: unknown key{nearest(flag[2:].replace('-', '_'), known)}")
    elif value not in (False, None):
        values = value if isinstance(value, list) else [] if value is True else [value]
        notes.note(flag, [str(item) for item in values])
