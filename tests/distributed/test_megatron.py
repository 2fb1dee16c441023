"""Checkpoints of Megatron-LM and Megatron-Bridge: core's plain GPT writes them and we read them, and the other way."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from megatron.early_exit.checkpoint import megatron_writing
from megatron.early_exit.checkpoint.convert_command import main as convert
from megatron.early_exit.checkpoint.megatron import find_megatron, read_megatron
from megatron.early_exit.checkpoint.megatron_settings import load_file, model_config
from megatron.early_exit.checkpoint.safe_pickle import read_metadata
from megatron.early_exit.checkpoint.tensors import LazyTensor
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.saved_description import read_description
from megatron.early_exit.model.key_names import key_of
from tests.configs import VOCAB_SIZE, make_config, make_training_config
from tests.data_files import write_token_files
from tests.distributed.core_gpt import core_gpt, core_logits
from tests.distributed.engines import head_logits
from tests.distributed.parallel_model import layout
from tests.distributed.test_checkpoint_keys import old_checkpoint
from tests.distributed.training_runs import training_run
from tests.distributed.workers import run_distributed

TOKENS = [[3, 5, 8, 13, 21, 34, 55, 89], [90, 91, 2, 3, 5, 7, 11, 13]]
NUMBERS = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE - 1)]
PLAIN: dict[str, Any] = {"exit_layer_nums": (), "exit_layer_weight": (), "max_position_embeddings": 16}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"untie_embeddings_and_output_weights": True, "rotary_base": 500000, "use_rope_scaling": True},
    "tied, qk norm, qkv bias": {"qk_layernorm": True, "add_qkv_bias": True, "rotary_percent": 0.5, "kv_channels": 12},
    "gpt": {
        "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "add_bias_linear": True,
        "swiglu": False, "group_query_attention": False, "num_query_groups": 1,
    },
}  # fmt: skip
TP2 = {"tensor_model_parallel_size": 2}


def megatron_arguments(cfg: RunConfig) -> argparse.Namespace:
    """What Megatron-LM would have of this model in its arguments, and some of the rest."""
    model = cfg.model
    names = (
        "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "group_query_attention",
        "num_query_groups", "max_position_embeddings", "position_embedding_type", "rotary_base", "rotary_percent",
        "use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor", "normalization",
        "norm_epsilon", "qk_layernorm", "swiglu", "openai_gelu", "add_bias_linear", "add_qkv_bias",
        "untie_embeddings_and_output_weights", "hidden_dropout", "attention_dropout", "init_method_std",
    )  # fmt: skip
    return argparse.Namespace(
        **{name: getattr(model, name) for name in names},
        kv_channels=model.head_size,
        padded_vocab_size=VOCAB_SIZE,
        tensor_model_parallel_size=cfg.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=cfg.parallel.pipeline_model_parallel_size,
        tokenizer_type="NullTokenizer",
        vocab_size=VOCAB_SIZE - 1,
        num_experts=None,
        multi_latent_attention=False,
        bias_gelu_fusion=False,
        params_dtype=torch.float32,
        attention_backend=AttnBackend.auto,
        moe_layer_freq=1,
    )


def shake(model: GPTModel) -> None:
    """Give norms and biases values of their own, the same on all tensor-parallel ranks where they are not split, and
    the last stage its copy of a tied weight, which core's groups for it do here with one stage alone."""
    if model.share_embeddings_and_output_weights and model.shared_embedding_or_output_weight() is not None:
        first = parallel_state.get_pipeline_model_parallel_first_rank()
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.broadcast(model.shared_embedding_or_output_weight().data, src=first, group=group)
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            whole = torch.randn(parameter.numel() * 2, generator=generator) / 10
            rank = parallel_state.get_tensor_model_parallel_rank()
            is_split = getattr(parameter, "tensor_model_parallel", False)
            parameter.data += whole[rank::2] if is_split else whole[: parameter.numel()]


