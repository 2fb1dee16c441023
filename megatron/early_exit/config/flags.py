"""Command line and YAML file -> RunConfig. The flags are the dataclasses' fields; nothing is listed twice.

A field `exit_layer_nums` of any section is the flag `--exit-layer-nums`, with the field's type, default and docstring.
What Megatron-LM and EE-LLM have beyond that stands in `flag_notes.py`. All problems are reported together.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from megatron.early_exit.config.checkpoint_choice import has_checkpoint
from megatron.early_exit.config.description import FREE_MODEL_FIELDS, ModelDescription
from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.fields import (
    SWITCHED_OFF,
    FieldInfo,
    build_settings,
    config_fields,
    field_docs,
    flag_of,
    inverse_flag_of,
    nearest,
    section_classes,
)
from megatron.early_exit.config.flag_notes import ALIASES, IGNORED, REFUSED, REFUSED_VALUES, is_harmless, note_of
from megatron.early_exit.config.overlay import overlay_architecture
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.saved_description import checkpoint_description
from megatron.early_exit.config.settings import RunSettings, normalised
from megatron.early_exit.config.validate import problems
from megatron.early_exit.config.validate import warnings as settings_without_effect
from megatron.early_exit.config.values import convert_value, is_one_or_each, is_truth, optional_type, parse_text
from megatron.early_exit.config.yaml_files import read_yaml

_LOG = logging.getLogger(__name__)


def parse_run_config(argv: Sequence[str], *, world_size: int, warn: Callable[[str], None] = _LOG.warning) -> RunConfig:
    """Settings from the command line `argv` (without the program's name), then `--config FILE`, then defaults.

    world_size: number of ranks (torchrun's WORLD_SIZE). warn: called with one line for each flag that is ignored and
    each setting without effect. `--help` prints and exits. Raises ConfigError with all problems."""
    notes = _Notes()
    parser = build_parser()
    words = _strip_unused_flags(_flag_groups(argv), _flags_of(parser), notes)
    from_flags, config_path = _settings_from_words(words, parser, notes)
    from_file = _settings_from_yaml(config_path, notes) if config_path else {}
    settings = {**from_file, **from_flags}
    notes.resolve_conditions(settings)
    for message in notes.warnings:
        warn(message)

    cfg = None if notes.has_bad_values else _build(settings, notes, warn)
    if cfg is not None:
        notes.problems += problems(cfg, world_size)
    if notes.problems:
        raise ConfigError(notes.problems)
    assert cfg is not None, "no configuration and no problem"
    for message in settings_without_effect(cfg):
        warn(message)
    return RunConfig(**vars(cfg))


class _Notes:
    """What was found while reading flags: problems, warnings, and refusals that depend on another setting."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.has_bad_values = False
        self._conditional: list[tuple[str, str, tuple[str, str]]] = []

    def bad_value(self, message: str) -> None:
        """A value that cannot be used, so that the settings are incomplete."""
        self.problems.append(message)
        self.has_bad_values = True

    def note(self, flag: str, values: Sequence[str]) -> bool:
        """Record the note on `flag`; False if there is none, that is, if the flag is unknown or ours."""
        note = note_of(flag)
        if note is None:
            return False
        if not note.refused:
            self.warnings.append(f"{flag} is ignored: {note.reason}")
        elif note.harmless_with is not None:
            self._conditional.append((flag, note.reason, note.harmless_with))
        elif not is_harmless(note, values):
            self.problems.append(f"{' '.join([flag, *values])} is refused: {note.reason}")
        return True

    def resolve_conditions(self, settings: Mapping[str, Any]) -> None:
        """Decide the refusals that depend on a setting, now that all are known."""
        for flag, reason, (field, value) in self._conditional:
            if settings.get(field) == value:
                self.warnings.append(f"{flag} is ignored: {reason}")
            else:
                self.problems.append(f"{flag} is refused: {reason}")


# From fields to flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError([message])


def build_parser() -> argparse.ArgumentParser:
    """Parser of all flags; every value stays text (a list of texts for tuples) and absent flags leave no attribute."""
    parser = _Parser(
        prog="pretrain_early_exit_gpt.py",
        usage="torchrun [TORCHRUN FLAGS] pretrain_early_exit_gpt.py [--config FILE] [FLAGS]",
        description="Pre-train a GPT or Llama model with early exits. docs/flags.md explains all flags.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show what the libraries have to say")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same names; flags win over it")
    fields = config_fields()
    for section, section_class in section_classes().items():
        group = parser.add_argument_group(section, (section_class.__doc__ or "").splitlines()[0])
        docs = field_docs(section_class)
        for field in fields:
            if field.section == section:
                _add_field(group, field, docs[field.name])
    by_name = {field.name: field for field in fields}
    for alias in ALIASES:
        if alias.value is not None:
            parser.add_argument(
                alias.flag, dest=alias.field, action="store_const", const=alias.value, help=argparse.SUPPRESS
            )
        else:
            _add_flag(parser, alias.flag, by_name[alias.field], argparse.SUPPRESS)
    return parser


def _add_field(group: Any, field: FieldInfo, doc: str) -> None:
    _add_flag(group, flag_of(field.name), field, _help_text(field, doc))
    if is_truth(field.annotation):
        restored = "true" if field.name in SWITCHED_OFF else "false"
        group.add_argument(
            inverse_flag_of(field.name), dest=field.name, action="store_const", const=restored, help=argparse.SUPPRESS
        )


def _add_flag(group: Any, flag: str, field: FieldInfo, help_text: str) -> None:
    inner, _ = optional_type(field.annotation)
    if is_one_or_each(field.annotation):
        group.add_argument(flag, dest=field.name, nargs="*", metavar=_metavar(inner), help=help_text)
    elif inner is bool:
        switched = "false" if field.name in SWITCHED_OFF else "true"
        group.add_argument(flag, dest=field.name, action="store_const", const=switched, help=help_text)
    else:
        is_list = typing.get_origin(inner) is tuple
        group.add_argument(
            flag, dest=field.name, nargs="+" if is_list else None, metavar=_metavar(inner), help=help_text
        )


def _metavar(inner: Any) -> str:
    if typing.get_origin(inner) is tuple:
        inner = typing.get_args(inner)[0]
    if typing.get_origin(inner) is Literal:
        return "{" + ",".join(typing.get_args(inner)) + "}"
    return {int: "N", float: "X", str: "TEXT", bool: "{true,false}"}[inner]


def _help_text(field: FieldInfo, doc: str) -> str:
    shown = field.default not in (dataclasses.MISSING, None, (), True, False)
    text = " ".join(doc.split()) + (f" (default: {field.default})" if shown else "")
    return text.replace("%", "%%")


def known_flags() -> list[str]:
    """Every flag that is accepted and sets something, and --config."""
    return _flags_of(build_parser())


def _flags_of(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings if option != "-h"]


# The command line


def _flag_groups(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(flag, values) in order; words before the first flag belong to the flag ''."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            groups.append((name, [value] if equals else []))
        elif word == "-h":
            groups.append(("--help", []))
        elif groups:
            groups[-1][1].append(word)
        else:
            groups.append(("", [word]))
    return groups


def _strip_unused_flags(
    groups: Sequence[tuple[str, list[str]]], known: Sequence[str], notes: _Notes
) -> list[tuple[str, list[str]]]:
    """The groups that set something; ignored, refused and unknown flags are noted and left out."""
    kept = []
    for flag, values in groups:
        if flag in known:
            kept.append((flag, values))
        elif not flag:
            notes.bad_value(f"unexpected {' '.join(values)!r}: values follow a flag")
        elif not notes.note(flag, values):
            notes.problems.append(f"unknown flag {flag}{_nearest_flag(flag, known)}")
    return kept


def _nearest_flag(flag: str, known: Sequence[str]) -> str:
    notes = [note.flag for note in (*IGNORED, *REFUSED) if "*" not in note.flag]
    return nearest(flag, [*known, *notes])


def _settings_from_words(
    groups: Sequence[tuple[str, list[str]]], parser: argparse.ArgumentParser, notes: _Notes
) -> tuple[dict[str, Any], str | None]:
    """(values by field name, path given with --config). Groups are parsed one by one: no error hides another."""
    texts: dict[str, Any] = {}
    for flag, values in groups:
        # FLAG=VALUE lets a value start with a minus; alone, argparse takes -1e-5 for a flag
        single = [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values]
        try:
            texts |= vars(parser.parse_args(single))
        except ConfigError as error:
            notes.bad_value(_plain_words(error.problems[0], flag, values))
    config_path = texts.pop("config", None)
    settings = {}
    for field in config_fields():
        if field.name in texts:
            value = texts[field.name]
            try:
                settings[field.name] = _parse_words(value, field.annotation)
            except ValueError as error:
                notes.bad_value(f"{flag_of(field.name)}: {error}{_hint(field.name, value)}")
    return settings, config_path


def _parse_words(value: str | list[str], annotation: Any) -> Any:
    if not isinstance(value, list):
        return parse_text(value, annotation)
    if is_one_or_each(annotation) and not value:
        return True  # a switch without a value: for all
    return tuple(parse_text(text, annotation) for text in value)


def _plain_words(argparse_message: str, flag: str, values: Sequence[str]) -> str:
    """argparse's complaint about one flag, in the words of our other messages."""
    if not values:
        return f"{flag}: a value is missing: is a shell variable not set?"
    if "ignored explicit argument" in argparse_message or "unrecognized arguments" in argparse_message:
        return f"{' '.join([flag, *values])}: too many values for this flag"
    return f"{' '.join([flag, *values])}: {argparse_message}"


def _hint(field_name: str, value: Any) -> str:
    hint = REFUSED_VALUES.get((field_name, value)) if isinstance(value, str) else None
    return f"; {hint}" if hint else ""


# The YAML file


def _settings_from_yaml(path: str, notes: _Notes) -> dict[str, Any]:
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
    settings: dict[str, Any], label: str, key: str, section: str | None, value: Any, notes: _Notes
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
            notes.bad_value(f"{label}: {error}{_hint(name, value)}")


def _note_foreign_yaml_key(label: str, flag: str, value: Any, notes: _Notes) -> None:
    """A key that is no setting of ours: a known flag of the originals, or unknown."""
    if note_of(flag) is None:
        known = [field.name for field in config_fields()]
        notes.problems.append(f"{label}: unknown key{nearest(flag[2:].replace('-', '_'), known)}")
    elif value not in (False, None):
        values = value if isinstance(value, list) else [] if value is True else [value]
        notes.note(flag, [str(item) for item in values])


# Building


def _build(settings: dict[str, Any], notes: _Notes, warn: Callable[[str], None]) -> RunSettings | None:
    """The configuration, or None if required settings are missing (noted)."""
    present: ModelDescription | None = None
    if settings.get("use_checkpoint_args"):
        source, iteration, named_by = _checkpoint_source(settings)
        if source is None:
            notes.problems.append("--use-checkpoint-args without --load: give the checkpoint's folder")
            return None
        try:
            present = checkpoint_description(source, iteration, named_by)
        except ConfigError as error:
            notes.problems += [f"--use-checkpoint-args: {problem}" for problem in error.problems]
            return None
    from_checkpoint = vars(present.model) if present else {}
    missing = [
        flag_of(field.name)
        for field in config_fields()
        if field.is_required and field.name not in settings and field.name not in from_checkpoint
    ]
    if missing:
        notes.problems.append(
            f"missing: {', '.join(missing)} (as flags or in --config; sizes also by --use-checkpoint-args)"
        )
        return None
    cfg = build_settings({**from_checkpoint, **settings})
    if present is not None:
        before, cfg = cfg, overlay_architecture(cfg, present, given=settings.keys())
        _warn_of_replaced(before, cfg, settings, warn)
    return normalised(cfg, warn)


def _checkpoint_source(settings: Mapping[str, Any]) -> tuple[str | None, int | None, str]:
    """(folder, iteration) of the checkpoint that the run starts from, and the flag that names the folder."""
    load, pretrained = settings.get("load"), settings.get("pretrained_checkpoint")
    if pretrained is not None and (load is None or not has_checkpoint(load)):
        return pretrained, None, "--pretrained-checkpoint"
    return load, settings.get("load_iteration"), "--load"


def _warn_of_replaced(
    before: RunSettings, after: RunSettings, given: Mapping[str, Any], warn: Callable[[str], None]
) -> None:
    """Say which flags lost against the checkpoint."""
    for section in ("model", "exits"):
        for name, value in vars(getattr(before, section)).items():
            taken = getattr(getattr(after, section), name)
            if name in given and name not in FREE_MODEL_FIELDS and taken != value:
                warn(f"{flag_of(name)} {value} is replaced by the checkpoint's {taken} (--use-checkpoint-args)")
