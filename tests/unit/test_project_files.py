"""Files about the project itself: forms, workflows, hooks and citation can be read, and CONTRIBUTING.md names files,
functions and make targets that there are."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = ("CONTRIBUTING.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md")
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
YAML_FILES = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path | str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", YAML_FILES, ids=name_of)
def test_yaml_is_read(path: Path) -> None:
    assert isinstance(read(path), dict)


# What GitHub reads


@pytest.mark.parametrize("path", FORMS, ids=name_of)
def test_forms_ask_for_something(path: Path) -> None:
    """By GitHub's rules for forms: https://docs.github.com/communities/using-templates-to-encourage-useful-issues."""
    form = read(path)
    assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "title", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"input", "textarea", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in fields)
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids) > 0
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_workflows_run_make_targets_on_all_pythons() -> None:
    jobs = read(".github/workflows/checks.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if step.get("run", "").startswith("make")]
    called = {word for command in commands for word in shlex.split(command)[1:] if "=" not in word}
    assert {"lint", "test"} <= called <= set(TARGETS)
    # The Python that was set up is the one that make takes.
    assert all("PYTHON=python" in command for command in commands) and "PYTHON ?=" in MAKEFILE
    versions = jobs["test"]["strategy"]["matrix"]["python-version"]
    least, above = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert versions == [f"3.{minor}" for minor in range(int(least), int(above))]
    used = [
        step["with"]["python-version"] for job in jobs.values() for step in job["steps"] if "setup-python" in str(step)
    ]
    assert set(used) <= {*versions, "${{ matrix.python-version }}"}


# Hooks


def test_hooks_are_the_checks_of_make_lint() -> None:
    recipe = re.search(r"^lint: setup\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    checks = [line.strip().removeprefix("$(BIN)/").split() for line in recipe.splitlines()]
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    entries = [shlex.split(hook["entry"]) for hook in hooks]
    ours = [[entry[0].removeprefix(".venv/bin/"), *entry[1:]] for entry in entries if entry[0].startswith(".venv/bin/")]
    assert len(ours) >= 3
    for entry in ours:
        words = [word for word in entry if not word.startswith("-")]
        assert any(check[: len(words)] == words for check in checks), f"make lint does not run {' '.join(entry)}"
    # Tools of an environment that pre-commit would make have versions of their own.
    assert {hook["language"] for hook in hooks} <= {"system", "pygrep"}
    named = {re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["optional-dependencies"]["dev"]}
    assert {"pre-commit", "pytest-cov", *(entry[0] for entry in ours)} <= named


@pytest.mark.parametrize(("text", "is_refused"), [
    ("a\n", False), ("a\nb\n", False), ("", False), ("a", True), ("a\nb", True), ("a\n\n", True), ("\n\n\n", True),
])  # fmt: skip
def test_the_hook_of_last_lines(text: str, is_refused: bool) -> None:
    hooks = {hook["id"]: hook for hook in read(".pre-commit-config.yaml")["repos"][0]["hooks"]}
    hook = hooks["end-of-file"]
    assert hook["args"] == ["--multiline"]
    assert bool(re.search(hook["entry"].encode(), text.encode(), re.MULTILINE | re.DOTALL)) == is_refused


# Citation


def test_citation() -> None:
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    assert citation["authors"] == [{"name": "The Megatron Early Exit contributors"}]
    assert citation["license"] == PROJECT["license"]
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year", "url"} <= reference.keys()
        (identifier,) = reference["identifiers"]
        assert reference["url"].removeprefix("https://arxiv.org/abs/") == identifier["value"].removeprefix("arXiv:")
    assert [reference["identifiers"][0]["value"] for reference in citation["references"]] == [
        "arXiv:2312.04916", "arXiv:2402.00518",
    ]  # fmt: skip


# What pages name


def place_of(name: str) -> Path | None:
    """The file or folder of that name in the repository or in the package."""
    return next((root / name for root in (ROOT, ROOT / "megatron/early_exit") if (root / name).exists()), None)


def names_of_files(text: str) -> set[str]:
    """What is quoted like a path, or linked to."""
    quoted = re.findall(r"`(\.?[\w.-]+(?:/[\w.-]+)*/?)`", text)
    paths = {name for name in quoted if "/" in name or re.search(r"\.(py|md|txt|ya?ml|toml|cff|sh)$", name)}
    return paths | {link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link}


def passages(page: str) -> Iterator[str]:
    """Paragraphs, rows of tables, and points of lists."""
    for block in re.split(r"\n\s*\n|\n(?=\||- |\d+\. )", re.sub(r"```.*?```", "", page, flags=re.DOTALL)):
        yield " ".join(block.split())


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_are_there(page: str) -> None:
    names = names_of_files((ROOT / page).read_text(encoding="utf-8"))
    examples = {"results/NAME_MACHINE_DATE.json", "run_config.yaml", "megatron/__init__.py", "build/docs/index.html"}
    assert sorted(name for name in names - examples if place_of(name) is None) == []
    assert page != "CONTRIBUTING.md" or len(names) > 60


def test_make_targets_that_pages_name_are_there() -> None:
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    called = {target for page in pages for target in re.findall(r"(?:`|^)make ([a-z-]+)", page, re.MULTILINE)}
    assert {"lint", "test", "test-fast", "coverage", "hooks", "setup"} <= called
    assert called <= set(TARGETS)


def test_names_are_in_the_files_that_are_named_beside_them() -> None:
    """A function that moves takes its place in CONTRIBUTING.md along."""
    others = {"slow", "transformers"}  # a mark of pytest, a package
    missing, num_names = [], 0
    for passage in passages(GUIDE):
        files = [place for name in names_of_files(passage) if (place := place_of(name)) and place.is_file()]
        code = "\n".join(file.read_text(encoding="utf-8") for file in files if file.suffix == ".py")
        if not code:
            continue
        names = {
            part
            for quoted in re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)(?:\(\w*\))?`", passage)
            for part in quoted.split(".")
            if part not in others
        }
        num_names += len(names)
        missing += [f"{name}: {passage[:80]}" for name in sorted(names) if not re.search(rf"\b{name}\b", code)]
    assert missing == []
    assert num_names > 80