def write_with_core(cfg: RunConfig, folder: Path, is_stacked: bool, common_is_sharded: bool = False) -> Tensor | None:
    """As Megatron-LM does with --ckpt-format torch_dist. Returns the model's logits if it is on one stage."""
    with layout(cfg):
        torch.manual_seed(5)
        model = core_gpt(cfg)
        shake(model)
        state = {
            "args": megatron_arguments(cfg),
            "checkpoint_version": 3.0,
            "iteration": 7,
            "model": model.sharded_state_dict(metadata={"non_homogeneous_layers": not is_stacked}),
        }
        if common_is_sharded:
            common = {key: state.pop(key) for key in ("args", "checkpoint_version", "iteration")}
            state["common_state"] = ShardedObject("common_state", common, (1,), (0,), torch.distributed.get_rank())
        if torch.distributed.get_rank() == 0:
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(state, str(folder))
        return core_logits(model, TOKENS) if cfg.parallel.pipeline_model_parallel_size == 1 else None


def load_with_core(cfg: RunConfig, folder: Path) -> Tensor:
    """As Megatron-LM does. Returns the model's logits."""
    with layout(cfg):
        common = dist_checkpointing.load_common_state_dict(str(folder))
        vocabulary = common["args"].padded_vocab_size
        model = core_gpt(cfg, vocab_size=vocabulary)
        metadata = {name: common["content_metadata"][name] for name in ("non_homogeneous_layers",)}
        state = {"model": model.sharded_state_dict(metadata=metadata)}
        model.load_state_dict(dist_checkpointing.load(state, str(folder))["model"])
        return core_logits(model, TOKENS)


def write_ranks(cfg: RunConfig, folder: Path, fused: bool) -> None:
    """As Megatron-LM does with --ckpt-format torch. fused: norms have Transformer Engine's names."""
    with layout(cfg):
        torch.manual_seed(5)
        model = core_gpt(cfg)
        shake(model)
        state = model.state_dict()
        if fused:
            state = {key_of(name): value for name, value in state.items()}
            state |= {name: io.BytesIO(b"") for name in state if name.endswith("_extra_state")}
        tp, pp = (
            parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
        )  # fmt: skip
        name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if cfg.parallel.pipeline_model_parallel_size > 1 else "")
        (folder / name).mkdir(parents=True)
        contents = {"args": megatron_arguments(cfg), "checkpoint_version": 3.0, "iteration": 7, "model": state}
        torch.save(contents, folder / name / "model_optim_rng.pt")


def finish(folder: Path) -> None:
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("7")


def final_logits(folder: Path, tp_size: int = 1) -> Tensor:
    said = run_distributed(1, head_logits, folder=folder, tokens=TOKENS, tp_size=tp_size)
    return said[0]["final"]


def from_megatron(load: Path, save: Path, *more: str) -> int:
    return convert(["from-megatron", "--load", str(load), "--save", str(save), *more])


