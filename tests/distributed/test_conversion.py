"""Conversion from and to `transformers`: the same logits, the same bits there and back, under any layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.early_exit.checkpoint import exits
from megatron.early_exit.checkpoint.convert_command import main
from megatron.early_exit.checkpoint.tensors import LazyTensor
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.parallel import ParallelConfig
from tests.distributed.engines import head_logits
from tests.distributed.workers import run_distributed
from tests.reference_checkpoint import STYLES

SIZES = {
    "vocab_size": 93, "hidden_size": 42, "intermediate_size": 72, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 92, "pad_token_id": None,
}  # fmt: skip
GPT2 = {
    "vocab_size": 93, "n_embd": 48, "n_layer": 4, "n_head": 6, "n_inner": 72, "n_positions": 64,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 92, "resid_pdrop": 0.0,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama tied, no groups": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}}),
    "mistral": ("mistral", {"sliding_window": 64, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "hidden_size": 72}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt2 with exact gelu": ("gpt2", {"activation_function": "gelu"}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
}  # fmt: skip
MIXED = tuple(
    "--use-exit-block true false false --use-exit-norm false true true --use-exit-mlp false false true"
    " --untie-exit-output-weights false true false".split()
)
EXIT_FLAGS = {
    "tied": (),
    "untied_norm": ("--untie-exit-output-weights", "--use-exit-norm"),
    "mlp": ("--use-exit-mlp", "--use-exit-norm"),
    "block": ("--use-exit-block", "--use-exit-norm", "--untie-exit-output-weights"),
    "pre_exit": ("--pre-exit", "--use-exit-norm"),
    "pre_exit_block": ("--pre-exit", "--use-exit-block"),
    "mixed": MIXED,
    "uses": (*MIXED, "--exit-uses", "draft", "leave", "both"),
}
TOKENS = [[(7 * i + 3 * j * j) % 93 for j in range(30)] for i in range(2)]


def random_model(kind: str, changes: dict[str, Any], folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """A model of `transformers` with random weights in `folder`, and a tokenizer; returns its weights."""
    import transformers

    torch.manual_seed(0)
    sizes = {**(GPT2 if kind == "gpt2" else SIZES), **changes}
    if kind == "qwen2":
        del sizes["head_dim"]
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, **settings)
    save_tokenizer(folder)
    return model.state_dict()


def save_tokenizer(folder: Path) -> None:
    """One of 93 ids."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = WordLevel({f"w{i}": i for i in range(92)} | {"<eos>": 92}, unk_token="w0")
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<eos>").save_pretrained(folder)


def their_logits(folder: Path) -> torch.Tensor:
    """[sequences, positions, 93]"""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits


def convert(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def our_logits(folder: Path, tp_size: int = 1) -> torch.Tensor:
    """What the engine's decoder says; as `their_logits`."""
    return head_logits(folder, TOKENS, tp_size)["final"][..., :93]


def trained_logits(folder: Path, parallel: ParallelConfig) -> torch.Tensor | None:
    """What the training model says under a layout, on the last stage; as `their_logits`."""
    from megatron.core import parallel_state

    from megatron.early_exit.checkpoint.core_loading import load_sharded
    from megatron.early_exit.checkpoint.load_model import check_tensors, sharded_weights
    from megatron.early_exit.config.checkpoint_choice import find_checkpoint
    from megatron.early_exit.config.saved_description import read_description
    from megatron.early_exit.config.settings import BuildConfig
    from megatron.early_exit.model.build import build_model
    from megatron.early_exit.platform.distributed import initialize_model_parallel

    path = find_checkpoint(str(folder), None)
    description = read_description(path)
    initialize_model_parallel(parallel, description.model.num_layers, seed=1)
    build = BuildConfig(description.model, description.exits, description.dtype, parallel)
    model = build_model(build, description.padded_vocab_size, wrap_with_ddp=False)
    sharded = sharded_weights(model)
    check_tensors(sharded, path)
    model.chunks[0].load_state_dict(load_sharded(sharded, path)["model0"])
    chunk = model.chunks[0].eval()
    tokens = torch.tensor(TOKENS)
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    # The pipeline by hand: what a stage makes goes to the next.
    stage, stages = parallel_state.get_pipeline_model_parallel_rank(), parallel.pipeline_model_parallel_size
    group = parallel_state.get_pipeline_model_parallel_group()
    with torch.no_grad():
        if stage > 0:
            hidden = torch.empty(tokens.size(1), tokens.size(0), description.model.hidden_size)
            torch.distributed.recv(hidden, group_src=stage - 1, group=group)
            chunk.set_input_tensor(hidden)
        out = chunk(tokens, positions, None)
    if stage < stages - 1:
        torch.distributed.send(out.contiguous(), group_dst=stage + 1, group=group)
        return None
    parts = [torch.empty_like(out) for _ in range(parallel.tensor_model_parallel_size)]
    tp_group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(parts, out.contiguous(), group=tp_group)
    return torch.cat(parts, -1)[..., :93]


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    kind, changes = MODELS[name]
    weights = random_model(kind, changes, tmp_path / "theirs")
    expected = their_logits(tmp_path / "theirs")
    convert("from-hf", "--input", tmp_path / "theirs", "--save", tmp_path / "ours")
    assert_same_logits(run_distributed(1, our_logits, folder=tmp_path / "ours")[0], expected)
    one = ParallelConfig()
    assert_same_logits(run_distributed(1, trained_logits, folder=tmp_path / "ours", parallel=one)[0], expected)
    convert("to-hf", "--load", tmp_path / "ours", "--output", tmp_path / "back")
    import transformers

    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back).__name__.lower().startswith("gpt2lm" if kind == "gpt2" else kind)
    assert set(back.state_dict()) == set(weights)
    assert all(torch.equal(value, weights[key]) for key, value in back.state_dict().items())
    assert torch.equal(their_logits(tmp_path / "back"), expected)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab()["w7"] == 7
    assert (tmp_path / "back/generation_config.json").read_text() == (
        tmp_path / "theirs/generation_config.json"
    ).read_text()


