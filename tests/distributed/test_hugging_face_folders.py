"""Folders of `transformers` as users have them: everything in them is used, or named, or refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.early_exit.checkpoint.accounting import _size
from megatron.early_exit.checkpoint.comparison import Head, compare_logits, compare_tokenizers
from megatron.early_exit.checkpoint.convert_command import main
from megatron.early_exit.checkpoint.families import FAMILIES, standard_model_type
from megatron.early_exit.checkpoint.gguf import complete_gguf_config
from megatron.early_exit.checkpoint.hugging_face import read_hugging_face
from megatron.early_exit.checkpoint.llama_family import llama_to_ours, ours_to_llama
from megatron.early_exit.checkpoint.rotary import llama3_factors
from megatron.early_exit.checkpoint.store import read_checkpoint
from megatron.early_exit.checkpoint.tensors import LazyTensor
from megatron.early_exit.checkpoint.writing import write_checkpoint
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.model import ModelConfig
from tests.distributed.test_conversion import (
    EXIT_FLAGS,
    GPT2,
    LLAMA3_ROPE,
    SIZES,
    convert,
    random_model,
    their_logits,
    write_with_exits,
)
from tests.distributed.workers import run_distributed

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    """None takes a field away."""
    path = folder / name
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def put_weights(folder: Path, weights: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    from safetensors.torch import save_file

    save_file({key: value.clone() for key, value in weights.items()}, folder / name, metadata={"format": "pt"})


def ours(folder: Path) -> dict[str, torch.Tensor]:
    _, tensors = read_checkpoint(checkpoint_folder(folder))
    return {name: tensor.read() for name, tensor in tensors.items()}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def untied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied") / request.param
    random_model(request.param, {"tie_word_embeddings": False}, folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    random_model("llama", {}, tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize("kind", [kind for family in FAMILIES for kind in family.model_types])
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_table_of_shapes_is_that_of_transformers(kind: str, is_tied: bool) -> None:
    import transformers

    family = next(family for family in FAMILIES if kind in family.model_types)
    sizes = {**(GPT2 if kind == "gpt2" else SIZES), "tie_word_embeddings": is_tied}
    if kind == "qwen2":
        sizes |= {"hidden_size": 72, "head_dim": 12}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if is_tied:
        del theirs["lm_head.weight"]
    table = family.shapes(config)
    assert {name: tuple(_size(d, family.sizes(config)) for d in shape) for name, shape in table.items()} == theirs


def test_a_config_that_ties_weights_which_differ(untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = shutil.copytree(untied, tmp_path / "theirs")
    edit(folder, tie_word_embeddings=True)
    expected = their_logits(folder)
    assert torch.equal(expected, their_logits(untied))  # transformers decides so
    convert("from-hf", "--input", folder, "--save", tmp_path / "ours")
    assert "lm_head.weight differs from" in capsys.readouterr().err
    found, weights = ours(tmp_path / "ours"), weights_of(untied)
    assert torch.equal(found[OUTPUT][:93], weights["lm_head.weight"])
    assert not torch.equal(found[OUTPUT], found[EMBEDDING])
    convert("to-hf", "--load", tmp_path / "ours", "--output", tmp_path / "back")
    assert torch.equal(their_logits(tmp_path / "back"), expected)


def test_a_config_that_ties_weights_which_are_equal(untied: Path, tmp_path: Path) -> None:
    weights = weights_of(untied)
    name = next(name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight")))
    for case in ("both", "only the output"):
        folder = shutil.copytree(untied, tmp_path / case)
        edit(folder, tie_word_embeddings=True)
        changed = weights | {"lm_head.weight": weights[name]}
        if case == "only the output":
            del changed[name]
        put_weights(folder, changed)
        source = read_hugging_face(folder)
        assert source.notes == [] and OUTPUT not in source.tensors
        assert torch.equal(source.tensors[EMBEDDING].read(), weights[name])
        assert not source.model.untie_embeddings_and_output_weights


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_key_value_heads": 3}, r"k_proj.weight has the shape \[24, 42\], but config.json says \[36, 42\] "
                                 r"\(num_key_value_heads 3 x head_dim 12, hidden_size 42\).*and 3 more such"),
    ({"hidden_size": 48}, r"embed_tokens.weight has the shape \[93, 42\], but config.json says \[93, 48\]"),
    ({"vocab_size": 100}, r"\[100, 42\] \(vocab_size 100, hidden_size 42\)"),
    ({"intermediate_size": 60}, r"intermediate_size 60"),
    ({"num_hidden_layers": 3}, r"num_hidden_layers is 3, and they go up to layer 4"),
    ({"num_hidden_layers": 5}, r"the weights lack model.layers.4.input_layernorm.weight, .* and 4 more"),
    ({"num_attention_heads": 5}, "42. is not a multiple of the number of attention heads .5"),
    ({"model_type": "qwen2"}, r"the weights lack model.layers.0.self_attn.k_proj.bias"),
    ({"attention_bias": True}, "attention_bias and mlp_bias are not supported|lack .*bias"),
    ({"mlp_bias": True}, "attention_bias and mlp_bias are not supported|lack .*bias"),
    ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic is not"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized .quantization_config: gptq"),
    ({"is_encoder_decoder": True}, "not supported: is_encoder_decoder True"),
], ids=str)  # fmt: skip
def test_settings_that_do_not_fit(
    changes: dict, message: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import re

    edit(llama, **changes)
    assert main(["from-hf", "--input", str(llama), "--save", str(tmp_path / "ours")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(("name", "message"), [
    ("model.layers.1.self_attn.q_proj.bias", "q_proj.bias, which config.json does not name .biases"),
    ("lm_head.bias", "lm_head.bias, which config.json does not name"),
    ("model.layers.4.mlp.up_proj.weight", "num_hidden_layers is 4, and they go up to layer 5"),
    ("model.layers.1.self_attn.q_proj.lora_A.weight", "an adapter: merge it"),
    ("model.layers.1.self_attn.rotary_emb.inv_freq", None),
    ("score.weight", "not part of the model, and left out: score.weight"),
])  # fmt: skip
def test_tensors_that_are_left_over(name: str, message: str | None, llama: Path) -> None:
    put_weights(llama, weights_of(llama) | {name: torch.ones(4)})
    if message is None:
        assert read_hugging_face(llama).notes == []
    elif name == "score.weight":
        assert read_hugging_face(llama).notes == [message]
    else:
        with pytest.raises(ValueError, match=message):
            read_hugging_face(llama)


def test_gpt2_as_older_files_hold_it(tmp_path: Path) -> None:
    """Without a prefix, with causal masks, and with settings of another time."""
    weights = random_model("gpt2", {}, tmp_path / "theirs")
    old = {name.removeprefix("transformer."): value for name, value in weights.items() if name != "lm_head.weight"}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(4)}
    put_weights(tmp_path / "theirs", old)
    edit(tmp_path / "theirs", n_ctx=64, task_specific_params={"text-generation": {"do_sample": True}})
    source = read_hugging_face(tmp_path / "theirs")
    assert source.notes == []
    assert torch.equal(source.tensors[EMBEDDING].read(), weights["transformer.wte.weight"])
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=(torch.bool, torch.uint8)[i % 2]) for i in range(4)}
    put_weights(tmp_path / "theirs", old | masks)
    assert read_hugging_face(tmp_path / "theirs").notes == []
    put_weights(tmp_path / "theirs", old | {"h.0.crossattention.c_attn.weight": torch.ones(4)})
    with pytest.raises(ValueError, match="transformer.h.0.crossattention.c_attn.weight, which config.json does not"):
        read_hugging_face(tmp_path / "theirs")
    edit(tmp_path / "theirs", add_cross_attention=True)
    with pytest.raises(ValueError, match="not supported: add_cross_attention True"):
        read_hugging_face(tmp_path / "theirs")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("is_pickled", [False, True])
def test_only_weights_must_have_a_type_of_weights(llama: Path, dtype: torch.dtype, is_pickled: bool) -> None:
    def put(weights: dict[str, torch.Tensor]) -> None:
        if is_pickled:
            (llama / "model.safetensors").unlink(missing_ok=True)
            torch.save(weights, llama / "pytorch_model.bin")
        else:
            put_weights(llama, weights)

    weights, name = weights_of(llama), "model.layers.1.mlp.up_proj.weight"
    put(weights | {"step": torch.ones(2).to(dtype)})
    assert read_hugging_face(llama).notes == ["not part of the model, and left out: step"]
    put(weights | {name: weights[name].to(dtype)})
    with pytest.raises(ValueError, match=f"{name} has the type {str(dtype)[6:]}, which weights cannot have here"):
        read_hugging_face(llama)


def test_weights_that_are_not_finite(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = weights_of(llama)
    words = ["from-hf", "--input", str(llama), "--save", str(tmp_path / "ours")]
    for value, more in ((torch.nan, []), (torch.inf, []), (1e6, ["--dtype", "fp16"])):
        changed = weights["model.norm.weight"].clone()
        changed[3] = value
        put_weights(llama, weights | {"model.norm.weight": changed})
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert "final_layernorm.weight holds values that are not finite in float" in error and "report" not in error
    assert not list((tmp_path / "ours").glob("iter_*"))
    convert(*words, *more, "--skip-comparison")


def test_settings_without_an_effect_are_named_or_kept(llama: Path) -> None:
    edit(llama, logit_softcap=30.0, unused=None, auto_map={"AutoModelForCausalLM": "other.Other"},
         attention_dropout=0.125, initializer_range=0.03125)  # fmt: skip
    source = read_hugging_face(llama)
    first, second = source.notes
    assert first == "not used, and not by transformers either: logit_softcap of config.json"
    assert "code of its own (auto_map)" in second
    assert source.model.attention_dropout == 0.125 and source.model.init_method_std == 0.03125


def test_windows_of_some_layers(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 20}
    random_model("qwen3", {**windows, "max_window_layers": 2}, tmp_path / "some")
    with pytest.raises(ValueError, match="attends to the last 20 tokens only"):
        read_hugging_face(tmp_path / "some")
    random_model("qwen3", {**windows, "max_window_layers": 4}, tmp_path / "none")
    assert read_hugging_face(tmp_path / "none").notes == []


def test_files_of_which_several_could_be_meant(llama: Path, tmp_path: Path) -> None:
    """As transformers decides: one file, then shards, then pickles."""
    weights = weights_of(llama)
    name = "model.embed_tokens.weight"
    torch.save({key: value + 1 for key, value in weights.items()}, llama / "pytorch_model.bin")
    for shard, half in (("a", list(weights)[::2]), ("b", list(weights)[1::2])):
        put_weights(llama, {key: weights[key] + 2 for key in half}, f"{shard}.safetensors")
    weight_map = {key: "ab"[i % 2] + ".safetensors" for i, key in enumerate(weights)}
    (llama / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = []
    for file, others in (
        ("model.safetensors", "model.safetensors.index.json, pytorch_model.bin"),
        ("model.safetensors.index.json", "pytorch_model.bin"),
        ("pytorch_model.bin", None),
    ):
        source = read_hugging_face(llama)
        found.append(source.tensors[EMBEDDING].read())
        assert source.notes == ([f"{llama / file} is read, as transformers does, and not {others}"] if others else [])
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(llama)
        assert torch.equal(found[-1], theirs.state_dict()[name])
        (llama / file).unlink()
    assert [int((tensor - weights[name]).mean().round()) for tensor in found] == [0, 2, 1]
    with pytest.raises(FileNotFoundError, match="holds no weights: none of model.safetensors, "):
        read_hugging_face(llama)


def test_shards_of_different_versions(llama: Path) -> None:
    weights = weights_of(llama)
    (llama / "model.safetensors").unlink()
    put_weights(llama, weights, "a.safetensors")
    put_weights(llama, {"model.norm.weight": weights["model.norm.weight"]}, "b.safetensors")
    index = llama / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors") | {"x": "b.safetensors"}}))
    with pytest.raises(ValueError, match="model.norm.weight lies in several of the files"):
        read_hugging_face(llama)
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*weights, "x"], "a.safetensors")}))
    with pytest.raises(ValueError, match="names x, which its files do not hold"):
        read_hugging_face(llama)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "../a.safetensors")}))
    with pytest.raises(ValueError, match="names files outside of its folder"):
        read_hugging_face(llama)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors") | {"x": None}}))
    with pytest.raises(
        ValueError, match=r"index.json is damaged: its weight_map names files by other things than text"
    ):
        read_hugging_face(llama)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index.json is not readable as JSON"):
        read_hugging_face(llama)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_were_not_fetched(name: str, llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ValueError, match=f"{name} only points to the weights: run `git lfs pull`"):
        read_hugging_face(llama)
    (llama / name).write_bytes(b"")
    with pytest.raises(OSError, match=f"{name} cannot be read, it may be damaged or not fully copied: [A-Za-z]"):
        read_hugging_face(llama)


class _Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def test_pickles_run_no_code_and_adapters_are_not_left_out(llama: Path, tmp_path: Path) -> None:
    weights = weights_of(llama)
    (llama / "model.safetensors").unlink()
    torch.save(weights | {"x": _Payload(tmp_path / "ran")}, llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than weights, and is not read"):
        read_hugging_face(llama)
    assert not (tmp_path / "ran").exists()
    (llama / "pytorch_model.bin").write_bytes((llama / "pytorch_model.bin").read_bytes()[:5000])
    with pytest.raises(OSError, match="may be damaged"):
        read_hugging_face(llama)
    put_weights(llama, weights)
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        read_hugging_face(llama)


@pytest.mark.parametrize(("name", "head"), [("llama", "block"), ("qwen2", "tied"), ("gpt2", "mlp"), ("llama", "uses")])
def test_exits_survive_saving_in_transformers(
    name: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import transformers

    write_with_exits(name, EXIT_FLAGS[head], (1, 2, 3) if head == "uses" else (1, 3), tmp_path, monkeypatch)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "back", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    shutil.copy(tmp_path / "back/tokenizer.json", tmp_path / "again")
    shutil.copy(tmp_path / "back/tokenizer_config.json", tmp_path / "again")
    again = load(tmp_path / "again", trust_remote_code=True)
    expected = model.state_dict()
    assert any(key.startswith("exits.") for key in expected) or head == "tied"
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    plain = load(tmp_path / "again", trust_remote_code=False)
    assert type(plain) is not type(again) and torch.equal(plain.lm_head.weight, model.lm_head.weight)
    capsys.readouterr()
    convert("from-hf", "--input", tmp_path / "again", "--save", tmp_path / "returned")
    first, _ = read_checkpoint(checkpoint_folder(tmp_path / "exits"))
    returned, _ = read_checkpoint(checkpoint_folder(tmp_path / "returned"))
    assert returned.exits == first.exits and "left out" not in capsys.readouterr().err
    before, after = ours(tmp_path / "exits"), ours(tmp_path / "returned")
    rows = lambda key, value: value[:93] if key.endswith("output_layer.weight") else value  # without padding
    assert set(before) == set(after)
    assert all(torch.equal(rows(key, before[key]), rows(key, after[key])) for key in before)


def test_exits_of_older_folders_and_damaged_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_with_exits("llama", EXIT_FLAGS["untied_norm"], (2,), tmp_path, monkeypatch)
    weights = weights_of(tmp_path / "back")
    exits = {name.removeprefix("exits."): value for name, value in weights.items() if name.startswith("exits.")}
    plain = {name: value for name, value in weights.items() if not name.startswith("exits.")}
    assert sorted(exits) == ["0.norm.weight", "0.output.weight"]
    put_weights(tmp_path / "back", plain)
    put_weights(tmp_path / "back", exits, "exits.safetensors")
    source = read_hugging_face(tmp_path / "back")
    name = "decoder.layers.1.exit_head.norm.weight"
    assert torch.equal(source.tensors[name].read(), exits["0.norm.weight"]) and source.exits.exit_layer_nums == (2,)
    path = tmp_path / "back/config.json"
    config = json.loads(path.read_text())
    del config["early_exits"]["uses"]
    for part in ("block", "mlp", "norm", "own_output"):  # one value for all exits, as they once had
        (config["early_exits"][part],) = config["early_exits"][part]
    path.write_text(json.dumps(config))
    assert read_hugging_face(tmp_path / "back").exits == source.exits
    put_weights(tmp_path / "back", exits | {"1.norm.weight": torch.ones(42)}, "exits.safetensors")
    with pytest.raises(ValueError, match="exits.1.norm.weight has the shape .42,., expected no such parameter"):
        read_hugging_face(tmp_path / "back")
    put_weights(tmp_path / "back", {"0.norm.weight": torch.ones(42)}, "exits.safetensors")
    with pytest.raises(ValueError, match="exits.0.output.weight .* it is missing"):
        read_hugging_face(tmp_path / "back")


def write_gguf(file: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    import gguf

    file.unlink(missing_ok=True)
    writer = gguf.GGUFWriter(str(file), "llama")
    for name, value in {
        "context_length": 64, "embedding_length": 48, "block_count": 1, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 12, "vocab_size": 93,
        **settings,
    }.items():  # fmt: skip
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, tensor in {"token_embd.weight": torch.zeros(93, 48), **tensors}.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_rope(file: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    import transformers

    write_gguf(file, settings, tensors or {})
    config = transformers.LlamaConfig(head_dim=12)
    complete_gguf_config(file, config)
    return dict(config.rope_parameters)


def test_settings_of_gguf_files_that_transformers_drops(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    assert gguf_rope(file, {})["rope_type"] == "default"
    linear = gguf_rope(file, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert (linear["rope_type"], linear["factor"]) == ("linear", 4.0)
    rope = LLAMA3_ROPE | {"rope_theta": 10000.0}
    scaled = gguf_rope(file, {}, {"rope_freqs.weight": llama3_factors(rope, 12)})
    assert scaled == rope
    for settings, tensors, message in (
        ({}, {"rope_freqs.weight": torch.linspace(1, 32, 6)}, "rope_freqs.weight is not that of Llama 3.1"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, "rope.scaling.type yarn is not supported"),
        ({"logit_scale": 0.5}, {}, "would be left out: llama.logit_scale 0.5"),
        ({"attention.sliding_window": 32}, {}, "llama.attention.sliding_window 32"),
        ({"attention.key_length": 16}, {}, "heads of different widths"),
        ({}, {"blk.0.attn_q.bias": torch.ones(48)}, "would be left out: blk.0.attn_q.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            gguf_rope(file, settings, tensors)


def test_the_factors_of_llama_3_are_those_of_transformers() -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(head_dim=64, rope_parameters=LLAMA3_ROPE)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = LLAMA3_ROPE["rope_theta"] ** (-torch.arange(0, 64, 2).float() / 64)
    assert torch.allclose(plain / scaled, llama3_factors(LLAMA3_ROPE, 64), rtol=1e-4)


def test_added_tokens_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The [PAD] of many fine-tunes lies behind the last row of the embedding: it gets one, and is never said."""
    import transformers

    random_model("gpt2", {"tie_word_embeddings": False, "vocab_size": 93}, tmp_path / "theirs")
    weights = weights_of(tmp_path / "theirs")
    # All logits are below 0, that of a row of zeros.
    weights["lm_head.weight"] = weights["lm_head.weight"] * 0 + torch.linspace(-2, -1, 93)[:, None]
    weights["transformer.ln_f.weight"].zero_()
    weights["transformer.ln_f.bias"].fill_(1.0)
    put_weights(tmp_path / "theirs", weights)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "theirs")
    words = ("from-hf", "--input", tmp_path / "theirs", "--save", tmp_path / "ours")
    convert(*words, "--make-vocab-size-divisible-by", 31)
    assert "1 added token(s) that the model has no row for ([PAD]): rows of zeros are added" in capsys.readouterr().err
    found = ours(tmp_path / "ours")
    assert found[OUTPUT].shape[0] == 124 and not found[OUTPUT][93:].any()
    assert greedy(tmp_path / "ours") == [92] * 3
    convert("to-hf", "--load", tmp_path / "ours", "--output", tmp_path / "back")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").vocab_size == 93
    # With a row that says something, it is a token as any other, and is not lost on the way back.
    changed, weight = dict(found), found[OUTPUT].clone()
    weight[93] = 0.5
    write(tmp_path / "ours", tmp_path / "trained", {**changed, OUTPUT: weight})
    assert greedy(tmp_path / "trained") == [93] * 3
    convert("to-hf", "--load", tmp_path / "trained", "--output", tmp_path / "again")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert model.config.vocab_size == 94 and torch.equal(model.lm_head.weight, weight[:94])


