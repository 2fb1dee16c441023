"""Checkpoints hold parameters under core's keys, and those from before they did are read like them."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.early_exit.checkpoint.convert_command import main as convert
from megatron.early_exit.checkpoint.safe_pickle import read_metadata
from megatron.early_exit.checkpoint.store import read_checkpoint
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.serialize import load_run_config, save_run_config
from megatron.early_exit.model.build import build_model
from megatron.early_exit.model.key_names import key_of, name_of
from megatron.early_exit.model.layer_specs import local_layer_spec, with_mlp_norm
from tests.configs import VOCAB_SIZE, make_config, make_training_config
from tests.data_files import write_token_files
from tests.distributed.core_gpt import core_gpt
from tests.distributed.engines import head_logits
from tests.distributed.parallel_model import layout
from tests.distributed.training_runs import training_run
from tests.distributed.workers import run_distributed

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "checkpoints"
# Of the runs that wrote the fixtures: two layers with an exit after the first, saved at iteration 2 of 4.
SMALL = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1, "ffn_hidden_size": 24,
    "exit_layer_nums": (1,), "exit_layer_weight": (0.5,), "vocab_size": 31, "train_iters": 4, "lr_decay_iters": 4,
    "lr_warmup_iters": 1,
}  # fmt: skip
OLD = {
    "norm_mlp": {"use_exit_norm": True, "use_exit_mlp": True, "normalization": "LayerNorm"},
    "block_distributed": {
        "use_exit_block": True, "use_distributed_optimizer": True, "untie_exit_output_weights": True, "bf16": True,
    },
}  # fmt: skip
TOKENS = [[3, 5, 8, 11, 14, 17]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_token_files(tmp_path_factory.mktemp("data"), 32)


def old_checkpoint(variant: str, folder: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / variant, folder))


def stored_keys(folder: Path) -> set[str]:
    return set(read_metadata(checkpoint_folder(folder)).state_dict_metadata)


def with_cores_keys(folder: Path) -> None:
    """Give a checkpoint today's keys, and leave all that it holds as it is."""
    metadata = read_metadata(checkpoint_folder(folder))
    metadata.state_dict_metadata = {key_of(key): value for key, value in metadata.state_dict_metadata.items()}
    metadata.storage_data = {
        replace(index, fqn=key_of(index.fqn)): value for index, value in metadata.storage_data.items()
    }
    metadata.planner_data = None
    (checkpoint_folder(folder) / ".metadata").write_bytes(pickle.dumps(metadata))


def keys_and_shapes(cfg: RunConfig) -> tuple[dict, dict]:
    """Of core's GPT and of ours, as their sharded state dicts have them."""
    with layout(cfg):
        config = build_model(cfg, VOCAB_SIZE)
        models = (
            core_gpt(replace(cfg, exits=make_config(exit_layer_nums=(), exit_layer_weight=()).exits)),
            (config.chunks[0]),
        )
        metadata = {"non_homogeneous_layers": True}
        found = []
        for model in models:
            values = model.sharded_state_dict(metadata=dict(metadata)).values()
            found.append({value.key: getattr(value, "global_shape", None) for value in values})
        return found[0], found[1]


@pytest.mark.parametrize("head", [
    {"exit_layer_nums": (), "exit_layer_weight": ()},
    {"exit_layer_nums": (), "exit_layer_weight": (), "normalization": "LayerNorm", "qk_layernorm": True,
     "untie_embeddings_and_output_weights": True, "add_bias_linear": True},
    {"use_exit_norm": True, "use_exit_mlp": True},
    {"use_exit_block": True},
], ids=str)  # fmt: skip
def test_keys_are_cores(head: dict) -> None:
    core, ours = run_distributed(1, keys_and_shapes, cfg=make_config(**head))[0]
    of_exits = {key.split(".exit_head.")[1] for key in ours if ".exit_head." in key}
    assert {key: shape for key, shape in ours.items() if ".exit_head." not in key} == core
    linears = {"mlp.linear_fc1", "mlp.linear_fc2"}
    expected = set()
    if head.get("use_exit_mlp"):
        expected = {"norm.weight"} | {f"{name}.{kind}" for name in linears for kind in ("weight", "_extra_state")}
    if head.get("use_exit_block"):
        linears |= {"self_attention.linear_qkv", "self_attention.linear_proj"}
        expected = {f"block.{name}.{kind}" for name in linears for kind in ("weight", "_extra_state")}
        expected |= {"block.self_attention.linear_qkv.layer_norm_weight", "block.mlp.linear_fc1.layer_norm_weight"}
    assert of_exits == expected


