"""Checkpoints of the original EE-LLM: logits at every exit are those that the original computes."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.early_exit.checkpoint.convert_command import main
from megatron.early_exit.checkpoint.legacy import read_legacy
from megatron.early_exit.checkpoint.legacy_settings import model_config
from tests.distributed.engines import head_logits
from tests.distributed.workers import run_distributed
from tests.legacy_files import VOCAB_SIZE, LegacyModel, legacy_checkpoint

VARIANTS = ("tied", "norm", "mlp", "tp2", "pp4tied")
NUMBERS = ("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE - 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_head_says_what_the_original_says(variant: str, tmp_path: Path) -> None:
    save = tmp_path / "ours"
    assert main(["from-legacy", "--load", str(legacy_checkpoint(variant)), "--save", str(save), *NUMBERS]) == 0
    expected = np.load(legacy_checkpoint(variant) / "expected_logits.npz")
    tokens, positions = expected["tokens"].tolist(), expected["positions"]
    tp_size = 2 if variant == "tp2" else 1
    (said,) = run_distributed(1, head_logits, folder=save, tokens=tokens, tp_size=tp_size)
    assert set(said) == {"exit_2", "exit_3", "final"}
    for name, logits in said.items():
        ours, theirs = logits.numpy()[:, positions, : VOCAB_SIZE - 1], expected[name][..., : VOCAB_SIZE - 1]
        assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max(), name


class Attack:
    def __reduce__(self) -> tuple:
        return os.system, ("touch attacked",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "iter_0000001" / "mp_rank_00"
    folder.mkdir(parents=True)
    torch.save({"args": Attack(), "model": {}}, folder / "model_optim_rng.pt", pickle_module=pickle)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    assert main(["from-legacy", "--load", str(tmp_path), "--save", str(tmp_path / "ours"), *NUMBERS]) == 2
    assert "holds more than weights and settings" in capsys.readouterr().err
    assert not Path("attacked").exists() and not (tmp_path / "ours").exists()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    shutil.copytree(legacy_checkpoint("pp4tied"), tmp_path / "a")
    folder = tmp_path / "a" / "iter_0000002"
    (folder / "mp_rank_00_002" / "model_optim_rng.pt").unlink()
    with pytest.raises(OSError, match="mp_rank_00_002.*cannot be read"):
        read_legacy(folder)
    shutil.rmtree(folder / "mp_rank_00_002")
    with pytest.raises(FileNotFoundError, match=r"lacks the files of .pipeline stage, tensor rank. \[\(2, 0\)\]"):
        read_legacy(folder)
    shutil.rmtree(folder / "mp_rank_00_003")
    with pytest.raises(OSError, match="holds 2 of 4 layers: a checkpoint of partial tuning"):
        read_legacy(folder)
    shutil.copytree(legacy_checkpoint("tp2"), tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "iter_0000002" / "mp_rank_01")
    with pytest.raises(FileNotFoundError, match="saved by 2 tensor-parallel ranks; found are 1"):
        read_legacy(tmp_path / "b" / "iter_0000002")
    half = legacy_checkpoint("mlp").joinpath("iter_0000002", "mp_rank_00", "model_optim_rng.pt").read_bytes()[:100_000]
    (tmp_path / "c" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "c" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(half)
    with pytest.raises(OSError, match="it may be damaged"):
        read_legacy(tmp_path / "c")


def test_a_missing_tokenizer_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["from-legacy", "--load", str(legacy_checkpoint("tied")), "--save", str(tmp_path)]
    assert main([*words, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "/nowhere"]) == 2
    assert "which is not here; give --tokenizer-type" in capsys.readouterr().err


def test_what_our_model_does_not_have_is_not_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = LegacyModel.of_fixture("norm")
    model.ranks[0]["layers.2.self_attention.lora.weight"] = torch.ones(4)
    with pytest.raises(
        ValueError, match="holds tensors that its settings do not name: .*lora.weight of pipeline stage 0"
    ):
        read_legacy(model.save(tmp_path / "lora", num_stages=2) / "iter_0000007")
    model = LegacyModel.of_fixture("norm")
    model.args.retro_add_retriever = True
    with pytest.raises(ValueError, match="not supported: retro_add_retriever True"):
        read_legacy(model.save(tmp_path / "retro") / "iter_0000007")
    model = LegacyModel.of_fixture("norm")
    model.ranks[0]["layers.2.self_attention.dense.bias"] = torch.ones(64)
    folder = model.save(tmp_path / "bias")
    assert main(["from-legacy", "--load", str(folder), "--save", str(tmp_path / "ours"), *NUMBERS]) == 2
    message = "decoder.layers.1.self_attention.linear_proj.bias has no place in it"
    assert message in capsys.readouterr().err and not (tmp_path / "ours").exists()
    model = LegacyModel.of_fixture("norm")
    model.args.hidden_size = 128
    folder = model.save(tmp_path / "size")
    assert main(["from-legacy", "--load", str(folder), "--save", str(tmp_path / "ours"), *NUMBERS]) == 2
    assert "embedding.word_embeddings.weight has the shape [128, 64], not [128, 128]" in capsys.readouterr().err


def test_the_fused_gelu_is_an_approximation() -> None:
    """As the original's kernel of bias and GELU computes it."""
    from megatron.core.fusions.fused_bias_gelu import bias_gelu

    args = LegacyModel.of_fixture("norm").args
    args.swiglu, args.add_bias_linear, args.bias_gelu_fusion = False, True, True
    assert model_config(args).openai_gelu
    args.bias_gelu_fusion = False
    assert not model_config(args).openai_gelu
    values = torch.linspace(-4, 4, 101)
    fused = bias_gelu(torch.zeros(()), values)
    gelu = torch.nn.functional.gelu
    assert (fused - gelu(values, approximate="tanh")).abs().max() < 1e-6 < (fused - gelu(values)).abs().max()
