"""Which files may import which: arrows between folders point one way, and no files import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "megatron/early_exit"
PACKAGE = "megatron.early_exit"

LEVELS = (
    {"config"}, {"platform"}, {"data"}, {"model"}, {"checkpoint", "schedules"}, {"training", "inference"},
    {"evaluation", "server"}, {"tuning"},
)  # fmt: skip
"""Folders from the lowest level up; a folder imports from itself and from lower levels alone."""

ROOMS_OF_INFERENCE = ("worker", "executor", "engine")
"""The same below inference/: the files beside these folders are their common terms, or use all of them."""


def imported(path: Path, root: Path) -> set[str]:
    """Files of ours, as 'folder/name', that a file imports anywhere: in function bodies and for types as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith(PACKAGE)]
        else:
            continue
        for name in names:
            parts = name.removeprefix(PACKAGE + ".").split(".")
            modules = ["/".join(parts[:count]) for count in (len(parts), len(parts) - 1)]
            found |= {next((module for module in modules if (root / f"{module}.py").is_file()), modules[0])}
    return found - {PACKAGE, "__version__"}


def imports_below(root: Path) -> dict[str, set[str]]:
    """What every file imports."""
    return {
        path.relative_to(root).with_suffix("").as_posix(): imported(path, root) for path in sorted(root.rglob("*.py"))
    }


def wrong_arrows(imports: dict[str, set[str]]) -> list[str]:
    level = {folder: number for number, folders in enumerate(LEVELS) for folder in folders}
    folder_of = lambda module: module.partition("/")[0]
    arrows = [(source, target) for source, targets in imports.items() for target in sorted(targets)]
    return [
        f"{source} imports {target}"
        for source, target in arrows
        if folder_of(source) != folder_of(target) and level[folder_of(target)] >= level[folder_of(source)]
    ]


def circles(imports: dict[str, set[str]]) -> Iterator[list[str]]:
    """Files on a path of imports that leads back to its start, one path for each start."""
    for start in imports:
        paths = [[start]]
        seen = set()
        while paths:
            path = paths.pop()
            for target in sorted(imports.get(path[-1], ())):
                if target == start:
                    yield [*path, start]
                    paths = []
                    break
                if target not in seen:
                    seen.add(target)
                    paths.append([*path, target])


def test_arrows_point_down() -> None:
    imports = imports_below(ROOT)
    assert {module.partition("/")[0] for module in imports if "/" in module} == set().union(*LEVELS)
    assert wrong_arrows({module: targets for module, targets in imports.items() if "/" in module}) == []


def test_arrows_of_inference_point_down() -> None:
    level = {f"inference/{room}": number for number, room in enumerate(ROOMS_OF_INFERENCE)}
    room_of = lambda module: module.rpartition("/")[0]
    arrows = [(source, target) for source, targets in imports_below(ROOT).items() for target in sorted(targets)]
    wrong = [
        (source, target)
        for source, target in arrows
        if {room_of(source), room_of(target)} <= set(level) and level[room_of(source)] < level[room_of(target)]
    ]
    assert wrong == []
    assert set(level) <= {room_of(source) for source, _ in arrows}


def test_the_scheduler_knows_no_tensors() -> None:
    """Nor does what it tells the workers."""
    modules = ["inference.protocol", "inference.text_engine"]
    modules += [f"inference.engine.{path.stem}" for path in sorted((ROOT / "inference/engine").glob("*.py"))]
    script = "import sys\n" + "".join(f"import {PACKAGE}.{module}\n" for module in modules)
    script += "sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT.parents[1]
    )
    assert done.returncode == 0, done.stderr


def test_no_files_import_each_other() -> None:
    assert list(circles(imports_below(ROOT))) == []


@pytest.mark.parametrize("statement", [
    "from megatron.early_exit.training import step",
    "from megatron.early_exit.training.step import train_step",
    "import megatron.early_exit.training.step",
    "def load():\n    from megatron.early_exit.training.step import train_step",
    "if TYPE_CHECKING:\n    from megatron.early_exit.training.step import train_step",
])  # fmt: skip
def test_hidden_imports_are_seen(tmp_path: Path, statement: str) -> None:
    for folder in ("inference", "training"):
        (tmp_path / folder).mkdir()
    (tmp_path / "training/step.py").write_text("from megatron.early_exit.inference.llm import LLM\n")
    (tmp_path / "inference/llm.py").write_text(statement + "\n")
    imports = imports_below(tmp_path)
    assert imports == {"inference/llm": {"training/step"}, "training/step": {"inference/llm"}}
    assert len(wrong_arrows(imports)) == 2
    assert sorted(map(sorted, circles(imports))) == [["inference/llm", "inference/llm", "training/step"]] + [
        ["inference/llm", "training/step", "training/step"]
    ]
