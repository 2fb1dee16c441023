"""Exits that are added to a checkpoint, replaced and removed; and what the conversion refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron.early_exit.checkpoint import writing
from megatron.early_exit.checkpoint.convert_command import main
from megatron.early_exit.checkpoint.store import read_checkpoint
from megatron.early_exit.checkpoint.tensors import Tensors
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.run import RunConfig
from tests.configs import make_config
from tests.distributed.engines import head_logits
from tests.distributed.test_conversion import EXIT_FLAGS, MODELS, random_model
from tests.distributed.workers import run_distributed
from tests.reference_checkpoint import HEADS, STYLES

TOKENS = [[(5 * i + j * j) % 95 for j in range(12)] for i in range(2)]


def save(cfg: RunConfig, folder: Path) -> None:
    """A checkpoint of weights as training writes it."""
    from megatron.early_exit.config.checkpoint import CheckpointConfig
    from megatron.early_exit.training.saving import CheckpointSaver
    from megatron.early_exit.training.state import TrainingState
    from tests.configs import VOCAB_SIZE
    from tests.distributed.parallel_model import build_with_reference_parameters, layout

    settings = CheckpointConfig(save=str(folder), no_save_optim=True, no_save_rng=True)
    cfg = replace(cfg, checkpoint=settings).resolved(VOCAB_SIZE)
    with layout(cfg):
        model = build_with_reference_parameters(cfg, wrap_with_ddp=False)
        CheckpointSaver(cfg).save(model, None, None, TrainingState())


def plain(folder: Path, style: str = "llama") -> Path:
    """A trained model without exits."""
    run_distributed(1, save, cfg=make_config(exit_layer_nums=(), exit_layer_weight=(), **STYLES[style]), folder=folder)
    return folder


def run(*words: object) -> int:
    return main([str(word) for word in words])


def read(folder: Path) -> tuple[ExitConfig, Tensors]:
    description, tensors = read_checkpoint(checkpoint_folder(folder))
    return description.exits, tensors


def stored(folder: Path) -> dict[str, tuple | None]:
    """All that lies in a checkpoint, with shapes."""
    metadata = FileSystemReader(checkpoint_folder(folder)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) if hasattr(entry, "size") else None for name, entry in metadata.items()}


@pytest.mark.parametrize(
    ("head", "style"), [*((head, "llama") for head in HEADS), *(("block", style) for style in STYLES)]
)
def test_the_parameters_are_those_of_a_model_trained_with_exits(head: str, style: str, tmp_path: Path) -> None:
    plain(tmp_path / "plain", style)
    layers = (1, 2, 3) if head == "mixed" else (1, 3)
    cfg = make_config(exit_layer_nums=layers, exit_layer_weight=(), **HEADS[head], **STYLES[style])
    run_distributed(1, save, cfg=cfg, folder=tmp_path / "trained")
    words = (
        "--load",
        tmp_path / "plain",
        "--save",
        tmp_path / "added",
        "--exit-layer-nums",
        *layers,
        *EXIT_FLAGS[head],
    )
    assert run("add-exits", *words) == 0
    assert stored(tmp_path / "added") == stored(tmp_path / "trained")
    assert read(tmp_path / "added")[0] == cfg.exits
    said = run_distributed(1, head_logits, folder=tmp_path / "added", tokens=TOKENS)[0]
    final = run_distributed(1, head_logits, folder=tmp_path / "plain", tokens=TOKENS)[0]["final"]
    assert torch.equal(said["final"], final) and said["exit_1"].isfinite().all()


def test_a_copied_mlp_branch_is_the_layer_itself(tmp_path: Path) -> None:
    plain(tmp_path / "plain")
    words = ("--load", tmp_path / "plain", "--exit-layer-nums", 1, 2, 3, "--use-exit-norm")
    assert run("add-exits", *words, "--save", tmp_path / "mlp", "--use-exit-mlp") == 0
    assert run("add-exits", *words, "--save", tmp_path / "norm") == 0
    branch, after_layer = (
        run_distributed(1, head_logits, folder=tmp_path / name, tokens=TOKENS)[0] for name in ("mlp", "norm")
    )
    for name in ("exit_1", "exit_2", "exit_3"):
        assert (branch[name] - after_layer[name]).abs().max() < 1e-5 * after_layer[name].abs().max()
    # The norm and the output are those of the model: an exit after the last layer would be the final head.
    assert run("add-exits", *words[:2], "--exit-layer-nums", 4, "--use-exit-norm", "--save", tmp_path / "last") == 0
    said = run_distributed(1, head_logits, folder=tmp_path / "last", tokens=TOKENS)[0]
    assert (said["exit_4"] - said["final"]).abs().max() < 1e-5 * said["final"].abs().max()


def test_parts_are_copied_or_drawn(tmp_path: Path) -> None:
    plain(tmp_path / "plain", "gpt2")
    words = ("--load", tmp_path / "plain", "--exit-layer-nums", 2, *EXIT_FLAGS["block"])
    assert run("add-exits", *words, "--save", tmp_path / "copy") == 0
    for name in ("random", "again"):
        assert run("add-exits", *words, "--init", "random", "--save", tmp_path / name) == 0
    assert run("add-exits", *words, "--init", "random", "--seed", 7, "--save", tmp_path / "other") == 0
    (_, original), (_, copy), (_, drawn), (_, again), (_, other) = (
        read(tmp_path / name) for name in ("plain", "copy", "random", "again", "other")
    )
    head = "decoder.layers.1.exit_head."
    names = [name for name in copy if name.startswith(head)]
    for name in names:
        part = name.removeprefix(head)
        source = part.replace("block.", "decoder.layers.3.", 1).replace("norm.", "decoder.final_layernorm.", 1)
        if part.startswith("block."):
            source = part.replace("block.", "decoder.layers.3.", 1)
        if part == "output_layer.weight":
            source = "embedding.word_embeddings.weight"
        assert torch.equal(copy[name].read(), original[source].read()), name
        value = drawn[name].read()
        assert torch.equal(value, again[name].read())
        if part.endswith("bias"):
            assert not value.any()
        elif "norm" in part:
            assert (value == 1).all()
        else:
            narrow = part.endswith(("linear_proj.weight", "linear_fc2.weight"))
            assert value.std() == pytest.approx(0.02 / (8**0.5 if narrow else 1), rel=0.15)
            assert not torch.equal(value, other[name].read())


def test_exits_are_kept_replaced_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plain(tmp_path / "plain")
    norm = ("--use-exit-norm", "--use-exit-mlp")
    first = ("--exit-layer-nums", 3, *norm, "--init", "random")
    assert run("add-exits", "--load", tmp_path / "plain", "--save", tmp_path / "one", *first) == 0
    assert run("add-exits", "--load", tmp_path / "one", "--save", tmp_path / "x", *first) == 2
    assert "layers [3] have exits; --replace" in capsys.readouterr().err
    words = ("--load", tmp_path / "one", "--save", tmp_path / "x", "--exit-layer-nums", 1, "--pre-exit")
    assert run("add-exits", *words) == 2
    assert "those at [3] read its output; drop --pre-exit" in capsys.readouterr().err
    words = ("--load", tmp_path / "one", "--save", tmp_path / "two", "--exit-layer-nums", 1, *norm)
    assert run("add-exits", *words) == 0
    words = ("--load", tmp_path / "two", "--save", tmp_path / "new", "--exit-layer-nums", 1, 3, "--replace")
    assert run("add-exits", *words, "--untie-exit-output-weights") == 0
    assert run("remove-exits", "--load", tmp_path / "two", "--save", tmp_path / "left", "--exit-layer-nums", 3) == 0
    assert run("remove-exits", "--load", tmp_path / "two", "--save", tmp_path / "none") == 0
    (_, original), (_, one) = read(tmp_path / "plain"), read(tmp_path / "one")
    exits, two = read(tmp_path / "two")
    assert exits.exit_layer_nums == (1, 3) and exits.use_exit_mlp
    assert all(torch.equal(two[name].read(), tensor.read()) for name, tensor in one.items())
    exits, new = read(tmp_path / "new")
    assert exits.untie_exit_output_weights and not exits.use_exit_mlp
    assert sum("exit_head" in name for name in new) == 2
    exits, left = read(tmp_path / "left")
    assert exits.exit_layer_nums == (1,) and {name for name in left if "exit" in name} == {
        name for name in two if "layers.0.exit" in name
    }
    exits, none = read(tmp_path / "none")
    assert exits == ExitConfig() and set(none) == set(original)
    assert all(torch.equal(none[name].read(), tensor.read()) for name, tensor in original.items())
    assert run("remove-exits", "--load", tmp_path / "two", "--save", tmp_path / "x", "--exit-layer-nums", 2) == 2
    assert "no exits at layers [2]; the model has exits at [1, 3]" in capsys.readouterr().err


def test_what_is_there_is_linked_and_stays(tmp_path: Path) -> None:
    import shutil

    plain(tmp_path / "plain")
    before = run_distributed(1, head_logits, folder=tmp_path / "plain", tokens=TOKENS)[0]["final"]
    words = ("--exit-layer-nums", 2, "--use-exit-norm")
    assert run("add-exits", "--load", tmp_path / "plain", "--save", tmp_path / "exits", *words) == 0
    new = checkpoint_folder(tmp_path / "exits")
    assert (new / "linked_0.distcp").stat().st_nlink == 2
    assert (new / "__0_0.distcp").stat().st_size < 5000
    shutil.rmtree(tmp_path / "plain")
    assert torch.equal(run_distributed(1, head_logits, folder=tmp_path / "exits", tokens=TOKENS)[0]["final"], before)


@pytest.mark.parametrize(("words", "message"), [
    (("--exit-layer-nums", 5), "give different layers from 1 to 4"),
    (("--exit-layer-nums", 0), "give different layers from 1 to 4"),
    (("--exit-layer-nums", 2, 2), "give different layers from 1 to 4"),
    (("--exit-layer-nums", 2, "--use-exit-mlp", "--use-exit-block"), "--use-exit-mlp with --use-exit-block (exit 2)"),
    (("--exit-layer-nums", 1, 2, "--use-exit-mlp", "--pre-exit"), "--use-exit-mlp with --pre-exit (exits 1, 2)"),
    (("--exit-layer-nums", 1, 2, 3, "--use-exit-norm", "true", "false"), "has 2 values for 3 exits: give 1 or 3"),
])  # fmt: skip
def test_exits_that_cannot_be(words: tuple, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plain(tmp_path / "plain")
    assert run("add-exits", "--load", tmp_path / "plain", "--save", tmp_path / "x", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_converted_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model("llama", MODELS["llama"][1], tmp_path / "good", max_shard_size="40KB")

    def refused(folder: Path, *words: object) -> str:
        assert run("from-hf", "--input", folder, "--save", tmp_path / "ours", *words) == 2
        assert not (tmp_path / "ours").exists() or not any((tmp_path / "ours").iterdir())
        return capsys.readouterr().err

    def changed(name: str) -> Path:
        import shutil

        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    assert "does not exist" in refused(tmp_path / "nowhere")
    other = changed("other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert "the architecture bert is not supported; supported are llama, mistral, qwen2, qwen3, gpt2" in refused(other)
    rope = {"rope_type": "yarn", "rope_theta": 1e4}
    (other / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    assert "transformers cannot read the settings" in refused(other)
    (other / "config.json").write_text(json.dumps(config | {"rope_parameters": rope | {"factor": 2.0}}))
    assert "rope_type yarn is not supported" in refused(other)
    shards = sorted(path.name for path in other.glob("*.safetensors"))
    (other / "config.json").write_text(json.dumps(config))
    (other / shards[1]).unlink()
    assert f"lacks 1 of {len(shards)} shards: {shards[1]}" in refused(other)
    (other / shards[1]).write_bytes((tmp_path / "good" / shards[1]).read_bytes()[:-10])
    assert "may be damaged or not fully copied" in refused(other)
    no_tokenizer = changed("bare")
    for path in no_tokenizer.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer" in refused(no_tokenizer)
    small = changed("small")
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"much": 500}
    (small / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "the tokenizer has 501 ids, but the model's embedding has 93 rows" in refused(small)
    assert "takes sequences of 1 to 64 tokens" in refused(tmp_path / "good", "--max-position-embeddings", 65)
    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        assert "GiB free, the checkpoint takes" in refused(tmp_path / "good")
    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_description", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("from-hf", "--input", tmp_path / "good", "--save", tmp_path / "ours") == 130
        assert not any((tmp_path / "ours").iterdir())
    capsys.readouterr()
    assert run("from-hf", "--input", tmp_path / "good", "--save", tmp_path / "ours") == 0
    before = (checkpoint_folder(tmp_path / "ours") / ".metadata").read_bytes()
    assert run("from-hf", "--input", tmp_path / "good", "--save", tmp_path / "ours") == 2
    assert "already holds a checkpoint" in capsys.readouterr().err
    assert (checkpoint_folder(tmp_path / "ours") / ".metadata").read_bytes() == before
    assert run("to-hf", "--load", tmp_path / "ours", "--output", tmp_path / "good") == 2
    assert "is not empty" in capsys.readouterr().err
    assert run("to-hf", "--load", tmp_path / "ours", "--output", tmp_path / "x", "--with-exits") == 2
    assert "the model has no exits to write" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("raised", [OSError("the disk is gone"), KeyboardInterrupt()], ids=str)
def test_a_conversion_that_breaks_off_leaves_what_was_there(tmp_path: Path, raised: BaseException) -> None:
    plain(tmp_path / "plain")
    description, tensors = read_checkpoint(checkpoint_folder(tmp_path / "plain"))
    tensors = {name: replace(tensor, origin=None) for name, tensor in tensors.items()}
    writing.write_checkpoint(tmp_path / "x", description, tensors)
    before = stored(tmp_path / "x")

    def read() -> torch.Tensor:
        raise raised

    name = "decoder.final_layernorm.weight"
    broken = tensors | {name: replace(tensors[name], read=read)}
    with pytest.raises(type(raised), match=str(raised)):
        writing.write_checkpoint(tmp_path / "x", description, broken, force=True)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "iter_0000000", "latest_checkpointed_iteration.txt",
    ]  # fmt: skip
    assert stored(tmp_path / "x") == before
    writing.write_checkpoint(tmp_path / "x", description, tensors, force=True)
    assert stored(tmp_path / "x") == before and len(list((tmp_path / "x").iterdir())) == 2


def test_mistral_beyond_its_window(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    random_model("mistral", {"sliding_window": 20}, tmp_path / "theirs")
    words = ("from-hf", "--input", tmp_path / "theirs", "--save", tmp_path / "ours")
    assert run(*words) == 2
    assert "attends to the last 20 tokens only" in capsys.readouterr().err
    assert run(*words, "--max-position-embeddings", 20) == 0


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plain(tmp_path / "plain")
    words = ("--load", tmp_path / "plain", "--save", tmp_path / "exits", "--exit-layer-nums", 1, 3, "--use-exit-norm")
    assert run("add-exits", *words) == 0
    capsys.readouterr()
    assert run("inspect", "--load", tmp_path / "exits", "--tensors") == 0
    text = capsys.readouterr().out
    for part in (
        "4 layers of width 32, as llama of transformers", "96 rows, for tensor parallel sizes up to 32",
        "after layers 1, 3; head = norm + shared output projection", "64 parameters of their own",
        "without training state",
        "decoder.layers.2.exit_head.norm.weight",
    ):  # fmt: skip
        assert part in text