@pytest.mark.parametrize("name", ["llama 3", "linear rope"])
def test_scaled_positions_are_not_plain_ones(name: str, tmp_path: Path) -> None:
    """Or the comparison above would show nothing."""
    for folder, rope in ((tmp_path / "a", {}), (tmp_path / "b", {"rope_type": "default"})):
        kind, changes = MODELS[name]
        random_model(kind, {**changes, "rope_parameters": {**changes["rope_parameters"], **rope}}, folder)
    scaled, plain = their_logits(tmp_path / "a"), their_logits(tmp_path / "b")
    assert (scaled - plain).abs().max() > 1e-3 * scaled.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_any_layout_loads_what_was_converted(name: str, tmp_path: Path) -> None:
    random_model(*MODELS[name], tmp_path / "theirs")
    expected = their_logits(tmp_path / "theirs")
    convert("from-hf", "--input", tmp_path / "theirs", "--save", tmp_path / "ours")
    for logits in run_distributed(1, our_logits, folder=tmp_path / "ours", tp_size=2):
        assert_same_logits(logits, expected)
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    logits = run_distributed(4, trained_logits, folder=tmp_path / "ours", parallel=parallel)
    assert [one is None for one in logits] == [True, True, False, False]
    assert_same_logits(logits[2], expected)


def test_shards_and_types(tmp_path: Path) -> None:
    weights = random_model("llama", {}, tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    convert("from-hf", "--input", tmp_path / "theirs", "--save", tmp_path / "ours", "--dtype", "bf16")
    convert("to-hf", "--load", tmp_path / "ours", "--output", tmp_path / "back")
    import transformers

    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert back.dtype == torch.bfloat16
    assert all(torch.equal(value, weights[key].bfloat16()) for key, value in back.state_dict().items())


def our_early_exit(folder: Path, count: int) -> dict[float, list[tuple[list[int], list[int]]]]:
    """By threshold: (tokens, layers that they left at) for the beginnings of `TOKENS`."""
    from megatron.early_exit.inference.llm import LLM
    from megatron.early_exit.inference.params import GenerationParams

    llm = LLM.load(str(folder), max_requests=2)
    answers = {}
    for threshold in THRESHOLDS:
        params = GenerationParams(
            mode="early_exit", exit_thresholds=(threshold,), max_tokens=count, ignore_eod=True, max_deferred=1000
        )
        answers[threshold] = [
            ([t.token for t in answer.tokens], [t.exit_layer for t in answer.tokens])
            for answer in llm.generate([tokens[:12] for tokens in TOKENS], params)
        ]
    return answers


def assert_same_early_exit(model: Any, ours: dict[float, list[tuple[list[int], list[int]]]]) -> None:
    for threshold, answers in ours.items():
        for prompt, answer in zip(TOKENS, answers, strict=True):
            ids = torch.tensor([prompt[:12]])
            ids = model.generate(ids, exit_threshold=threshold, max_new_tokens=len(answer[0]), eos_token_id=None)
            assert (ids[0, 12:].tolist(), model.last_exit_layers) == answer, threshold


# Not 1: there an exit is taken where its probability rounds to 1, and roundings differ.
THRESHOLDS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.9, 0.999)


