"""Pages made of docstrings: what docs/api.md calls public is there and says what it is, and the pages are written."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron/early_exit"
API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
PUBLIC = {
    found[1]: re.findall(r"`(\w+)`", found[2])
    for found in re.finditer(r"^\| \[[\w.]+\]\(\.\./([\w/]+\.py)\) \| (.*?) \|", API, re.MULTILINE)
}
"""Names by the module's file."""


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """tools/make_api_docs.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("make_api_docs", ROOT / "tools/make_api_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_module_says_what_it_is() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    assert [str(path) for path in modules if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


def definition(name: str, path: Path) -> ast.ClassDef | ast.FunctionDef | None:
    """Of a class or function, also where a module has it from another one of ours."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return definition(name, ROOT / f"{node.module.replace('.', '/')}.py")
    return None


@pytest.mark.parametrize("path", PUBLIC)
def test_what_is_public_is_there_and_says_what_it_is(path: str) -> None:
    assert PUBLIC[path]
    for name in PUBLIC[path]:
        node = definition(name, ROOT / path)
        assert node is not None, f"{path} has no {name}"
        assert ast.get_docstring(node), f"{name} in {path} has no docstring"


def test_pages_are_written_and_linked(program: ModuleType, tmp_path: Path) -> None:
    assert len(PUBLIC) > 30
    assert program.build(tmp_path, "megatron.early_exit.evaluation.statistics") == {}
    page = tmp_path / "megatron/early_exit/evaluation/statistics/intervals.html"
    assert "How many times as fast as the baseline" in page.read_text(encoding="utf-8")
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="megatron/early_exit/evaluation/statistics/intervals.html"' in index
    links = re.findall(r'href="([^"#]+)"', index)
    missing = [link for link in links if not link.startswith("http") and not (tmp_path / link).exists()]
    assert len(links) > 40 and missing == []
    first = tmp_path / "megatron/early_exit/evaluation/statistics.html"
    assert 'href="../../../index.html"' in first.read_text(encoding="utf-8")


def test_modules_that_cannot_be_imported_are_named(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_api_package"
    package.mkdir()
    (package / "__init__.py").write_text('"""A package."""\n')
    (package / "whole.py").write_text('"""A module."""\nimport logging\nlog = logging.getLogger("a")\nlimit = 3\n')
    (package / "lacking.py").write_text('"""A module."""\nimport no_such_package\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    left_out = program.build(tmp_path / "docs", "some_api_package")
    assert left_out == {"some_api_package.lacking": "No module named 'no_such_package'"}
    assert {path.name for path in (tmp_path / "docs").rglob("*.html")} == {
        "index.html", "some_api_package.html", "whole.html"
    }  # fmt: skip
    page = (tmp_path / "docs/some_api_package/whole.html").read_text(encoding="utf-8")
    assert 'id="limit"' in page and "Logger" not in page