def write(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The checkpoint `source` with other parameters."""
    description, _ = read_checkpoint(checkpoint_folder(source))
    write_checkpoint(target, description, {name: LazyTensor.of(tensor) for name, tensor in tensors.items()})


def greedy(folder: Path) -> list[int]:
    """Three tokens."""
    return run_distributed(1, _greedy, folder=folder)[0]


def _greedy(folder: Path) -> list[int]:
    from megatron.early_exit.inference.llm import LLM
    from megatron.early_exit.inference.params import GenerationParams

    answer = LLM.load(str(folder)).generate([[1, 2, 3]], GenerationParams(max_tokens=3, ignore_eod=True))[0]
    return [token.token for token in answer.tokens]


def test_the_tokenizer_of_another_model(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also where the padding of the vocabulary has room for its ids."""
    tokenizer = json.loads((llama / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"much": 100}
    (llama / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["from-hf", "--input", str(llama), "--save", str(tmp_path / "ours")]) == 2
    assert "the tokenizer has 101 ids, but the model's embedding has 93 rows" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "change"), [
    ("model.layers.2.mlp.up_proj.weight", "one value"), ("model.embed_tokens.weight", "one value"),
    ("model.norm.weight", "all values"),
])  # fmt: skip
def test_what_went_wrong_is_not_called_done(
    name: str, change: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A conversion that loses something in either direction is refused by the comparison, and leaves nothing."""
    convert("from-hf", "--input", llama, "--save", tmp_path / "ours")
    assert (
        "compared: weights, tokenizer; logits of 48 sample tokens are those of transformers" in capsys.readouterr().out
    )

    def damaged(tensor: LazyTensor) -> LazyTensor:
        def damage(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value.view(-1)[: 1 if change == "one value" else None] += 0.5
            return value

        return tensor.then(tensor.shape, damage)

    theirs, ours = ours_to_llama, llama_to_ours
    lossy = {
        "theirs": lambda tensors, model: (found := theirs(tensors, model)) | {name: damaged(found[name])},
        "ours": lambda tensors, model: ours(tensors | {name: damaged(tensors[name])}, model),
    }
    for side, words in (
        ("theirs", ("to-hf", "--load", tmp_path / "ours", "--output", tmp_path / "theirs_x")),
        ("ours", ("from-hf", "--input", llama, "--save", tmp_path / "ours_x")),
    ):
        with monkeypatch.context() as patch:
            families = [replace(family, **{side: lossy[side]}) for family in FAMILIES[:1]]
            patch.setattr("megatron.early_exit.checkpoint.families.FAMILIES", tuple(families))
            status = main([str(word) for word in words])
            message = capsys.readouterr().err
            assert status == 2 and "the conversion went wrong" in message
            folder = tmp_path / f"{side}_x"
            assert not (folder / "config.json").exists() and not list(folder.glob("iter_*"))
            assert main([str(word) for word in (*words, "--skip-comparison", "--force")]) == 0
            assert "not compared with its source" in capsys.readouterr().out


def test_models_that_do_not_fit_into_memory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("megatron.early_exit.checkpoint.comparison.free_main_memory_bytes", lambda: 2**10)
    convert("from-hf", "--input", llama, "--save", tmp_path / "ours")
    assert "compared: weights, tokenizer; logits not compared: that takes" in capsys.readouterr().out


def test_all_chat_templates_are_kept(llama: Path, tmp_path: Path) -> None:
    import transformers

    (llama / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates/tool_use.jinja").write_text("tools: {{ messages[0].content }}")
    convert("from-hf", "--input", llama, "--save", tmp_path / "ours")
    convert("to-hf", "--load", tmp_path / "ours", "--output", tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back").chat_template
    assert back == {"default": "{{ messages[0].content }}", "tool_use": "tools: {{ messages[0].content }}"}


def test_tokenizers_that_differ(llama: Path, tmp_path: Path) -> None:
    other = shutil.copytree(llama, tmp_path / "other")
    compare_tokenizers(other, llama)
    edit(other, "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="chat template are"):
        compare_tokenizers(other, llama)
    other = shutil.copytree(llama, tmp_path / "another")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["w0"], vocab["w1"] = vocab["w1"], vocab["w0"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="ids of 'The quick brown fox"):
        compare_tokenizers(other, llama)
    other = shutil.copytree(llama, tmp_path / "third")
    edit(other, "generation_config.json", eos_token_id=[92, 5])
    with pytest.raises(ValueError, match="ends of generation are .5, 92., not .92."):
        compare_tokenizers(other, llama)


def test_a_gguf_file_is_the_model_of_transformers(tmp_path: Path) -> None:
    """Also with the scaling of rotary positions that its reader drops."""
    import transformers

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.3 * torch.randn(shape, generator=generator)
    shapes = {
        "attn_q": (48, 48), "attn_k": (24, 48), "attn_v": (24, 48), "attn_output": (48, 48), "ffn_gate": (64, 48),
        "ffn_up": (64, 48), "ffn_down": (48, 64), "attn_norm": (48,), "ffn_norm": (48,),
    }  # fmt: skip
    tensors = {f"blk.0.{name}.weight": draw(*shape) for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": draw(93, 48), "output_norm.weight": draw(48), "output.weight": draw(93, 48)}
    rope = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.freq_base": 10000.0}
    write_gguf(tmp_path / "model.gguf", rope, tensors)
    source = read_hugging_face(tmp_path / "model.gguf")
    assert source.model.rotary_seq_len_interpolation_factor == 4.0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    assert torch.equal(source.tensors[OUTPUT].read(), theirs["lm_head.weight"])
    line = compare_logits(
        Head(source.tensors, source.model), tmp_path, vocab_size=93, gguf=("model.gguf", source.config)
    )
    assert "logits of 48 sample tokens are those of transformers" in line
    with pytest.raises(ValueError, match="logits differ from those of transformers"):
        plain = replace(source.model, rotary_seq_len_interpolation_factor=None)
        compare_logits(Head(source.tensors, plain), tmp_path, vocab_size=93, gguf=("model.gguf", source.config))
    del tensors["blk.0.ffn_up.weight"]
    write_gguf(tmp_path / "model.gguf", rope, tensors)
    with pytest.raises(ValueError, match="does not hold the model that its settings describe: .*up_proj"):
        read_hugging_face(tmp_path / "model.gguf")


def test_tokenizers_that_transformers_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The line on what was compared says so."""
    from tests.configs import make_config
    from tests.distributed.test_added_exits import save

    cfg = make_config(exit_layer_nums=(), exit_layer_weight=(), max_position_embeddings=64)
    run_distributed(1, save, cfg=cfg, folder=tmp_path / "ours")
    convert("to-hf", "--load", tmp_path / "ours", "--output", tmp_path / "out")
    said = capsys.readouterr().out
    assert "compared: weights, no tokenizer (transformers has none like NullTokenizer); logits of 48" in said


def test_a_tokenizer_that_cannot_be_read(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (llama / "tokenizer.json").write_text("{}")
    assert main(["from-hf", "--input", str(llama), "--save", str(tmp_path / "ours")]) == 2
    assert "transformers cannot read the tokenizer in" in capsys.readouterr().err


def test_no_architecture_is_wide_enough_for_everything() -> None:
    model = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, normalization="RMSNorm", position_embedding_type="rope",
        swiglu=True, add_bias_linear=False, qk_layernorm=True, add_qkv_bias=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="norms and biases of queries and keys"):
        standard_model_type(model)
