"""The words of a command line -> values by field name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.fields import config_fields, flag_of, nearest
from megatron.early_exit.config.flag_notes import IGNORED, REFUSED
from megatron.early_exit.config.reading_notes import Notes, hint_for
from megatron.early_exit.config.values import is_one_or_each, parse_text


def flag_groups(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
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


def without_unused_flags(
    groups: Sequence[tuple[str, list[str]]], known: Sequence[str], notes: Notes
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


def settings_from_words(
    groups: Sequence[tuple[str, list[str]]], parser: argparse.ArgumentParser, notes: Notes
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
                notes.bad_value(f"{flag_of(field.name)}: {error}{hint_for(field.name, value)}")
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
