"""The launch scripts give settings that are accepted, on worlds of the size that they are for."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from megatron.early_exit.config.checkpoint_files import LATEST_FILE, METADATA_FILE
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.flags import parse_run_config
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.saved_description import save_description
from megatron.early_exit.data.tokenizer_files import save_tokenizer
from megatron.early_exit.server.command_line import build_parser as build_server_parser
from megatron.early_exit.server.command_line import server_config
from megatron.early_exit.training.dry_run import describe, stages

ROOT = Path(__file__).parents[2]


def launched(tmp_path: Path, script: str, world_size: int) -> RunConfig:
    """The settings that a launch script gives to torchrun, on as many ranks as it says."""
    fake = tmp_path / "bin" / "torchrun"
    fake.parent.mkdir()
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    (tmp_path / "tokenizer").mkdir(exist_ok=True)
    environment = {
        **os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}", "TOKENIZER": str(tmp_path / "tokenizer"),
        "DATA": "0.7 a/one 0.3 b/two", "CHECKPOINTS": str(tmp_path / "checkpoints"), "MODEL": "nowhere",
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
    return parse_run_config(flags, world_size=world_size, warn=lambda message: None)


@pytest.mark.parametrize(("script", "world_size", "parameters"), [
    ("ee_training/1.3B.sh", 8, 1.2e9),
    ("ee_training/7B.sh", 32, 6.4e9),
    ("ee_training/13B.sh", 64, 12.7e9),
    ("ee_training/30B.sh", 128, 32e9),
])  # fmt: skip
def test_launch_scripts(tmp_path: Path, script: str, world_size: int, parameters: float) -> None:
    cfg = launched(tmp_path, script, world_size)
    assert cfg.data.data_path == ("0.7", "a/one", "0.3", "b/two")
    assert cfg.logging.log_interval == 7  # flags of the user come last and win
    model = cfg.model
    backbone = model.num_layers * (4 * model.hidden_size**2 + 3 * model.hidden_size * model.ffn_size)
    assert parameters < backbone + 2 * 32000 * model.hidden_size < 1.2 * parameters


LLAMA2 = {"vocab": 32000, "positions": 4096, "ffn": None, "untied": True, "qkv_bias": False}
MODELS = {
    "llama2_7B_1gpu": (1, 1, (8, 16), {"layers": 32, "hidden": 4096, "heads": 32, "kv": 32, **LLAMA2, "ffn": 11008}),
    "llama2_7B_8gpus": (8, 1, (8, 16), {"layers": 32, "hidden": 4096, "heads": 32, "kv": 32, **LLAMA2, "ffn": 11008}),
    "llama2_13B_8gpus": (8, 2, (10, 20), {"layers": 40, "hidden": 5120, "heads": 40, "kv": 40, **LLAMA2, "ffn": 13824}),
    "llama3_8B_8gpus": (8, 1, (8, 16), {"layers": 32, "hidden": 4096, "heads": 32, "kv": 8, "vocab": 128256,
                        "positions": 8192, "ffn": 14336, "untied": True, "qkv_bias": False}),
    "qwen2.5_7B_8gpus": (8, 1, (7, 14), {"layers": 28, "hidden": 3584, "heads": 28, "kv": 4, "vocab": 152064,
                         "positions": 32768, "ffn": 18944, "untied": True, "qkv_bias": True}),
    "llama2_70B_2nodes": (16, 2, (20, 40), {"layers": 80, "hidden": 8192, "heads": 64, "kv": 8, **LLAMA2,
                          "ffn": 28672}),
}  # fmt: skip


def converted(folder: Path, exits: tuple[int, ...], sizes: dict[str, Any]) -> None:
    """The settings of a converted model with exits, without its weights."""
    model = ModelConfig(
        num_layers=sizes["layers"], hidden_size=sizes["hidden"], num_attention_heads=sizes["heads"],
        ffn_hidden_size=sizes["ffn"], group_query_attention=sizes["kv"] != sizes["heads"],
        num_query_groups=sizes["kv"], max_position_embeddings=sizes["positions"], position_embedding_type="rope",
        normalization="RMSNorm", swiglu=True, add_bias_linear=False, add_qkv_bias=sizes["qkv_bias"],
        untie_embeddings_and_output_weights=sizes["untied"], padded_vocab_size=sizes["vocab"],
    )  # fmt: skip
    description = ModelDescription(
        model,
        ExitConfig(exit_layer_nums=exits, use_exit_norm=True, use_exit_mlp=True),
        TokenizerConfig("NullTokenizer", vocab_size=1000),
        "bf16",
    )
    for name in ("base", "exits"):
        checkpoint = folder / name / "iter_0000000"
        save_tokenizer(description.tokenizer, checkpoint / "tokenizer")
        save_description(description, checkpoint)
        (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(Metadata({}, storage_data={})))
        for file in ("metadata.json", "common.pt"):
            (checkpoint / file).touch()
        (folder / name / LATEST_FILE).write_text("0")


@pytest.mark.parametrize("name", MODELS)
def test_tuning_recipes(tmp_path: Path, name: str) -> None:
    world_size, num_stages, exits, sizes = MODELS[name]
    converted(tmp_path / "checkpoints", exits, sizes)
    cfg = launched(tmp_path, f"ee_tuning/{name}.sh", world_size)
    assert cfg.training.tune_exit and cfg.exits.exit_layer_nums == exits and cfg.logging.log_interval == 7
    assert f"EXITS={' '.join(map(str, exits))}" in (ROOT / "examples/ee_tuning" / f"{name}.sh").read_text().replace(
        "${EXITS:-", ""
    )
    assert cfg.parallel.num_stages == num_stages
    text = describe(cfg, world_size)
    assert f"start       from {tmp_path}/checkpoints/exits/iter_0000000, without its optimizer state" in text
    assert f"layers {sum(cfg.layers_per_stage[: num_stages - 1]) + 1} to {exits[-1]}; exits {exits[-1]}" in text or (
        num_stages == 1 and f"layers 1 to {exits[-1]}; exits {exits[0]}, {exits[1]}" in text
    )
    # It fits into 80 GB with room for what is not counted.
    assert all(one.total_bytes < 64 * 2**30 for one in stages(cfg.resolved(1000), world_size))


SERVERS = {"cpu": (1, 1, 1), "1gpu": (1, 1, 1), "tp8": (8, 1, 1), "pp4": (1, 4, 1), "tp2_pp4": (2, 4, 1),
           "2nodes": (8, 2, 2)}  # fmt: skip
"""Ranks of a stage, stages, machines."""


@pytest.mark.parametrize("name", SERVERS)
def test_servers(tmp_path: Path, name: str) -> None:
    """The flags are the server's, and as many ranks are started as they ask for."""
    for program in ("torchrun", "python"):
        fake = tmp_path / program
        fake.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" {program} "$@"\n')
        fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CHECKPOINTS": "a folder"}
    words = subprocess.run(
        ["bash", str(ROOT / "examples/ee_inference" / f"{name}.sh"), "--max-requests", "7"],
        env=environment, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    program = words.index("tools/run_text_generation_server.py")
    launcher, args = words[:program], build_server_parser().parse_args(words[program + 1 :])
    tensor, stages, nodes = SERVERS[name]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (tensor, stages)
    assert args.load == "a folder" and args.max_requests == 7
    server_config(args)  # which refuses settings that cannot be
    if nodes == 1:
        assert launcher == ["python"]
    else:
        per_node = int(launcher[launcher.index("--nproc_per_node") + 1])
        assert launcher[0] == "torchrun" and per_node * nodes == tensor * stages
        assert launcher[launcher.index("--nnodes") + 1] == str(nodes)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.s[hb]*")), ids=lambda path: path.name)
def test_scripts_are_valid_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
