"""The flags of a program from frozen dataclasses: a field is a flag, the docstring below it its help.

    @dataclass(frozen=True, kw_only=True)
    class OutputFlags:
        '''output'''
        output: Annotated[Path, "FILE"] = Path("losses.png")
        '''picture to write'''

    @dataclass(frozen=True, kw_only=True)
    class Flags(ModelFlags, OutputFlags):
        '''Draw what a model has learnt.'''
        kind: Literal["train", "valid"] = "train"

    flags = parse_flags(parser_of(Flags, "draw.py"), Flags, argv)

The classes that a program's flags inherit from are the groups of its help, and the programs' common parts; their
docstrings are titles. A field without a default is required. `X | None` may be left out, `tuple[X, ...]` takes several
values, `Literal` choices; `bool` is a switch, `bool | None` one that can be turned off (`--no-...`). In `Annotated`, a
text names the value in the help, a bound of `config/ranges.py` says its range, and `Spelling` has what argparse can do
beyond that. Imports neither torch nor core. The training program's flags, which are keys of YAML files too, are made in
`config/flag_parser.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from megatron.early_exit.config.fields import field_docs
from megatron.early_exit.config.ranges import Bound
from megatron.early_exit.config.values import optional_type, type_name
from megatron.early_exit.platform.command_line import add_verbose_flag

T = TypeVar("T")


class Spelling:
    """Arguments of `ArgumentParser.add_argument` for one flag, for what its type does not say.

    `is_positional=True`: the values stand alone, without a flag. `group="NAME"`: flags of one group exclude each
    other."""

    def __init__(self, **options: Any) -> None:
        self.options = options


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser_of(flags: type, prog: str, **options: Any) -> Parser:
    """The parser of a program whose flags are the fields of `flags`. options: of ArgumentParser."""
    parser = Parser(prog=prog, description=" ".join((flags.__doc__ or "").split()), **options)
    add_flags(parser, flags)
    add_verbose_flag(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser, flags: type) -> None:
    """Add the fields of `flags` and, as groups, of the classes that it inherits from."""
    for owner, fields in _fields_by_owner(flags).items():
        _add_fields(parser if owner is flags else parser.add_argument_group(_title(owner)), flags, fields)


def add_group(parser: argparse.ArgumentParser, flags: type) -> None:
    """Add the fields of `flags` as a group."""
    _add_fields(parser.add_argument_group(_title(flags)), flags, dataclasses.fields(flags))


def _title(owner: type) -> str:
    return (owner.__doc__ or "").strip()


def _add_fields(group: argparse._ActionsContainer, flags: type, fields: Iterable[dataclasses.Field[Any]]) -> None:
    hints = typing.get_type_hints(flags, include_extras=True)
    docs: dict[str, str] = {}
    for owner in reversed(_owners(flags)):
        docs |= field_docs(owner)
    exclusive: dict[str, argparse._MutuallyExclusiveGroup] = {}
    for field in fields:
        options = _options(field, hints[field.name], docs.get(field.name))
        place = group
        if name := options.pop("group", None):
            exclusive[name] = place = exclusive.get(name) or group.add_mutually_exclusive_group()
        place.add_argument(*options.pop("names"), **options)


def parse_flags(parser: argparse.ArgumentParser, flags: type[T], argv: Sequence[str] | None = None) -> T:
    """What `argv`, or else the command line, says."""
    return flags_of(flags, parser.parse_args(argv))


def flags_of(flags: type[T], namespace: argparse.Namespace) -> T:
    """The fields of `flags` from what argparse has read; lists become tuples."""
    assert dataclasses.is_dataclass(flags), f"{flags} has no fields"
    values = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(flags)}
    return flags(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _owners(flags: type) -> list[type]:
    """The dataclasses among `flags` and its ancestors, in the order in which they are named."""
    return [owner for owner in flags.__mro__ if dataclasses.is_dataclass(owner)]


def _fields_by_owner(flags: type) -> dict[type, list[dataclasses.Field[Any]]]:
    """The fields of each group. One that a class declares again stays in the group that it comes from."""
    owners = _owners(flags)
    found: dict[type, list[dataclasses.Field[Any]]] = {owner: [] for owner in owners}
    by_name = {field.name: field for field in dataclasses.fields(flags)}
    for name, field in by_name.items():
        first = [owner for owner in owners if name in vars(owner).get("__annotations__", ())][-1]
        found[first].append(field)
    return {owner: fields for owner, fields in found.items() if fields}


def _options(field: dataclasses.Field[Any], hint: Any, doc: str | None) -> dict[str, Any]:
    """Arguments of `add_argument`, with the flag as `names`, for one field."""
    annotation, extras = _without_extras(hint)
    inner, is_optional = optional_type(annotation)
    is_list = typing.get_origin(inner) is tuple
    element, more = _without_extras(typing.get_args(inner)[0] if is_list else inner)
    extras += more
    is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    options: dict[str, Any] = {"names": ["--" + field.name.replace("_", "-")]}
    if doc is not None:
        options["help"] = " ".join(doc.split()).replace("%", "%%")
    options |= {"required": True} if is_required else {"default": field.default}
    for text in (extra for extra in extras if isinstance(extra, str)):
        options["metavar"] = text
    if element is bool and not is_list:
        return options | {"action": argparse.BooleanOptionalAction if is_optional else "store_true"}
    if typing.get_origin(element) is Literal:
        options["choices"] = typing.get_args(element)
    else:
        options["type"] = _converter(element, [extra for extra in extras if isinstance(extra, Bound)])
    if is_list:
        options["nargs"] = "+"
    for extra in extras:
        if isinstance(extra, Spelling):
            options |= extra.options
    if options.get("action") == "append":
        del options["nargs"]
        options["default"] = list(options["default"])
    if options.pop("is_positional", False):
        del options["required" if is_required else "default"]
        options["names"] = [field.name]
    return options


def _without_extras(hint: Any) -> tuple[Any, list[Any]]:
    """A type and what stands beside it in Annotated, also within `X | None`."""
    if typing.get_origin(hint) is Annotated:
        inner, extras = _without_extras(typing.get_args(hint)[0])
        return inner, [*extras, *hint.__metadata__]
    inner, is_optional = optional_type(hint)
    if is_optional and typing.get_origin(inner) is Annotated:
        return typing.get_args(inner)[0] | None, list(inner.__metadata__)
    return hint, []


def _converter(element: Any, bounds: Sequence[Bound]) -> Callable[[str], Any]:
    """A word as a value of this type. argparse turns what it raises into words."""

    def convert(word: str) -> Any:
        try:
            value = element(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {type_name(element)}, got {word!r}") from None
        for bound in _broken(value, bounds):
            raise argparse.ArgumentTypeError(f"{word}: must be {bound.words}")
        return value

    return element if element in (str, Path) else convert


def _broken(value: Any, bounds: Sequence[Bound]) -> Iterator[Bound]:
    return (bound for bound in bounds if not bound.holds(value))