@pytest.mark.parametrize("is_stacked", [True, False], ids=["stacked", "layer by layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_cores_plain_gpt(kind: str, is_stacked: bool, tmp_path: Path) -> None:
    """Written by DP 2 x TP 2."""
    cfg = make_config(**PLAIN, **KINDS[kind], **TP2)
    folder = tmp_path / "theirs" / "iter_0000007"
    expected = run_distributed(4, write_with_core, cfg=cfg, folder=folder, is_stacked=is_stacked)[0]
    finish(folder)
    assert from_megatron(tmp_path / "theirs", tmp_path / "ours") == 0
    torch.testing.assert_close(final_logits(tmp_path / "ours"), expected, rtol=1e-4, atol=1e-5)
    ours = read_description(checkpoint_folder(tmp_path / "ours")).model
    same = replace(cfg.model, kv_channels=cfg.model.head_size, padded_vocab_size=VOCAB_SIZE)
    assert replace(ours, make_vocab_size_divisible_by=16) == same


@pytest.mark.parametrize("kind", KINDS)
def test_core_reads_what_we_write(kind: str, tmp_path: Path) -> None:
    """Through our checkpoint, back into core's model under TP 2: the logits that it had."""
    cfg = make_config(**PLAIN, **KINDS[kind])
    folder = tmp_path / "theirs" / "iter_0000007"
    expected = run_distributed(1, write_with_core, cfg=cfg, folder=folder, is_stacked=False)[0]
    assert from_megatron(folder, tmp_path / "ours") == 0
    back = ["to-megatron", "--load", str(tmp_path / "ours"), "--output", str(tmp_path / "back")]
    assert convert(back) == 0
    assert (tmp_path / "back" / "latest_checkpointed_iteration.txt").read_text() == "release"
    logits = run_distributed(
        2, load_with_core, cfg=make_config(**PLAIN, **KINDS[kind], **TP2), folder=tmp_path / "back" / "release"
    )[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    before, after = read_megatron(folder), read_megatron(find_megatron(tmp_path / "back"))
    assert before.model == after.model and before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.tensors[name].read(), after.tensors[name].read()) for name in before.tensors)
    assert convert(back) == 2 and convert([*back, "--force"]) == 0


def test_exits_are_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ours = old_checkpoint("norm_mlp", tmp_path / "ours")
    output = tmp_path / "theirs"
    assert convert(["to-megatron", "--load", str(ours), "--output", str(output), "--dtype", "bf16"]) == 0
    printed = capsys.readouterr()
    assert "the exits (1) are left out" in printed.err and "--use-checkpoint-args" in printed.out
    read = read_megatron(output / "release")
    assert not any("exit" in name for name in read.tensors) and read.settings.bf16
    assert {tensor.dtype for tensor in read.tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("fused", [False, True], ids=["local", "Transformer Engine's names"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_ranks(kind: str, fused: bool, tmp_path: Path) -> None:
    """TP 2 x PP 2, as torch_dist and as one file of each rank: the same model."""
    cfg = make_config(**PLAIN, **KINDS[kind], **TP2, pipeline_model_parallel_size=2)
    for name in ("sharded", "ranks"):
        (tmp_path / name).mkdir()
    run_distributed(4, write_with_core, cfg=cfg, folder=tmp_path / "sharded" / "iter_0000007", is_stacked=True)
    run_distributed(4, write_ranks, cfg=cfg, folder=tmp_path / "ranks" / "iter_0000007", fused=fused)
    finish(tmp_path / "ranks" / "iter_0000007")
    sharded = read_megatron(tmp_path / "sharded" / "iter_0000007")
    ranks = read_megatron(find_megatron(tmp_path / "ranks"))
    assert sharded.model == ranks.model and sharded.tensors.keys() == ranks.tensors.keys()
    for name, tensor in sharded.tensors.items():
        assert torch.equal(tensor.read(), ranks.tensors[name].read()), name


def test_virtual_stages(tmp_path: Path) -> None:
    """PP 2 x VP 2 of one layer each: stage 0 has layers 1 and 3."""
    cfg = make_config(**PLAIN, **KINDS["gpt"])
    run_distributed(1, write_ranks, cfg=cfg, folder=tmp_path / "whole", fused=False)
    whole = load_file(tmp_path / "whole" / "mp_rank_00" / "model_optim_rng.pt")
    args = whole["args"]
    args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size = 2, 2
    for stage in range(2):
        chunks = []
        for chunk in range(2):
            layer = 2 * chunk + stage
            mine = rf"decoder\.layers\.{layer}\."
            state = {re.sub(mine, "decoder.layers.0.", k): v for k, v in whole["model"].items() if re.match(mine, k)}
            if layer == 0:
                state |= {name: value for name, value in whole["model"].items() if name.startswith("embedding.")}
            if layer == 3:
                outside = ("decoder.final_layernorm.", "output_layer.")
                state |= {name: value for name, value in whole["model"].items() if name.startswith(outside)}
                state["output_layer.weight"] = whole["model"]["embedding.word_embeddings.weight"]
            chunks.append(state)
        file = tmp_path / "virtual" / f"mp_rank_00_{stage:03d}" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save({"args": args, "model0": chunks[0], "model1": chunks[1]}, file)
    one, other = read_megatron(tmp_path / "whole").tensors, read_megatron(tmp_path / "virtual").tensors
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].read(), other[name].read()) for name in one)


BRIDGE_MODEL = {
    "_target_": "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider",
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "gated_linear_unit": True, "attention_backend": {"_target_": "megatron.core.enums.AttnBackend", "_args_": [5]},
    "params_dtype": {"_target_": "torch.float32", "_call_": False}, "bias_activation_fusion": True,
    "scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192,
    "vocab_size": VOCAB_SIZE - 1, "num_moe_experts": None, "seq_length": 16, "init_method": None,
}  # fmt: skip


def test_settings_of_megatron_bridge(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = make_config(**PLAIN, **KINDS["llama"])
    folder = tmp_path / "theirs" / "iter_0000007"
    expected = run_distributed(1, write_with_core, cfg=cfg, folder=folder, is_stacked=True)[0]
    finish(folder)
    common = load_file(folder / "common.pt")
    del common["args"]
    torch.save(common, folder / "common.pt")
    assert from_megatron(tmp_path / "theirs", tmp_path / "ours", *NUMBERS) == 2
    assert "does not say what model it holds" in capsys.readouterr().err
    same = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_query_groups",
            "position_embedding_type", "rotary_base", "rotary_percent", "normalization", "qk_layernorm",
            "add_bias_linear", "add_qkv_bias", "hidden_dropout", "attention_dropout")  # fmt: skip
    model = BRIDGE_MODEL | {name: getattr(cfg.model, name) for name in same}
    model |= {"layernorm_epsilon": cfg.model.norm_epsilon, "share_embeddings_and_output_weights": False}
    write = lambda **changes: (folder / "run_config.yaml").write_text(
        yaml.safe_dump({"model": {**model, **changes}, "tokenizer": {"tokenizer_type": "NullTokenizer"}, "train": {}})
    )
    write()
    assert from_megatron(tmp_path / "theirs", tmp_path / "ours", *NUMBERS) == 0
    torch.testing.assert_close(final_logits(tmp_path / "ours"), expected, rtol=1e-4, atol=1e-5)
    for changes, said in (
        ({"num_moe_experts": 8}, "num_experts 8"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "gelu with gated_linear_unit True"),
        ({"high_freq_factor": 2.0}, "RoPE scaling"),
        ({"window_size": [128, 0]}, r"window_size [128, 0]"),
    ):
        write(**changes)
        assert from_megatron(tmp_path / "theirs", tmp_path / "more", *NUMBERS) == 2
        assert said in capsys.readouterr().err


def test_settings_among_the_sharded_objects(tmp_path: Path) -> None:
    """Where core 0.19 keeps them."""
    cfg = make_config(**PLAIN, **KINDS["llama"])
    folder = tmp_path / "iter_0000007"
    run_distributed(1, write_with_core, cfg=cfg, folder=folder, is_stacked=True, common_is_sharded=True)
    (folder / "common.pt").unlink()
    assert read_megatron(folder).model.hidden_size == cfg.model.hidden_size


def test_what_is_written_is_compared_with_its_source(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that change places on their way are found, and nothing is left."""
    assert from_megatron(sharded, tmp_path / "ours") == 0
    piece_of = megatron_writing._piece

    def moved(name: str, tensor: LazyTensor, num_layers: int) -> Any:
        piece = piece_of(name, tensor, num_layers)
        return piece._replace(layer=3 - piece.layer) if "linear_fc2" in name else piece

    monkeypatch.setattr(megatron_writing, "_piece", moved)
    words = ["to-megatron", "--load", str(tmp_path / "ours"), "--output", str(tmp_path / "back")]
    assert convert(words) == 2
    assert "differs from its source" in capsys.readouterr().err
    assert not list((tmp_path / "back").iterdir())
    assert convert([*words, "--skip-comparison"]) == 0


class Attack:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self._marker}",)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron") / "iter_0000007"
    cfg = make_config(**PLAIN, **KINDS["llama"])
    run_distributed(1, write_with_core, cfg=cfg, folder=folder, is_stacked=True)
    finish(folder)
    return folder.parent


@pytest.mark.parametrize("file", ["common.pt", ".metadata", "mp_rank_00/model_optim_rng.pt"])
def test_nothing_in_a_file_is_executed(file: str, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    marker = tmp_path / "attacked"
    shutil.copytree(sharded, tmp_path / "theirs")
    path = tmp_path / "theirs" / "iter_0000007" / file
    if file == ".metadata":
        path.write_bytes(pickle.dumps([read_metadata(path.parent), Attack(marker)]))
    else:
        if file != "common.pt":
            shutil.rmtree(path.parent.parent)
            path.parent.mkdir(parents=True)
        torch.save({"args": Attack(marker), "model": {}}, path, pickle_module=pickle)
    assert from_megatron(tmp_path / "theirs", tmp_path / "ours", *NUMBERS) == 2
    assert "is not loaded: it asks for" in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "ours").exists()


def test_what_is_not_supported_or_does_not_fit_is_said(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(sharded, tmp_path / "theirs")
    file = tmp_path / "theirs" / "iter_0000007" / "common.pt"
    common = load_file(file)
    args = vars(common["args"]).copy()
    for changes, said in (
        ({"num_experts": 4, "window_size": (64, 0), "mtp_num_layers": 1}, ("num_experts 4", "window_size", "mtp_num")),
        ({"multi_latent_attention": True}, ("multi_latent_attention True",)),
        ({"position_embedding_type": "yarn"}, ("position_embedding_type yarn",)),
        ({"apply_layernorm_1p": True, "rotary_interleaved": True}, ("apply_layernorm_1p", "rotary_interleaved")),
        ({"untie_embeddings_and_output_weights": False}, ("output_layer.weight has no place in it",)),
        ({"qk_layernorm": True}, ("decoder.layers.0.self_attention.q_layernorm.weight is missing", "and 3 more")),
        ({"ffn_hidden_size": 40}, ("mlp.linear_fc1.weight has the shape [96, 32], not [80, 32]",)),
        ({"num_layers": 3}, ("has 4 layers, by the settings 3",)),
        ({"hidden_size": None}, ("do not say hidden_size",)),
    ):  # fmt: skip
        torch.save({**common, "args": argparse.Namespace(**{**args, **changes})}, file)
        assert from_megatron(tmp_path / "theirs", tmp_path / "ours") == 2
        printed = capsys.readouterr().err
        assert all(part in printed for part in said), (changes, printed)
        assert not (tmp_path / "ours").exists()
    gelu = argparse.Namespace(**{**args, "swiglu": False, "add_bias_linear": True, "bias_gelu_fusion": True})
    assert model_config(gelu).openai_gelu  # the fused one is the approximation


def test_folders_that_hold_something_else(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ours = old_checkpoint("norm_mlp", tmp_path / "ours")
    for load, said in ((ours, "is a checkpoint of this project already"), (tmp_path, "holds no checkpoint"),
                       (sharded / "nowhere", "holds no checkpoint")):  # fmt: skip
        assert from_megatron(load, tmp_path / "more") == 2
        assert said in capsys.readouterr().err
    assert from_megatron(sharded, tmp_path / "more", "--load-iteration", "9") == 2
    assert "iter_0000009 holds no checkpoint of Megatron-LM" in capsys.readouterr().err
    assert from_megatron(sharded, tmp_path / "more", "--tokenizer-type", "HuggingFaceTokenizer") == 2
    assert "give --tokenizer-type and --tokenizer-model" in capsys.readouterr().err


def test_exits_are_added_and_tuned(sharded: Path, tmp_path: Path) -> None:
    data = write_token_files(tmp_path, VOCAB_SIZE)
    assert from_megatron(sharded, tmp_path / "base") == 0
    exits = ["--exit-layer-nums", "2", "--use-exit-norm", "--use-exit-mlp", "--untie-exit-output-weights"]
    words = ["add-exits", "--load", str(tmp_path / "base"), "--save", str(tmp_path / "added"), *exits]
    assert convert(words) == 0
    model = read_description(checkpoint_folder(tmp_path / "added")).model
    cfg = make_training_config(
        data, tmp_path / "run", load=str(tmp_path / "added"), save=str(tmp_path / "tuned"), finetune=True,
        tune_exit=True, tune_exit_pipeline_parallel_size=1, train_iters=2, exit_layer_nums=(2,),
        exit_layer_weight=(1.0,), use_exit_norm=True, use_exit_mlp=True, untie_exit_output_weights=True,
    )  # fmt: skip
    run_distributed(1, training_run, cfg=replace(cfg, model=model))
    losses = [json.loads(line).get("exit_loss/layer_2") for line in (tmp_path / "run/metrics.jsonl").open()]
    assert len(losses) == 2
    said = [
        run_distributed(1, head_logits, folder=tmp_path / name, tokens=TOKENS)[0] for name in ("base", "added", "tuned")
    ]
    assert torch.equal(said[0]["final"], said[2]["final"])
    assert not torch.equal(said[1]["exit_2"], said[2]["exit_2"])
