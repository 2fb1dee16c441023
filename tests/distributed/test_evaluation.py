"""What evaluate.py exits, sweep, benchmark and correctness say of a model follows from the reference's logits, and from
transformers' answers."""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import roc_auc_score

from megatron.early_exit.checkpoint.writing import write_checkpoint
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.evaluation import decoding
from megatron.early_exit.evaluation.command_line import main
from megatron.early_exit.evaluation.comparison import ComparisonSettings, compare
from megatron.early_exit.evaluation.correctness import CorrectnessCheck
from megatron.early_exit.evaluation.correctness_cases import Case, lossless_cases
from megatron.early_exit.evaluation.decoding import decode
from megatron.early_exit.evaluation.documents import read_document
from megatron.early_exit.evaluation.prompts import EvalPrompt
from megatron.early_exit.evaluation.variants import Grid, variants_of
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from tests.data_files import write_documents
from tests.distributed.engines import decoder_of, reference_over
from tests.reference_checkpoint import decoding_config, reference_description, reference_tensors
from tests.server.models import plain_model

VOCAB_SIZE = 94
ANSWERS = GenerationParams(max_tokens=10, ignore_eod=True)
NO_PROGRESS = lambda words: lambda done, total: None


@pytest.fixture(scope="module")
def cfg() -> RunConfig:
    return decoding_config(use_exit_norm=True)


