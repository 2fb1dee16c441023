"""The parser of the training program's flags: a field `exit_layer_nums` of any section of the settings is the flag
`--exit-layer-nums`, with the field's type, default and docstring."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any, Literal

from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.fields import (
    SWITCHED_OFF,
    FieldInfo,
    config_fields,
    field_docs,
    flag_of,
    inverse_flag_of,
    section_classes,
)
from megatron.early_exit.config.flag_notes import ALIASES
from megatron.early_exit.config.values import is_one_or_each, is_truth, optional_type


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
    return flags_of_parser(build_parser())


def flags_of_parser(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings if option != "-h"]
