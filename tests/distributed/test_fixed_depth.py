"""Exits as plain models of `transformers`, and LayerSkip's exits through the final norm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.early_exit.checkpoint.convert_command import main
from tests.distributed.engines import head_logits
from tests.distributed.test_conversion import (
    EXIT_FLAGS,
    MODELS,
    TOKENS,
    assert_same_logits,
    convert,
    random_model,
    their_logits,
    write_with_exits,
)
from tests.distributed.workers import run_distributed


@pytest.mark.parametrize(("name", "head"), [
    ("llama", "untied_norm"), ("llama", "mlp"), ("llama", "block"), ("llama", "pre_exit"),
    ("llama tied, no groups", "untied_norm"), ("llama 3", "block"), ("mistral", "mlp"), ("qwen2", "pre_exit"),
    ("qwen3", "block"), ("gpt2", "mlp"), ("gpt2", "block"), ("gpt2 untied", "untied_norm"),
    ("llama", "mixed"),
])  # fmt: skip
def test_an_exit_is_a_plain_model(
    name: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import transformers

    write_with_exits(name, EXIT_FLAGS[head], (1, 2, 3) if head == "mixed" else (2, 3), tmp_path, monkeypatch)
    logits = run_distributed(1, head_logits, folder=tmp_path / "exits", tokens=TOKENS)[0]
    capsys.readouterr()
    for layer in (2, 3):
        folder = tmp_path / f"exit_{layer}"
        convert("to-hf", "--load", tmp_path / "exits", "--output", folder, "--exit", layer)
        assert "logits of 48 sample tokens are those of transformers" in capsys.readouterr().out
        assert_same_logits(logits[f"exit_{layer}"][..., :93], their_logits(folder))
        config = transformers.AutoConfig.from_pretrained(folder)
        assert config.num_hidden_layers == layer + ("block" in head) - ("pre" in head)
        assert config.model_type == MODELS[name][0] and not hasattr(config, "early_exits")
        assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab()["w7"] == 7


def test_temperatures_and_types(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from tests.configs import make_config
    from tests.distributed.test_added_exits import save

    heads = {"use_exit_norm": True, "exit_layer_temperature": (0.3, 3.0), "max_position_embeddings": 64}
    run_distributed(1, save, cfg=make_config(**heads), folder=tmp_path / "ours")
    tokens = [[1, 2, 3, 4, 5]]
    expected = run_distributed(1, head_logits, folder=tmp_path / "ours", tokens=tokens)[0]["exit_2"][0]
    import transformers

    for dtype, tolerance in (("fp32", 1e-4), ("bf16", 3e-2)):
        words = ("--load", tmp_path / "ours", "--output", tmp_path / dtype, "--exit", 2, "--dtype", dtype)
        convert("to-hf", *words)
        assert "are those of transformers" in capsys.readouterr().out
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype=torch.float32)
        logits = model(torch.tensor(tokens)).logits[0]
        assert (logits - expected[:, : logits.size(-1)]).abs().max() < tolerance * expected.abs().max()


def test_exits_without_a_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    write_with_exits("llama", ("--untie-exit-output-weights",), (1, 2), tmp_path, monkeypatch)
    words = ("to-hf", "--load", str(tmp_path / "exits"), "--output", str(tmp_path / "out"))
    assert main([*words, "--exit", "2"]) == 2
    assert "the exit has no norm, and all architectures have one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--exit", "2", "--unit-norm"]) == 0
    assert "choices of 48 sample tokens" in capsys.readouterr().out
    logits = run_distributed(1, head_logits, folder=tmp_path / "exits", tokens=TOKENS)[0]["exit_2"][..., :93]
    theirs = their_logits(tmp_path / "out")
    assert torch.equal(logits.argsort(-1)[..., -3:], theirs.argsort(-1)[..., -3:])
    assert (logits - theirs).abs().max() > 1e-2 * logits.abs().max()


@pytest.mark.parametrize(("flags", "words", "message"), [
    (("--use-exit-norm",), ("--exit", "3"), "the model has no such exit; its exits are [1, 2]"),
    (("--use-exit-norm", "--pre-exit"), ("--exit", "1"), "the exit comes before the first layer"),
    (("--use-exit-norm",), ("--unit-norm",), "--unit-norm is for --exit"),
])  # fmt: skip
def test_what_no_architecture_expresses(
    flags: tuple, words: tuple, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    write_with_exits("llama", flags, (1, 2), tmp_path, monkeypatch)
    assert main(["to-hf", "--load", str(tmp_path / "exits"), "--output", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_gpt2_exits_without_a_norm_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_with_exits("gpt2", (), (2,), tmp_path, monkeypatch)
    words = ("to-hf", "--load", tmp_path / "exits", "--output", tmp_path / "out", "--exit", 2, "--unit-norm")
    assert main([str(word) for word in words]) == 2
    assert "which as LayerNorm changes the choice of tokens" in capsys.readouterr().err


def test_layer_skip(tmp_path: Path) -> None:
    """Every layer is an exit through the final norm and the model's output, as transformers exits early."""
    import transformers

    random_model("llama", {"tie_word_embeddings": False}, tmp_path / "theirs")
    convert("from-hf", "--input", tmp_path / "theirs", "--save", tmp_path / "ours")
    words = ("--load", tmp_path / "ours", "--save", tmp_path / "exits", "--exit-layer-nums", 1, 2, 3)
    convert("add-exits", *words, "--use-exit-norm")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    with torch.no_grad():
        states = model(torch.tensor(TOKENS), output_hidden_states=True).hidden_states
        expected = [model.lm_head(model.model.norm(states[layer])) for layer in (1, 2, 3)]
    logits = run_distributed(1, head_logits, folder=tmp_path / "exits", tokens=TOKENS)[0]
    for layer, theirs in zip((1, 2, 3), expected, strict=True):
        assert_same_logits(logits[f"exit_{layer}"][..., :93], theirs)
    # The model that drafts in `generate(assistant_early_exit=2)` is the exit as a plain model.
    convert("to-hf", "--load", tmp_path / "exits", "--output", tmp_path / "draft", "--exit", 2)
    draft = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    ids, settings = torch.tensor([TOKENS[0][:12]]), {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False}
    plain = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, assistant_early_exit=2, **settings), plain)
    assert torch.equal(model.generate(ids, assistant_model=draft, **settings), plain)