@pytest.fixture(scope="module")
def checkpoint(cfg: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = TokenizerConfig("NullTokenizer", None, VOCAB_SIZE - 1)
    description = replace(reference_description(cfg), dtype="fp32", tokenizer=tokenizer)
    write_checkpoint(folder, description, reference_tensors(cfg))
    return folder


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM.load(str(checkpoint), max_requests=4)


@pytest.fixture(scope="module")
def prompts() -> list[EvalPrompt]:
    return [EvalPrompt(tuple((7 * i + j * j) % 93 for j in range(9 + i)), None, f"text:{i}") for i in range(6)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    document = lambda i: [(11 * i + 3 * j * j) % 93 for j in range(30)]
    return [
        write_documents(folder / name, [document(i) for i in range(first, first + 8)])
        for name, first in (("code", 0), ("prose", 50))
    ]


def run(*words: object) -> int:
    return main([str(word) for word in words])


def reference_logits(cfg: RunConfig, tokens: list[int]) -> dict[int | None, torch.Tensor]:
    """[tokens, vocabulary] of each exit and, None, of the final head."""
    _, logits = reference_over(cfg, tokens)
    return {layer: head[:, :VOCAB_SIZE] for layer, head in logits.items()}


# exits


def test_exits(
    cfg: RunConfig, checkpoint: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("exits", "--load", checkpoint, "--compare", checkpoint, "--data-path", *texts, "--prompt-length", 30)
    assert run(*words, "--output", tmp_path / "exits.json") == 0
    document = read_document(tmp_path / "exits.json")
    results = document["results"]
    assert document["kind"] == "exits" and results["tokens"] == 16 * 29
    (other,) = results["compare"]
    without_cost = lambda heads: [{**head, "cost_in_layers": None} for head in heads]
    assert other["checkpoint"] == str(checkpoint) and without_cost(other["heads"]) == without_cost(results["heads"])
    documents = {name: [[(11 * i + 3 * j * j) % 93 for j in range(30)] for i in range(first, first + 8)]
                 for name, first in (("code", 0), ("prose", 50))}  # fmt: skip
    check_heads(results["heads"], cfg, documents["code"] + documents["prose"])
    for name, some in documents.items():
        check_heads(results["by_domain"][name], cfg, some)
    for layer, bins in results["reliability"].items():
        head = next(one for one in results["heads"] if one["layer"] == int(layer) and not one["is_final"])
        counts = np.array([one["count"] for one in bins])
        assert counts.sum() == results["tokens"]
        assert counts @ [one["agreement"] for one in bins] == pytest.approx(head["agreement"] * results["tokens"])
    for head, one in zip(results["heads"], results["per_prompt"], strict=True):
        assert sum(one["agreeing"]) / sum(one["tokens"]) == pytest.approx(head["agreement"])
        assert -sum(one["log_prob"]) / sum(one["tokens"]) == pytest.approx(head["loss"])
    assert len(document["data"]) == 4 and len(results["prompts"]) == 16
    printed = capsys.readouterr().out
    assert "code, 8 of 16 sequences" in printed and "AUROC" in printed


def check_heads(said: list[dict[str, Any]], cfg: RunConfig, documents: list[list[int]]) -> None:
    """Against plain arithmetic on the reference's logits."""
    logits = [reference_logits(cfg, document[:-1]) for document in documents]
    labels = torch.tensor([document[1:] for document in documents]).flatten()
    final = torch.cat([one[None] for one in logits]).argmax(-1)
    assert [(head["layer"], head["is_final"]) for head in said] == [(1, False), (2, False), (3, False), (4, True)]
    for head, layer in zip(said, (*cfg.exits.exit_layer_nums, None), strict=True):
        log_probs = torch.cat([one[layer] for one in logits]).log_softmax(-1)
        best, agrees = log_probs.argmax(-1), log_probs.argmax(-1) == final
        loss = torch.nn.functional.nll_loss(log_probs, labels).item()
        assert head["loss"] == pytest.approx(loss, rel=1e-5)
        assert head["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert head["accuracy"] == pytest.approx((best == labels).float().mean().item())
        assert head["agreement"] == pytest.approx(agrees.float().mean().item())
        assert head["confidence"] == pytest.approx(log_probs.amax(-1).exp().mean().item(), rel=1e-5)
        assert head["cost_in_layers"] > 0
        if head["is_final"]:
            assert head["agreement"] == 1 and head["ece"] is head["auroc"] is head["agreement_interval"] is None
        else:
            scores = log_probs.amax(-1).exp().double().numpy()
            assert head["auroc"] == pytest.approx(roc_auc_score(agrees.numpy(), scores), abs=1e-3)
            bins = np.ceil(scores * 15)
            gaps = [abs((scores - agrees.numpy())[bins == one].sum()) for one in np.unique(bins)]
            assert head["ece"] == pytest.approx(sum(gaps) / len(scores), abs=1e-5)
            low, high = head["agreement_interval"]
            assert low < head["agreement"] < high


# sweep and benchmark


def quality_of_reference(cfg: RunConfig, prompt: list[int], answer: tuple[int, ...]) -> tuple[int, float]:
    """(tokens that the full model would have taken, log-probability)"""
    logits = reference_logits(cfg, [*prompt, *answer[:-1]])[None][len(prompt) - 1 :]
    best, labels = logits.argmax(-1), torch.tensor(answer)
    return int((best == labels).sum()), logits.log_softmax(-1).gather(1, labels[:, None]).sum().item()


def test_rows_follow_from_the_answers(cfg: RunConfig, llm: LLM, prompts: list[EvalPrompt]) -> None:
    grid = Grid(thresholds=(0.0, 1.0), exits="both", draft_lengths=(3,))
    variants = variants_of(grid, ANSWERS, llm.engine.checks)
    names = [one.name for one in variants]
    assert names == [
        "full", "threshold 0", "threshold 1", "threshold 0, exit 1", "threshold 1, exit 1", "threshold 0, exit 2",
        "threshold 1, exit 2", "threshold 0, exit 3", "threshold 1, exit 3", "draft with exit 1, length 3",
        "draft with exit 2, length 3", "draft with exit 3, length 3",
    ]  # fmt: skip
    found = compare(llm, prompts, variants, ComparisonSettings((1, 4), 2, 6, seed=5), NO_PROGRESS)
    rows = {(row["batch"], row["name"]): row for row in found.rows}
    assert list(rows) == [(batch, name) for batch in (1, 4) for name in names]
    numbers = {(one["batch"], one["name"]): one for one in found.per_prompt}
    full = {prompt: decode(llm.engine, ANSWERS, [prompt.ids]).answers[0] for prompt in prompts}
    for (batch, name), row in rows.items():
        used = prompts if batch == 1 else prompts[:4]  # two are left over
        params = next(one.params for one in variants if one.name == name)
        answers = [decode(llm.engine, params, [prompt.ids]).answers[0] for prompt in used]
        pairs = [quality_of_reference(cfg, list(p.ids), answer) for p, answer in zip(used, answers, strict=True)]
        agreeing, log_probs = zip(*pairs, strict=True)
        assert row["prompts"] == len(used) and row["is_baseline"] == (name == "full")
        assert row["agreement"] == pytest.approx(sum(agreeing) / (10 * len(used)))
        assert row["perplexity"] == pytest.approx(math.exp(-sum(log_probs) / (10 * len(used))), rel=1e-4)
        is_same = [answer == full[prompt] for prompt, answer in zip(used, answers, strict=True)]
        assert row["identical_answers"] == sum(is_same) / len(used) and numbers[batch, name]["is_identical"] == is_same
        assert numbers[batch, name]["agreeing"] == list(agreeing)
        assert np.shape(numbers[batch, name]["decode_seconds"]) == (2, len(used) // batch)
        assert row["tokens_per_second"] > 0 and row["first_token_seconds"] > 0 and row["seconds_per_token"] > 0
        if name != "full":
            low, high = row["speedup_interval"]
            assert low < row["speedup"] < high
    for batch in (1, 4):
        never, always = rows[batch, "threshold 1"], rows[batch, "threshold 0"]
        assert never["agreement"] == 1 and never["runs_saved"] == 0 and never["exit_shares"]["final"] == 1
        assert always["exit_shares"] == {"1": 1, "2": 0, "3": 0, "final": 0} and always["agreement"] < 1
        assert always["thresholds"] == {"1": 0, "2": 0, "3": 0} and never["layer_run_speedup"] == 1
        # A layer of four runs for each token; the rows that no later token takes along never run the others.
        assert always["runs_saved"] == pytest.approx(0.75 - 0.25 / 9, abs=0.06)
        assert always["layer_run_speedup"] == pytest.approx(1 / (1 - always["runs_saved"]))
        drafts = rows[batch, "draft with exit 2, length 3"]
        assert (drafts["draft_exit"], drafts["draft_length"]) == (2, 3) and 0 <= drafts["acceptance"] <= 1
        assert drafts["agreement"] == drafts["identical_answers"] == 1
        count = 6 if batch == 1 else 4  # Clopper and Pearson's where all are alike
        assert drafts["agreement_interval"] == pytest.approx((0.025 ** (1 / count), 1))
    low, high = rows[1, "threshold 0"]["agreement_interval"]
    assert low <= rows[1, "threshold 0"]["agreement"] <= high


def test_sweep_writes_a_document_and_a_table(checkpoint: Path, texts: list[str], tmp_path: Path) -> None:
    words = (
        "sweep", "--load", checkpoint, "--data-path", texts[0], "--prompts", 3, "--prompt-length", 8,
        "--answer-tokens", 6, "--ignore-eod", "--rounds", 2, "--batch", 2, 1, "--exits", "each", "--thresholds", 0.2,
        "--draft-exits", 2, "--draft-lengths", "adaptive", "--csv", tmp_path / "rows.csv", "--output",
        tmp_path / "sweep.json",
    )  # fmt: skip
    assert run(*words) == 0
    document = read_document(tmp_path / "sweep.json")
    assert document["settings"] == {
        "thresholds": [0.2], "exits": "each", "certified": None, "draft_exits": [2], "draft_lengths": [None],
        "draft_sources": ["exit"],
        "batches": [1, 2], "rounds": 2, "num_prompts": 3, "prompt_length": 8, "seed": 1234, "answer_tokens": 6,
        "ignore_eod": True,
    }  # fmt: skip
    rows = document["results"]["rows"]
    names = ["full", *(f"threshold 0.2, exit {layer}" for layer in (1, 2, 3)), "draft with exit 2, length adaptive"]
    assert [(row["batch"], row["name"]) for row in rows] == [(batch, name) for batch in (1, 2) for name in names]
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for row, line in zip(rows, lines, strict=True):
        assert line["name"] == row["name"] and float(line["agreement"]) == row["agreement"]
        assert line["speedup_low"] == ("" if row["speedup_interval"] is None else str(row["speedup_interval"][0]))
        assert line["exit_shares_final"] == str(row["exit_shares"]["final"])


def test_answers_that_end_in_their_first_token_have_no_speed(llm: LLM, prompts: list[EvalPrompt]) -> None:
    ends = replace(ANSWERS, stop_tokens=tuple(range(VOCAB_SIZE)))
    variants = variants_of(Grid(thresholds=(0.0,)), ends, llm.engine.checks)
    found = compare(llm, prompts, variants, ComparisonSettings((2,), 2, 4, seed=0), NO_PROGRESS)
    for row in found.rows[1:]:
        assert row["tokens_per_second"] is row["speedup"] is row["speedup_interval"] is row["seconds_per_token"] is None
        assert row["runs_saved"] is None or 0 <= row["runs_saved"] <= 1
    json.dumps(found.rows, allow_nan=False)


# correctness


def test_all_lossless_ways_are_tried(llm: LLM) -> None:
    names = [case.name for case in lossless_cases(llm.engine.checks, ANSWERS, 4, 0.8)]
    assert len(names) == len(set(names)) == 5 + 3 * 3 + 2 * 3 + 2 + 3 + 2
    drafts = {f"draft with exit {layer}, length {length}" for layer in (1, 2, 3) for length in (1, 4, "adaptive")}
    assert drafts < set(names)
    assert {f"draft with {source}, length 4" for source in ("n-grams", "n-grams and exits")} < set(names)


def test_a_difference_is_placed_and_measured(cfg: RunConfig, llm: LLM, prompts: list[EvalPrompt]) -> None:
    check = CorrectnessCheck(llm, prompts, ANSWERS, batch=4)
    expected = check.reference(ANSWERS.sampling)
    prompt, answer = prompts[2], expected[2]
    log_probs = reference_logits(cfg, [*prompt.ids, *answer[:3]])[None][-1].log_softmax(-1)
    (first, second, third), (_, other, worse) = log_probs.topk(3)
    expected[2] = (*answer[:3], worse.item(), *answer[4:])
    case = Case("full", ANSWERS, 1)
    outcome = check.run(case)
    (found,) = outcome.differences
    assert (found.prompt, found.position, found.expected, found.got) == ("text:2", 3, worse.item(), answer[3])
    assert found.margin == pytest.approx((first - second).item(), rel=1e-3)
    assert found.gap == pytest.approx((first - third).item(), rel=1e-3)
    assert outcome.row(found.gap * 1.01)["errors"] == 0 and outcome.row(found.gap * 0.99)["errors"] == 1
    assert outcome.row(1.0)["identical"] == 5 and outcome.num_tokens == 60
    expected[2] = answer[:3]
    outcome = check.run(case)
    (found,) = outcome.differences
    assert (found.position, found.expected, found.got, found.gap) == (3, None, answer[3], None)
    assert outcome.row(math.inf)["errors"] == 1  # no rounding ends an answer


def test_the_gap_of_sampled_tokens_has_their_noise(llm: LLM, prompts: list[EvalPrompt]) -> None:
    sampling, prompt = SamplingSettings(temperature=2.0, seed=7), prompts[0]
    check = CorrectnessCheck(llm, [prompt], ANSWERS, batch=1)
    ((drawn, *_),) = check.reference(sampling)
    gap_to = lambda other: check._difference(prompt, 0, (drawn,), (other,), sampling).gap
    second = min(set(range(VOCAB_SIZE)) - {drawn}, key=gap_to)
    # A bias of that size, and no smaller one, makes the second best the one that is drawn.
    for bias, expected in ((0.99, drawn), (1.01, second)):
        biased = replace(sampling, logit_bias={drawn: -bias * gap_to(second)})
        run = decode(llm.engine, replace(ANSWERS, max_tokens=1, sampling=biased), [prompt.ids])
        assert run.answers == ((expected,),)


def test_early_exit_is_compared_with_its_own_heads(llm: LLM, prompts: list[EvalPrompt]) -> None:
    check = CorrectnessCheck(llm, prompts, ANSWERS, batch=4)
    score = check.median_score()
    case = Case("early", replace(ANSWERS, mode="early_exit", exit_thresholds=(score,)), 4)
    results = check._results(case)
    shares = [token.is_final for result in results for token in result.tokens]
    assert 0 < sum(shares) < len(shares)  # some leave, some do not
    assert check.run_early_exit(case).differences == []
    broken = replace(results[1], tokens=tuple(
        replace(token, token=(token.token + 1) % 90) if place == 5 else token
        for place, token in enumerate(results[1].tokens)
    ))  # fmt: skip
    with mock.patch.object(check, "_results", lambda _: [results[0], broken, *results[2:]]):
        (found,) = check.run_early_exit(case).differences
    assert (found.prompt, found.position) == ("text:1", 5) and found.expected == results[1].token_ids[5]
    assert found.gap >= found.margin > 0


def test_stale_keys_and_values_are_an_error(llm: LLM, prompts: list[EvalPrompt]) -> None:
    """The check must see what it is for: here deferred rows never reach the deep layers' caches."""
    check = CorrectnessCheck(llm, prompts, ANSWERS, batch=4)
    drafts = Case("drafts", replace(ANSWERS, mode="self_speculative", draft_exit=1, draft_length=3), 4)
    assert check.run(drafts).row(1e-3)["errors"] == 0
    decoder = decoder_of(llm.engine)
    usual = decoder.run_layers

    def forgetful(hidden: torch.Tensor, attention: Any, first: int, stop: int) -> torch.Tensor:
        out = usual(hidden, attention, first, stop)
        if first > 0:
            decoder.cache.layers()[stop - 1].mul_(0.5)
        return out

    with mock.patch.object(decoder, "run_layers", forgetful):
        assert check.run(drafts).row(1e-3)["errors"] > 0


def test_correctness_over_ranks_and_stages(checkpoint: Path, texts: list[str], tmp_path: Path) -> None:
    words = (
        "correctness", "--load", checkpoint, "--data-path", texts[0], "--prompts", 2, "--prompt-length", 8,
        "--answer-tokens", 4, "--batch", 2, "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2,
        "--output", tmp_path / "out.json",
    )  # fmt: skip
    assert run(*words) == 0
    document = read_document(tmp_path / "out.json")
    rows = document["results"]["rows"]
    assert document["model"]["pipeline_parallel_size"] == document["model"]["tensor_parallel_size"] == 2
    assert document["model"]["dtype"] == "float32" and document["settings"]["tolerance"] == 1e-3
    kinds = {row["settings"].get("speculation") for row in rows}
    assert kinds == {None, "draft_then_verify", "across_stages", "auto"}  # auto: of drafts from earlier text
    assert all(row["prompts"] == 2 and row["errors"] == 0 for row in rows)


# transformers


@pytest.fixture(scope="module")
def their_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of transformers, our checkpoint of the same model with exits)"""
    folder = tmp_path_factory.mktemp("llama")
    return folder / "hf", plain_model(folder)


@pytest.fixture(scope="module")
def words_of_text(their_model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    values = [{"ids": [(13 * i + j * j) % 250 for j in range(6 + i % 3)]} for i in range(4)]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return "--load", their_model[1], "--prompts-file", path, "--answer-tokens", 8


def test_correctness_against_transformers(
    their_model: tuple[Path, Path], words_of_text: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("correctness", *words_of_text, "--batch", 3, "--output", tmp_path / "out.json")
    assert run(*words, "--hf", their_model[0]) == 0
    row = read_document(tmp_path / "out.json")["results"]["rows"][-1]
    assert (row["name"], row["identical"], row["prompts"]) == ("transformers", 4, 4) and row["tokens"] <= 32
    other = transformers.AutoModelForCausalLM.from_pretrained(their_model[0])
    with torch.no_grad():
        other.lm_head.weight[7] += 100.0  # another model, and so other answers
    other.save_pretrained(tmp_path / "other")
    assert run(*words, "--hf", tmp_path / "other") == 1
    row = read_document(tmp_path / "out.json")["results"]["rows"][-1]
    assert row["errors"] == len(row["first_differences"]) > 0
    assert "ERRORS" in capsys.readouterr().out


def test_benchmark_beside_transformers(
    their_model: tuple[Path, Path], words_of_text: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("benchmark", *words_of_text, "--batch", 1, 3, "--rounds", 2, "--prompts", 3, "--ignore-eod", "--output")
    assert run(*words, tmp_path / "out.json", "--transformers", their_model[0]) == 0
    results = read_document(tmp_path / "out.json")["results"]
    assert [(row["batch"], row["name"]) for row in results["rows"]] == [
        (batch, name) for batch in (1, 3) for name in ("full", "threshold 0.8", "draft with exit 2, length adaptive")
    ]
    assert [(row["batch"], row["name"]) for row in results["beside"]] == [
        (1, "transformers"), (1, "transformers, prompt lookup"), (3, "transformers"),
    ]  # fmt: skip
    assert results["transformers"] == results["beside"][0] and results["transformers"]["speedup"] > 0
    assert all(row["first_token_seconds"] > 0 for row in (*results["rows"], *results["beside"]))
    parts = results["step"]
    assert [(one["batch"], one["part"]) for one in parts] == [
        (batch, part) for batch in (1, 3) for part in ("layers", "final head", "rest")
    ]
    full = {one["batch"]: one for one in results["per_prompt"] if one["name"] == "full"}
    for batch, numbers in full.items():
        step = sum(one["seconds"] for one in parts if one["batch"] == batch)
        assert step == pytest.approx(min(map(min, numbers["fastest_step_seconds"])))
        assert step <= batch * np.divide(numbers["decode_seconds"], numbers["decode_tokens"]).min() * (1 + 1e-9)
        assert sum(one["share"] for one in parts if one["batch"] == batch) == pytest.approx(1)
    assert "where a step of the full model goes" in capsys.readouterr().out


# What cannot be done, and what is interrupted


@pytest.mark.parametrize(("words", "message"), [
    (["exits", "--prompt-length", "1"], "--prompt-length is 1; it must lie between 2 and"),
    (["exits", "--prompt-length", "41"], "the longest that all models take, 40"),
    (["exits", "--compare", "nowhere"], "nowhere: no such folder"),
    (["exits", "--output", "."], "--output .: this is a folder"),
    (["sweep", "--thresholds", "1.5"], "an exit threshold is 1.5"),
    (["sweep", "--thresholds", "--draft-lengths", "--certified"], "there is nothing to compare with the full model"),
    (["sweep", "--draft-exits", "9"], "draft_exit is 9, but the model's exits are 1, 2, 3"),
    (["sweep", "--draft-lengths", "0"], "draft_length is 0"),
    (["sweep", "--certified", "0.99"], "certified:0.99 needs a certificate"),
    (["sweep", "--batch", "0"], "--batch (0) and --rounds (3) must be at least 1"),
    (["sweep", "--batch", "4", "--max-requests", "2"], "--max-requests is 2, but 4 prompts are answered at once"),
    (["sweep", "--csv", "."], "--csv .: this is a folder"),
    (["sweep", "--answer-tokens", "1"], "--answer-tokens is 1; it must be at least 2"),
    (["sweep", "--answer-tokens", "20", "--prompt-length", "22"], "the model takes 1 to 21"),
    (["sweep", "--prompts", "3", "--batch", "9"], "9 prompts are needed, but"),
    (["benchmark", "--transformers", "nowhere", "--batch", "1"], "nowhere: no such folder"),
    (["correctness", "--batch", "0"], "--batch is 0"),
    (["correctness", "--temperature", "0"], "--temperature must be above 0"),
    (["correctness", "--hf", "nowhere"], "nowhere: no such folder"),
    (["correctness", "--load-iteration", "7"], "iter_0000007 does not exist"),
    (["correctness", "--data-path", "nowhere"], "nowhere.idx does not exist"),
])  # fmt: skip
def test_what_cannot_be_evaluated(
    words: list[str], message: str, checkpoint: Path, texts: list[str], capsys: pytest.CaptureFixture
) -> None:
    command, *others = words
    lengths = [] if command == "exits" else ["--prompt-length", "8", "--answer-tokens", "6"]
    before = sorted(checkpoint.rglob("*"))
    assert run(command, "--load", checkpoint, "--data-path", texts[0], *lengths, *others) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""
    assert sorted(checkpoint.rglob("*")) == before


def test_an_interruption_leaves_earlier_results(
    checkpoint: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "sweep", "--load", checkpoint, "--data-path", texts[0], "--prompts", 2, "--prompt-length", 8, "--rounds", 1,
        "--answer-tokens", 4, "--thresholds", 0.5, "--draft-lengths", "--output", tmp_path / "sweep.json", "--csv",
        tmp_path / "sweep.csv",
    )  # fmt: skip
    assert run(*words) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(decoding, "time", mock.Mock(perf_counter=functools.partial(next, interrupted(20))))
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def interrupted(count: int) -> Iterator[float]:
    yield from map(float, range(count))
    raise KeyboardInterrupt
