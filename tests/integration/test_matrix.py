"""A model's whole way, as the README goes it, for all that users bring: converted, given exits, tuned, resumed,
evaluated, asked to generate and exported; pairwise over families, heads, optimizers and precisions.

The tools run by their `main` in one process, since importing core takes seconds; what they make is compared with what
`transformers` makes of the same files.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data_files import write_documents
from tests.distributed.engines import head_logits
from tests.distributed.test_conversion import LLAMA3_ROPE, TOKENS, random_model, their_logits
from tests.distributed.training_runs import training_run
from tests.distributed.workers import run_distributed
from tests.pairwise import all_pairs, pairs_of, pairwise_rows

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {"hidden_size": 72}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", {}),
}
TRAINING: dict[str, tuple[str, ...]] = {
    "adam": ("--lr", "1e-2"),
    "sgd": ("--lr", "1e-1", "--optimizer", "sgd"),
    "distributed": ("--lr", "1e-2", "--use-distributed-optimizer"),
}
HEADS = {
    "none": (),
    "norm": ("--use-exit-norm",),
    "mlp": ("--use-exit-norm", "--use-exit-mlp"),
    "block": ("--use-exit-norm", "--use-exit-block"),
}
FACTORS = {
    "family": list(FAMILIES),
    "output": ["tied", "untied"],
    "head": list(HEADS),
    "exit output": ["shared", "own"],
    "training": list(TRAINING),
    "precision": ["fp32", "bf16"],
}
ROWS = pairwise_rows(FACTORS)
LAYERS = (2, 3)
TEXT = "w0 w3 w12 w27 w48 w75"


def test_rows_cover_all_pairs() -> None:
    assert set().union(*map(pairs_of, ROWS)) == all_pairs(FACTORS)
    assert len(ROWS) < 40  # or it takes too long


def run(tool: str, *words: object) -> str:
    """Run a tool in this process; returns what it prints."""
    from megatron.early_exit.checkpoint import convert_command
    from megatron.early_exit.evaluation import command_line as evaluation
    from megatron.early_exit.inference import command_line

    main = {
        "convert": convert_command.main, "evaluate": evaluation.main, "generate": command_line.main,
    }[tool]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main([str(word) for word in words])
    assert status == 0, errors.getvalue()
    return output.getvalue()


def pretrain(*words: object) -> None:
    """What pretrain_early_exit_gpt.py does with these flags, in this process."""
    from megatron.early_exit.config.flags import parse_run_config

    config = parse_run_config([str(word) for word in words], world_size=1, warn=lambda message: None)
    with contextlib.redirect_stdout(io.StringIO()):
        training_run(config)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from megatron.early_exit.checkpoint.store import read_checkpoint
    from megatron.early_exit.config.checkpoint_choice import checkpoint_folder

    _, tensors = read_checkpoint(checkpoint_folder(folder))
    return {name: tensor.read() for name, tensor in tensors.items()}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Logits of 93 words."""
    error = (ours[..., :93] - theirs[..., :93]).abs().max() / theirs.abs().max()
    assert error < 2e-5, error


def save_tokenizer(folder: Path, kind: str) -> None:
    """One of 93 ids: words, or for Qwen2, whose class in `transformers` knows nothing else, characters."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import BPE, WordLevel
    from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit

    if kind == "qwen2":
        characters = "w0123456789\u0120"  # the last stands for the space
        names = [*characters, *(f"unused{i}" for i in range(92 - len(characters))), "<eos>"]
        tokenizer = Tokenizer(BPE({name: number for number, name in enumerate(names)}, []))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    else:
        tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(92)} | {"<eos>": 92}, unk_token="w0"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def round_weights(folder: Path) -> None:
    """Leave weights that bf16 can hold in the model of `transformers`, so that its logits in fp32 are comparable."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    rounded = {name: value.bfloat16().float() for name, value in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})