def test_names_and_keys() -> None:
    for name, key in {
        "decoder.layers.3.input_layernorm.bias": "decoder.layers.3.self_attention.linear_qkv.layer_norm_bias",
        "decoder.layers.11.exit_head.block.pre_mlp_layernorm.weight":
            "decoder.layers.11.exit_head.block.mlp.linear_fc1.layer_norm_weight",
        "decoder.final_layernorm.weight": "decoder.final_layernorm.weight",
        "decoder.layers.0.self_attention.q_layernorm.weight": "decoder.layers.0.self_attention.q_layernorm.weight",
    }.items():  # fmt: skip
        assert (key_of(name), name_of(key), key_of(key), name_of(name)) == (key, name, key, name)


@pytest.mark.parametrize("variant", OLD)
def test_an_old_checkpoint_is_resumed_bit_equal(variant: str, data: str, tmp_path: Path) -> None:
    """With the losses that the old code went on with, and to the bit as from the same checkpoint with today's keys."""
    expected = json.loads((FIXTURES / variant / "expected.json").read_text())
    tolerance = 1e-3 if "bf16" in OLD[variant] else 1e-6
    digests = []
    for name in ("old", "new"):
        load = old_checkpoint(variant, tmp_path / f"from_{name}")
        if name == "new":
            with_cores_keys(load)
        save = str(tmp_path / name)
        cfg = make_training_config(data, tmp_path / name, load=str(load), save=save, **SMALL, **OLD[variant])
        digests += run_distributed(1, training_run, cfg=cfg)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
        for record, before in zip(records, expected["iterations"], strict=True):
            assert {key: record[key] for key in before} == pytest.approx(before, rel=tolerance)
    assert digests[0] == digests[1]
    assert {key for key in stored_keys(tmp_path / "old") if key != key_of(key)} == set()
    assert stored_keys(tmp_path / "old") == stored_keys(tmp_path / "new")


def test_an_old_checkpoint_is_served_and_converted(tmp_path: Path) -> None:
    """Added exits, without training: the layers' files are linked or written, and all keys are core's."""
    old = old_checkpoint("norm_mlp", tmp_path / "old")
    new = old_checkpoint("norm_mlp", tmp_path / "new")
    with_cores_keys(new)
    added = ["--exit-layer-nums", "2", "--use-exit-norm", "--use-exit-mlp"]
    assert convert(["add-exits", "--load", str(old), "--save", str(tmp_path / "added"), *added]) == 0
    assert not any(key != key_of(key) for key in stored_keys(tmp_path / "added"))
    said = [run_distributed(1, head_logits, folder=f, tokens=TOKENS)[0] for f in (old, new, tmp_path / "added")]
    assert torch.equal(said[0]["final"], said[1]["final"]) and torch.equal(said[0]["final"], said[2]["final"])
    assert torch.equal(said[0]["exit_1"], said[2]["exit_1"]) and set(said[2]) == {"exit_1", "exit_2", "final"}


def as_weights_alone(folder: Path) -> None:
    """Drop the training state of a checkpoint: what a conversion of the old code would have written."""
    file = checkpoint_folder(folder) / ".metadata"
    metadata = read_metadata(file.parent)
    is_weight = lambda key: not key.startswith(("optimizer.", "rng_state"))
    metadata.state_dict_metadata = {k: v for k, v in metadata.state_dict_metadata.items() if is_weight(k)}
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if is_weight(k.fqn)}
    file.write_bytes(pickle.dumps(metadata))