def write_with_exits(
    name: str, flags: tuple[str, ...], layers: tuple[int, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of `MODELS` with exits that each say something else: `exits` is ours, `back` that of transformers."""

    def shaken(like: LazyTensor, model: ModelConfig, name: str, seed: int) -> LazyTensor:
        def shake(tensor: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(len(name) + seed)
            return tensor + 0.5 * tensor.std() * torch.randn(tensor.shape, generator=generator)

        return like.then(like.shape, shake)

    monkeypatch.setattr(exits, "_random", shaken)
    random_model(*MODELS[name], folder / "theirs")
    convert("from-hf", "--input", folder / "theirs", "--save", folder / "plain")
    words = ("--load", folder / "plain", "--save", folder / "exits", "--exit-layer-nums", *layers, *flags)
    convert("add-exits", *words, "--init", "random")
    convert("to-hf", "--load", folder / "exits", "--output", folder / "back", "--with-exits")


@pytest.mark.parametrize(("name", "head"), [
    *((name, head) for name in ("llama", "qwen3", "gpt2") for head in ("tied", "untied_norm", "mlp", "block")),
    ("llama", "pre_exit"), ("mistral", "untied_norm"), ("qwen2", "pre_exit_block"), ("gpt2 untied", "pre_exit_block"),
    ("gpt2 with exact gelu", "mlp"), ("llama", "uses"),
])  # fmt: skip
def test_exits_in_transformers(name: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    write_with_exits(name, EXIT_FLAGS[head], (1, 2, 3), tmp_path, monkeypatch)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=False)
    assert type(plain).__name__ != type(model).__name__ == "EarlyExitForCausalLM"
    assert torch.equal(their_logits(tmp_path / "back"), their_logits(tmp_path / "theirs"))
    ours = run_distributed(1, our_early_exit, folder=tmp_path / "exits", count=30)[0]
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        assert_same_early_exit(model, ours)
    # Or the comparison would not show what waiting rows do.
    ways = {tuple(layers) for answers in ours.values() for _, layers in answers}
    assert {layer for layers in ways for layer in layers} == ({2, 3, 4} if head == "uses" else {1, 2, 3, 4})
    assert sum(len(set(layers)) > 2 for layers in ways) > 2
    settings = {"max_new_tokens": 30, "eos_token_id": None}
    ids = model.generate(torch.tensor([TOKENS[0][:12]]), **settings)
    assert torch.equal(ids, plain.generate(torch.tensor([TOKENS[0][:12]]), **settings))


def test_settings_of_generate_act_on_early_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    write_with_exits("gpt2", EXIT_FLAGS["block"], (2, 3), tmp_path, monkeypatch)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, plain = (load(tmp_path / "back", trust_remote_code=trust) for trust in (True, False))
    ids = torch.tensor([TOKENS[0][:12]])

    def sampled(one: Any, **settings: Any) -> list[int]:
        torch.manual_seed(3)
        settings = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "eos_token_id": None, **settings}
        return one.generate(ids, max_new_tokens=30, **settings)[0].tolist()

    # No exit is sure: the same draws as without exits, which are not the greedy choice.
    tokens = sampled(model, exit_threshold=1.0)
    assert model.last_exit_layers == [4] * 30 and tokens == sampled(plain)
    assert tokens != sampled(plain, top_k=1)
    # All leave at the first exit: tokens are drawn from what that exit says.
    tokens = sampled(model, exit_threshold=0.0, top_k=3)
    said = run_distributed(1, head_logits, folder=tmp_path / "exits", tokens=[tokens])[0]["exit_2"][0, :, :93]
    ranks = [int((row > row[token]).sum()) for row, token in zip(said[11:], tokens[12:], strict=False)]
    assert model.last_exit_layers == [2] * 30 and set(ranks) == {0, 1, 2}
    assert sampled(model, exit_threshold=0.0, top_k=1) == sampled(model, exit_threshold=0.0, do_sample=False)
    # Processors and criteria.
    penalised = model.generate(ids, exit_threshold=0.5, no_repeat_ngram_size=1, max_length=40, eos_token_id=None)
    assert penalised.size(1) == 40 and len(set(penalised[0, 12:].tolist())) == 28
    streamed: list[int] = []
    streamer = SimpleNamespace(put=lambda ids: streamed.extend(ids.flatten().tolist()), end=lambda: streamed.append(-1))
    assert [*sampled(model, exit_threshold=0.6, streamer=streamer), -1] == streamed
    end = tokens[15]
    assert sampled(model, exit_threshold=0.0, top_k=3, eos_token_id=end) == tokens[: tokens.index(end, 12) + 1]
    model.generation_config.eos_token_id = end
    assert model.generate(ids, exit_threshold=1.0, forced_eos_token_id=end, max_new_tokens=5)[0, -1] == end
    # Exits go along to another type.
    assert model.to(torch.float64).generate(ids, exit_threshold=0.0, max_new_tokens=3, eos_token_id=None).size(1) == 15


@pytest.mark.parametrize(("settings", "message"), [
    ({"exit_threshold": 5.0}, "exit_threshold is 5.0; it is a probability"),
    ({"inputs": torch.tensor(TOKENS)}, "2 sequences; generate them one by one"),
    ({"num_beams": 2}, "the generation mode beam_search"),
    ({"prompt_lookup_num_tokens": 2}, "the generation mode assisted_generation"),
    ({"do_sample": True, "num_return_sequences": 3}, "3 sequences"),
    ({"attention_mask": torch.tensor([[0] + [1] * 29])}, "an attention_mask with zeros; leave padding out"),
    ({"return_dict_in_generate": True}, "return_dict_in_generate"),
    ({"inputs": None, "inputs_embeds": torch.zeros(1, 3, 42)}, "inputs_embeds cannot be used with exit_threshold"),
], ids=str)  # fmt: skip
def test_early_exit_in_transformers_refuses(settings: dict, message: str, early_exit_model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        early_exit_model.generate(**{"inputs": torch.tensor(TOKENS[:1]), "exit_threshold": 0.5, **settings})


@pytest.fixture(scope="module")
def early_exit_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import transformers

    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as monkeypatch:
        write_with_exits("llama", (), (2,), folder, monkeypatch)
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "back", trust_remote_code=True)


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_a_model_trained_here(style: str, tmp_path: Path) -> None:
    """Ids and vocabulary are those of its tokenizer, not the defaults of the architecture; exits have temperatures."""
    import transformers

    from tests.configs import make_config
    from tests.distributed.test_added_exits import save

    save_tokenizer(tmp_path / "tokenizer")
    data = {
        "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path / "tokenizer"), "vocab_size": None,
    }  # fmt: skip
    heads = {"use_exit_block": True, "exit_layer_temperature": (0.05, 0.02)}
    cfg = make_config(max_position_embeddings=64, **data, **heads, **STYLES[style])
    run_distributed(1, save, cfg=cfg, folder=tmp_path / "ours")
    convert("to-hf", "--load", tmp_path / "ours", "--output", tmp_path / "theirs", "--with-exits")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert model.config.eos_token_id == tokenizer.eos_token_id == 92
    assert model.config.bos_token_id is None and model.config.vocab_size == len(tokenizer) == 93
    said = run_distributed(1, head_logits, folder=tmp_path / "ours", tokens=[[1, 2, 3, 4, 5]])[0]["final"][0]
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3, 4, 5]])).logits[0]
    assert_same_logits(said[:, : model.config.vocab_size], logits)
    answers = run_distributed(1, our_early_exit, folder=tmp_path / "ours", count=30)[0]
    assert_same_early_exit(model, answers)
    assert {2, 3, 4} == {layer for of_threshold in answers.values() for _, layers in of_threshold for layer in layers}


def test_vocabulary_for_many_ranks(tmp_path: Path) -> None:
    weights = random_model("llama", {}, tmp_path / "theirs")
    convert("from-hf", "--input", tmp_path / "theirs", "--save", tmp_path / "ours")
    convert(
        "reshard", "--load", tmp_path / "ours", "--save", tmp_path / "wide",
        "--tensor-model-parallel-size", 3, "--make-vocab-size-divisible-by", 50,
    )  # fmt: skip
    from megatron.early_exit.checkpoint.store import read_checkpoint
    from megatron.early_exit.config.checkpoint_choice import checkpoint_folder

    description, tensors = read_checkpoint(checkpoint_folder(tmp_path / "wide"))
    embedding = tensors["embedding.word_embeddings.weight"].read()
    assert description.padded_vocab_size == len(embedding) == 150
    assert torch.equal(embedding[:93], weights["model.embed_tokens.weight"]) and not embedding[93:].any()
    expected = their_logits(tmp_path / "theirs")
    for logits in run_distributed(1, our_logits, folder=tmp_path / "wide", tp_size=2):
        assert_same_logits(logits, expected)
