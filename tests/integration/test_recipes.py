"""The launch scripts of examples/ee_tuning run, from the conversion to the last checkpoint, on a small untied model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from megatron.early_exit.checkpoint.store import read_checkpoint
from megatron.early_exit.checkpoint.tensors import EXIT_HEAD
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from tests.data_files import write_documents
from tests.distributed.test_conversion import random_model
from tests.integration.test_training_program import ROOT, environment
from tests.ports import free_port

# Script, its variables (ranks that stay few), layers with exits.
RECIPES = {
    "llama2_7B_1gpu": ({}, "1 2"),
    "llama2_13B_8gpus": ({"GPUS_PER_NODE": "2"}, "1 2"),
    "llama2_70B_2nodes": ({"GPUS_PER_NODE": "2", "NNODES": "1", "TP": "2"}, "1"),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model and data, in the variables of the scripts."""
    folder = tmp_path_factory.mktemp("recipes")
    sizes = {"tie_word_embeddings": False, "hidden_size": 48, "num_attention_heads": 4, "head_dim": 12}
    random_model("llama", sizes, folder / "model")
    data = write_documents(folder / "text", [[(5 * i + j * j) % 92 for j in range(40)] for i in range(30)])
    return {
        "MODEL": str(folder / "model"), "DATA": data, "SEQ_LENGTH": "16", "MICRO_BATCH_SIZE": "2", "LR": "1e-2",
        "GLOBAL_BATCH_SIZE": "4", "ITERATIONS": "3", "MASTER_PORT": str(free_port()),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name: str, settings: dict[str, str], tmp_path: Path) -> None:
    changes, exits = RECIPES[name]
    variables = {**settings, **changes, "EXITS": exits, "CHECKPOINTS": str(tmp_path)}
    flags = ["--log-interval", "1", "--eval-iters", "0", "--split", "100,0,0", "--num-workers", "0"]

    def script(**more: str) -> str:
        result = subprocess.run(
            ["bash", f"examples/ee_tuning/{name}.sh", *flags], cwd=ROOT, env={**environment(), **variables, **more},
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    script()
    lines = [json.loads(line) for line in (tmp_path / "tuned/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    before, after = (read_checkpoint(checkpoint_folder(tmp_path / which))[1] for which in ("exits", "tuned"))
    assert set(before) == set(after)
    for tensor in before:
        assert torch.equal(before[tensor].read(), after[tensor].read()) == (EXIT_HEAD not in tensor), tensor
    if name == "llama2_7B_1gpu":
        said = script(DRY_RUN="1")
        assert "iter_0000003, with its optimizer state" in said