def test_exits_tuned_on_an_old_base_have_cores_keys(data: str, tmp_path: Path) -> None:
    """The base's files are linked, under the keys of today; and the tuned model is served."""
    base = old_checkpoint("norm_mlp", tmp_path / "base")
    as_weights_alone(base)
    cfg = make_training_config(
        data, tmp_path / "tune", load=str(base), save=str(tmp_path / "tuned"), finetune=True, tune_exit=True,
        tune_exit_pipeline_parallel_size=1, **{**SMALL, "train_iters": 2}, **OLD["norm_mlp"],
    )  # fmt: skip
    run_distributed(1, training_run, cfg=cfg)
    keys = {key for key in stored_keys(tmp_path / "tuned") if not key.startswith(("optimizer.", "rng_state"))}
    assert keys == {key_of(key) for key in stored_keys(base)}
    _, before = read_checkpoint(checkpoint_folder(base))
    _, after = read_checkpoint(checkpoint_folder(tmp_path / "tuned"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].read(), after[name].read())}
    assert changed and all(".exit_head." in name for name in changed)
    said = [run_distributed(1, head_logits, folder=folder, tokens=TOKENS)[0] for folder in (base, tmp_path / "tuned")]
    assert torch.equal(said[0]["final"], said[1]["final"]) and not torch.equal(said[0]["exit_1"], said[1]["exit_1"])


def test_what_transformer_engine_trained_is_served_by_the_local_layers(tmp_path: Path) -> None:
    """Its keys are core's, and it lacks states beside the parameters that the local layers have."""
    folder = old_checkpoint("norm_mlp", tmp_path / "te")
    expected = run_distributed(1, head_logits, folder=folder, tokens=TOKENS)[0]
    with_cores_keys(folder)
    settings = checkpoint_folder(folder) / "run_config.yaml"
    config = load_run_config(settings)
    save_run_config(replace(config, model=replace(config.model, transformer_impl="transformer_engine")), settings)
    file = checkpoint_folder(folder) / ".metadata"
    metadata = read_metadata(file.parent)
    for index in [index for index in metadata.storage_data if "linear_proj._extra_state" in index.fqn]:
        del metadata.storage_data[index], metadata.state_dict_metadata[index.fqn]
    file.write_bytes(pickle.dumps(metadata))
    said = run_distributed(1, head_logits, folder=folder, tokens=TOKENS)[0]
    assert all(np.array_equal(said[name], expected[name]) for name in expected)


def test_a_branch_with_a_norm_of_its_own_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = old_checkpoint("norm_mlp", tmp_path / "te")
    file = checkpoint_folder(folder) / ".metadata"
    metadata = read_metadata(file.parent)
    norm = metadata.state_dict_metadata["decoder.layers.0.pre_mlp_layernorm.weight"]
    metadata.state_dict_metadata["decoder.layers.0.exit_head.mlp.linear_fc1.layer_norm_weight"] = norm
    file.write_bytes(pickle.dumps(metadata))
    assert convert(["inspect", "--load", str(folder)]) == 2
    assert "branches share the norm of their layer" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="branches share the norm of their layer"):
        run_distributed(1, head_logits, folder=folder, tokens=TOKENS)


def test_a_layer_with_an_mlp_branch_has_its_norm_apart() -> None:
    """Transformer Engine's layer fuses it; what is tried here is a layer that has none, with classes that stand in."""

    class Norm: ...

    class Linear: ...

    plain = local_layer_spec()
    fused = replace(
        plain, submodules=replace(plain.submodules, pre_mlp_layernorm=None, sharded_state_dict_keys_map={"a": "b"})
    )
    apart = with_mlp_norm(fused, Norm, Linear)
    assert apart.submodules.pre_mlp_layernorm is Norm and apart.submodules.mlp.submodules.linear_fc1 is Linear
    assert apart.submodules.mlp.submodules.linear_fc2 is plain.submodules.mlp.submodules.linear_fc2
    assert apart.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] == "mlp.linear_fc1.layer_norm_"
    assert apart.submodules.sharded_state_dict_keys_map["a"] == "b" and fused.submodules.pre_mlp_layernorm is None