def walk(row: dict[str, str], folder: Path) -> None:
    """One row of the matrix."""
    from megatron.early_exit.checkpoint.tensors import EXIT_HEAD
    from megatron.early_exit.inference import command_line

    command_line._leave = lambda: None  # the world is that of all rows
    precision = row["precision"]
    theirs, base, exits, tuned = (folder / name for name in ("theirs", "base", "exits", "tuned"))
    kind, changes = FAMILIES[row["family"]]
    with contextlib.redirect_stderr(io.StringIO()):
        random_model(kind, {**changes, "tie_word_embeddings": row["output"] == "tied"}, theirs)
    save_tokenizer(theirs, kind)
    if precision == "bf16":
        round_weights(theirs)
    source = their_logits(theirs)

    # Converted, and given exits.
    run("convert", "from-hf", "--input", theirs, "--save", base, "--dtype", precision)
    head = [*HEADS[row["head"]], *(["--untie-exit-output-weights"] if row["exit output"] == "own" else [])]
    run("convert", "add-exits", "--load", base, "--save", exits, "--exit-layer-nums", *LAYERS, *head)
    assert_close(head_logits(exits, TOKENS, dtype="fp32")["final"], source)

    # Tuned; or all of the model trained, where exits have nothing of their own.
    data = write_documents(folder / "text", [[(5 * i + j * j) % 92 for j in range(40 + i)] for i in range(20)])
    tunes = bool(head)
    common = [
        "--pretrained-checkpoint", exits, "--use-checkpoint-args", "--data-path", data, "--split", "100,0,0",
        "--seq-length", 16, "--micro-batch-size", 2, "--global-batch-size", 4, "--train-iters", 4, "--eval-iters", 0,
        "--num-workers", 0, "--log-interval", 1, *TRAINING[row["training"]],
        *(["--bf16"] if precision == "bf16" else []), *(["--tune-exit"] if tunes else []),
    ]  # fmt: skip
    pretrain(*common, "--save", tuned, "--load", tuned)
    before, after = weights_of(exits), weights_of(tuned)
    assert set(before) == set(after)
    for name in before:
        is_trained = EXIT_HEAD in name or not tunes
        assert is_trained or torch.equal(before[name], after[name]), name
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(value.isfinite().all() for value in after.values())

    # Stopped and resumed: the same to the last bit.
    resumed = folder / "resumed"
    for more in (["--exit-interval", 2], []):
        pretrain(*common, "--save", resumed, "--load", resumed, *more)
    lines = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]
    again = weights_of(resumed)
    assert all(torch.equal(after[name], again[name]) for name in after)

    # Exported: the whole model, and its first exit as a model of its own.
    back = folder / "back"
    run("convert", "to-hf", "--load", tuned, "--output", back)
    final, of_exit = their_logits(back), logits_of_exit(row, tuned, back)
    if tunes:
        assert torch.equal(final, source)
    ours = head_logits(tuned, TOKENS, dtype="fp32")
    assert_close(ours["final"], final)
    assert_close(ours[f"exit_{LAYERS[0]}"], of_exit)

    # Evaluated, against losses of the exported models.
    documents = write_documents(folder / "held_out", [TOKENS[0], TOKENS[1]])
    words = (
        "exits", "--load", tuned, "--data-path", documents, "--prompt-length", len(TOKENS[0]), "--dtype", "fp32",
        "--output", folder / "quality.json",
    )  # fmt: skip
    run("evaluate", *words)
    heads = json.loads((folder / "quality.json").read_text())["results"]["heads"]
    labels = torch.tensor(TOKENS)[:, 1:].flatten()
    for said, logits in ((heads[0], of_exit), (heads[-1], final)):
        loss = torch.nn.functional.cross_entropy(logits[:, :-1, :93].flatten(0, 1), labels).item()
        assert said["loss"] == pytest.approx(loss, rel=1e-4)

    # Generated: the greedy tokens of the exported models.
    words = ("--load", tuned, "--prompt", TEXT, "--json", "--dtype", "fp32", "--tokens-to-generate", 8)
    assert ids_of(said := tokens_of(run("generate", *words))) == their_greedy(back)
    assert {token["is_final"] for token in said} == {True}
    early = ("--use-early-exit", "--early-exit-thres", 0, "--exit-layers", LAYERS[0])
    said = tokens_of(run("generate", *words, *early))
    assert {token["exit_layer"] for token in said} == {LAYERS[0]}
    if row["head"] != "none":
        assert ids_of(said) == their_greedy(back.with_name("shallow"))


def logits_of_exit(row: dict[str, str], tuned: Path, back: Path) -> torch.Tensor:
    """What `transformers` makes of the first exit; as `their_logits`. `back`: the whole model, exported."""
    import transformers

    if row["head"] != "none":
        run("convert", "to-hf", "--load", tuned, "--output", back.with_name("shallow"), "--exit", LAYERS[0])
        return their_logits(back.with_name("shallow"))
    # Without a norm it is no model of any architecture, but one matrix on the hidden states.
    model = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).eval()
    own = f"decoder.layers.{LAYERS[0] - 1}.exit_head.output_layer.weight"
    weight = weights_of(tuned)[own].float() if row["exit output"] == "own" else model.get_output_embeddings().weight
    with torch.no_grad():
        hidden_states = model(torch.tensor(TOKENS), output_hidden_states=True).hidden_states[LAYERS[0]]
        return hidden_states @ weight.t()


def tokens_of(output: str) -> list[dict[str, Any]]:
    """Of the answer that generate.py --json prints."""
    return json.loads(output.splitlines()[-1])["tokens"]


def ids_of(tokens: list[dict[str, Any]]) -> list[int]:
    return [token["token"] for token in tokens]


def their_greedy(folder: Path) -> list[int]:
    """Greedy tokens of `transformers` after the prompt, up to its end."""
    import transformers

    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    assert ids.size(1) > 5
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.size(1) :].tolist()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ", ".join(row.values()))
def test_a_whole_way(row: dict[str, str], tmp_path: Path) -> None:
    run_distributed(1, walk, row=row, folder=tmp_path)
