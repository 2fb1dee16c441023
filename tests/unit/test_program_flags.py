"""Flags of programs from dataclasses: types, help, groups, errors; and every tool is a console command."""

from __future__ import annotations

import importlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from megatron.early_exit.config.ranges import PositiveInt, at_least
from megatron.early_exit.platform.program_flags import Spelling, parse_flags, parser_of

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """model (of all programs)"""

    load: Annotated[Path, "DIR"]
    """folder of checkpoints"""

    layers: tuple[PositiveInt, ...] | None = None
    """of each stage; default: 100% even"""

    shortlist: bool | None = None
    size: Annotated[int, "N", at_least(2)] | None = None


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """output"""

    output: tuple[Path, ...] = ()
    passes: Annotated[float, Spelling(group="length")] = 3.0
    iterations: Annotated[int, Spelling(group="length")] | None = None
    stop: Annotated[tuple[str, ...], Spelling(action="append")] = ()


@dataclass(frozen=True, kw_only=True)
class Flags(ModelFlags, OutputFlags):
    """Do what a test needs."""

    words: Annotated[tuple[str, ...], "WORD", Spelling(is_positional=True, nargs="*")]
    kind: Literal["train", "valid"] = "train"
    chat: bool = False
    load: Annotated[Path, "DIR"] = Path("here")
    """folder, or nothing"""


def parse(words: str) -> Flags:
    return parse_flags(parser_of(Flags, "program.py"), Flags, words.split())


def test_defaults() -> None:
    assert parse("") == Flags(words=())


def test_values_have_the_types_of_their_fields() -> None:
    flags = parse("a b --layers 1 2 --no-shortlist --output x y --stop . --stop , --chat --kind valid --iterations 3")
    assert flags == Flags(
        words=("a", "b"), layers=(1, 2), shortlist=False, output=(Path("x"), Path("y")), stop=(".", ","), chat=True,
        kind="valid", iterations=3,
    )  # fmt: skip
    assert (parse("--size 2").size, parse("--shortlist").shortlist, parse("--load m").load) == (2, True, Path("m"))


def test_help_is_made_of_docstrings() -> None:
    text = parser_of(Flags, "program.py").format_help().partition("\n\n")[2]
    assert "Do what a test needs." in text and "show what the libraries have to say" in text
    model, output = text.index("model (of all programs):"), text.index("output:\n")
    assert text.index("--kind {train,valid}") < model < text.index("--layers") < output < text.index("--passes")
    assert model < text.index("--load DIR") < output  # a group keeps a flag whose default is another
    assert "folder, or nothing" in text and "100% even" in text


@pytest.mark.parametrize(("words", "message"), [
    ("--size x", "argument --size: expected an integer, got 'x'"),
    ("--size 1", "argument --size: 1: must be at least 2"),
    ("--layers 3 0", "argument --layers: 0: must be at least 1"),
    ("--passes x", "argument --passes: expected a number, got 'x'"),
    ("--passes 1 --iterations 2", "argument --iterations: not allowed with argument --passes"),
    ("--kind test", "argument --kind: invalid choice: 'test'"),
    ("--kinds test", "unrecognized arguments: --kinds"),
])  # fmt: skip
def test_errors_are_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("program.py: error: ") and message in error
    assert error.count("\n") == 1


def test_every_tool_is_a_console_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    tools = [path for path in sorted((ROOT / "tools").glob("*.py")) if not path.stem.startswith("make_")]
    imported = {re.search(r"from (megatron\S+) import run\n", path.read_text(encoding="utf-8"))[1] for path in tools}
    assert {f"{module}:run" for module in imported} == {
        target for name, target in scripts.items() if name != "early-exit-lm-eval"
    }
    for target in scripts.values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
