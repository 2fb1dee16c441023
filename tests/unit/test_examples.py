"""The launch scripts give settings that are accepted, on worlds of the size that they are for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron.early_exit.config.flags import parse_run_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("script", "world_size", "parameters"), [
    ("ee_training/1.3B.sh", 8, 1.2e9),
    ("ee_training/7B.sh", 32, 6.4e9),
])  # fmt: skip
def test_launch_scripts(tmp_path: Path, script: str, world_size: int, parameters: float) -> None:
    fake = tmp_path / "bin" / "torchrun"
    fake.parent.mkdir()
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    (tmp_path / "tokenizer").mkdir()
    environment = {
        **os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}", "TOKENIZER": str(tmp_path / "tokenizer"),
        "DATA": "0.7 a/one 0.3 b/two", "CHECKPOINTS": str(tmp_path / "checkpoints"),
    }  # fmt: skip
    words = subprocess.run(
        ["bash", str(ROOT / "examples" / script), "--log-interval", "7"],
        env=environment, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    launcher, flags = (
        words[: words.index("pretrain_early_exit_gpt.py")],
        words[words.index("pretrain_early_exit_gpt.py") + 1 :],
    )
    sizes = {name: int(launcher[launcher.index(name) + 1]) for name in ("--nproc_per_node", "--nnodes")}
    assert sizes["--nproc_per_node"] * sizes["--nnodes"] == world_size
    cfg = parse_run_config(flags, world_size=world_size)
    assert cfg.data.data_path == ("0.7", "a/one", "0.3", "b/two")
    assert cfg.logging.log_interval == 7  # flags of the user come last and win
    model = cfg.model
    backbone = model.num_layers * (4 * model.hidden_size**2 + 3 * model.hidden_size * model.ffn_size)
    assert parameters < backbone + 2 * 32000 * model.hidden_size < 1.2 * parameters


def test_the_demo_script_is_valid_shell() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "examples" / "demo.sh")], check=True)
