"""docs/architecture.md names files, classes and functions that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "megatron/early_exit" / name for name in ("inference", "server")]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_files_of_the_page_are_there() -> None:
    names = set(re.findall(r"[\w/]+\.py\b", PAGE))
    assert len(names) > 30
    places = [ROOT, *FOLDERS, *(path for folder in FOLDERS for path in folder.iterdir() if path.is_dir())]
    assert [name for name in sorted(names) if not any((place / name).is_file() for place in places)] == []


def test_names_of_the_page_are_in_the_code() -> None:
    """`Class`, `Class.method`, `function` and `field` are defined somewhere; other quoted words at least occur."""
    code = "\n".join(path.read_text(encoding="utf-8") for folder in FOLDERS for path in folder.rglob("*.py"))
    quoted = set(re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)(?:\(.*?\))?`", PAGE))
    quoted = {name for name in quoted if not name.endswith(".py")}
    assert len(quoted) > 50
    is_defined = lambda name: re.search(rf"\b(def|class) {name}\b|^ +(self\.)?{name}:", code, re.MULTILINE)
    missing = [name for name in quoted if "." in name and not all(map(is_defined, name.split(".")))]
    missing += [name for name in quoted if "." not in name and not re.search(rf"\b{name}\b", code)]
    assert sorted(missing) == []


def test_a_step_on_the_page_has_the_protocol_s_fields() -> None:
    from megatron.early_exit.inference import protocol

    block = PAGE.split("## What a step looks like")[1].split("```")[1]
    structs = ("Step", "CopyPrefix", "Admit", "Rows", "RowsOutput", "DrawnToken")
    fields = {field for name in structs for field in getattr(protocol, name).__struct_fields__}
    assert set(re.findall(r"\b(\w+)=", block)) <= fields
