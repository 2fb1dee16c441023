"""The package as a guest in the namespace `megatron`."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import megatron.early_exit

ROOT = Path(__file__).parents[2]


def test_megatron_stays_a_namespace_package() -> None:
    """With a megatron/__init__.py here, megatron.core would vanish when run from the checkout."""
    assert not (ROOT / "megatron" / "__init__.py").exists()
    import megatron.core

    assert Path(megatron.core.__file__).parent.parent != ROOT / "megatron"


def test_every_module_can_be_imported() -> None:
    names = [module.name for module in pkgutil.walk_packages(megatron.early_exit.__path__, "megatron.early_exit.")]
    assert len(names) > 40
    for name in names:
        importlib.import_module(name)


def test_gpu_only_packages_are_not_imported() -> None:
    code = (
        "import sys, megatron.early_exit.training.pretrain, megatron.early_exit.inference.llm;"
        "print([m for m in ('transformer_engine', 'apex', 'flash_attn', 'wandb') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
                            env={"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"})  # fmt: skip
    assert result.stdout.strip() == "[]"


def test_the_configuration_needs_neither_torch_nor_core() -> None:
    """So that bad flags are refused at once."""
    code = (
        "import sys, megatron.early_exit.config.flags;"
        "print([m for m in ('torch', 'megatron.core') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
                            env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert result.stdout.strip() == "[]"


def test_type_checkers_read_the_installed_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["megatron.early_exit"]
    assert (ROOT / "megatron/early_exit/py.typed").exists()
