"""Prints the requirements of `pyproject.toml` that are not installed here, one a line, with the core of this Python.

    python -m benchmarks.gpu.requirements [--all] [--python-version 3.12]

PyTorch is never among them: a GPU machine has the build that fits its driver. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import tomllib
from pathlib import Path

_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

_TESTS = ("pytest", "hypothesis")
"""Of the packages for development, those that the tests cannot do without."""

_MARKER = re.compile(r"python_version\s*(<|>=)\s*'(\d+)\.(\d+)'")


def requirements(python_version: tuple[int, int]) -> list[str]:
    """Requirements of the package and of its tests for `python_version`, without PyTorch and without markers."""
    project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
    tests = [line for line in project["optional-dependencies"]["dev"] if _name(line) in _TESTS]
    lines = [line for line in [*project["dependencies"], *tests] if _name(line) != "torch"]
    return [line.split(";")[0].strip() for line in lines if _applies(line, python_version)]


def missing(python_version: tuple[int, int]) -> list[str]:
    """Those of which this interpreter has no version at all. Another version than asked for is kept: on a machine that
    somebody set up, what works there is worth more than our pins."""
    return [line for line in requirements(python_version) if not _is_installed(_name(line))]


def _name(requirement: str) -> str:
    return re.split(r"[<>=!;\[ ]", requirement, maxsplit=1)[0]


def _applies(requirement: str, python_version: tuple[int, int]) -> bool:
    marker = requirement.partition(";")[2].strip()
    if not marker:
        return True
    found = _MARKER.fullmatch(marker.replace('"', "'"))
    if found is None:
        raise ValueError(f"pyproject.toml: {requirement!r} has a marker that is not understood here")
    limit = (int(found[2]), int(found[3]))
    return python_version < limit if found[1] == "<" else python_version >= limit


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also those that are installed")
    parser.add_argument("--python-version", default=".".join(platform.python_version_tuple()[:2]))
    arguments = parser.parse_args()
    major, minor = map(int, arguments.python_version.split("."))
    for requirement in (requirements if arguments.all else missing)((major, minor)):
        print(requirement)


if __name__ == "__main__":
    main()
