"""The tuning recipe from a Hugging Face folder to tuned exits: what each step makes, and runs that are killed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron.early_exit.checkpoint.store import read_checkpoint
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.data.conversations import prompt_and_answer
from megatron.early_exit.evaluation.own_answers import AnswersFolder
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.tuning.command_line import main
from tests.data_files import write_documents
from tests.integration.test_training_program import ROOT, environment, torchrun
from tests.server.models import chat_model

pytestmark = pytest.mark.slow

ANSWER_TOKENS, SEQ_LENGTH, PROMPTS = 6, 48, 10
QUESTIONS = [{"messages": [{"role": "user", "content": f"a small model reads {number}"}]} for number in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers, chats, text, and what two runs have made: one in peace, one that was killed."""
    path = tmp_path_factory.mktemp("recipe")
    chat_model(path)
    (path / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    write_documents(path / "text", [[3 + (number * 7 + place) % 90 for place in range(12)] for number in range(30)])
    return path


@pytest.fixture(scope="module")
def words(folder: Path) -> list[str]:
    return [
        "--load", str(folder / "hf"), "--exit-layer-nums", "2", "4", "--use-exit-norm", "--use-exit-mlp",
        "--prompts-file", str(folder / "chats.jsonl"), "--data-path", str(folder / "text"), "--prompts", str(PROMPTS),
        "--prompt-length", "5", "--answer-tokens", str(ANSWER_TOKENS), "--temperature", "0.7",
        "--answers-to-each", "2", "--held-out", "0.2", "--seq-length", str(SEQ_LENGTH), "--global-batch-size", "4",
        "--train-iters", "40",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(folder: Path, words: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.integration.killed_recipes", str(folder), *words]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout.splitlines()[-1])


def heads(folder: Path) -> list[dict[str, Any]]:
    results = json.loads((folder / "exits.json").read_text())["results"]
    kept = lambda rows: [{key: value for key, value in row.items() if key != "cost_in_layers"} for row in rows]
    return [kept(results["heads"]), *(kept(one["heads"]) for one in results["compare"])]


def test_a_recipe_that_is_killed_again_and_again_makes_the_same(folder: Path, runs: dict[str, Any]) -> None:
    log = (folder / "killed.log").read_text()
    *renames, at_work, told, last = runs["killed"]
    assert runs["whole"] == 0, (folder / "whole.log").read_text()
    assert set(renames) == {-9} and len(renames) >= 5, log
    assert (at_work, told, last) == (-9, 130, 0), log
    assert runs["orphans"] == []
    one, other = folder / "whole", folder / "killed"
    assert AnswersFolder(one / "answers").answers() == AnswersFolder(other / "answers").answers()
    assert len(list((other / "answers").glob("part_*"))) > 5
    for name in ("train.bin", "train.idx", "train.mask.bin", "held_out.bin", "held_out.mask.bin"):
        assert (one / "samples" / name).read_bytes() == (other / "samples" / name).read_bytes()
    tensors = [read_checkpoint(checkpoint_folder(path / "tuned"))[1] for path in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name].read(), tensors[1][name].read()) for name in tensors[0])
    assert heads(one) == heads(other)
    assert "interrupted; the same command goes on here" in log and "(goes on)" in log
    assert not list(other.rglob("*.partial*"))
    expected = {"recipe.json", "base", "exits", "answers", "samples", "hidden_states", "tuned", "exits.json"}
    assert {path.name for path in other.iterdir()} - {"run.lock"} == expected


def test_what_is_done_is_not_done_again(folder: Path, runs: dict[str, Any]) -> None:
    assert runs["again"] == 0
    steps = [line for line in (folder / "again.log").read_text().splitlines() if line.startswith("== ")]
    assert len(steps) == 6 and all(": done (" in line for line in steps)


def test_answers_are_the_models_and_samples_hold_them(folder: Path, words: list[str], runs: dict[str, Any]) -> None:
    """Both kinds of prompts, drawn with seeds of their own; ids as they came, in rows, with the loss on them alone."""
    answers = AnswersFolder(folder / "whole/answers")
    prompts, found = answers.prompts(), answers.answers()
    assert len(prompts) == 2 * PROMPTS and len(found) == 4 * PROMPTS
    with LLM.load(str(folder / "whole/base")) as llm:
        chats = {tuple(llm.tokenizer.chat(one["messages"])) for one in QUESTIONS}
        assert sum(prompt.ids in chats for prompt in prompts) == PROMPTS
        sampling = SamplingSettings(temperature=0.7, seed=1234)
        for number in (0, 7, 39):
            params = GenerationParams(max_tokens=ANSWER_TOKENS, sampling=sampling.of_sample(number))
            (alone,) = llm.generate([list(prompts[number // 2].ids)], params)
            assert tuple(alone.result.token_ids) == found[number].ids
        eod = llm.tokenizer.eod
    held_out = {}
    for name in ("train", "held_out"):
        rows = IndexedDataset(str(folder / "whole/samples" / name))
        masks = IndexedDataset(str(folder / "whole/samples" / f"{name}.mask"))
        texts = []
        for row, mask in zip(rows, masks, strict=True):
            assert len(row) == len(mask) == SEQ_LENGTH
            cuts = np.flatnonzero(mask & 2)[1:]
            texts += [(ids.tolist(), marks.tolist()) for ids, marks in zip(np.split(row, cuts), np.split(mask, cuts))]
        held_out[name] = [text for text in texts if any(mark & 1 for mark in text[1])]
        assert all(set(ids) == {eod} for ids, marks in texts if not any(mark & 1 for mark in marks))
    both = [prompt_and_answer(prompts[one.number // 2].ids, one.ids) for one in found]
    assert sorted(held_out["train"] + held_out["held_out"]) == sorted((text.ids, text.marks) for text in both)
    assert sorted(held_out["held_out"]) == sorted((text.ids, text.marks) for text in both[-8:])


def test_exits_follow_the_final_head_better_than_before(folder: Path, runs: dict[str, Any]) -> None:
    after, before = heads(folder / "whole")
    assert [row["layer"] for row in after] == [2, 4, 6]
    assert all(one["loss"] < other["loss"] for one, other in zip(after[:2], before[:2]))
    assert after[2] == before[2], "the layers and the final head stay what they were"
    tokens = [sum(mark & 1 for mark in text) for text in IndexedDataset(str(folder / "whole/samples/held_out.mask"))]
    assert json.loads((folder / "whole/exits.json").read_text())["results"]["tokens"] == sum(tokens)
    caching = [line for line in (folder / "whole.log").read_text().splitlines() if "caching hidden states" in line]
    assert len(caching) == 1


@pytest.mark.parametrize(("changes", "said"), [
    (["--prompts", "21"], "21 prompts are needed, but .*chats.jsonl has 20 different prompts"),
    (["--answer-tokens", "250"], "prompts are too long with an answer of 250 tokens"),
])  # fmt: skip
def test_prompts_are_refused_before_the_model_is_converted(
    folder: Path, words: list[str], changes: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*words, "--output", str(tmp_path / "out"), *changes]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def tune(folder: Path, words: list[str], *more: str, ranks: int = 0) -> subprocess.CompletedProcess:
    command = [*torchrun(ranks), "tools/tune_exits.py"] if ranks else [sys.executable, "tools/tune_exits.py"]
    return subprocess.run(
        [*command, *words, "--output", str(folder), *more], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip


def test_other_settings_are_refused_or_redo_what_depends_on_them(
    folder: Path, words: list[str], runs: dict[str, Any]
) -> None:
    before = json.loads((folder / "killed/recipe.json").read_text())
    refused = tune(folder / "killed", words, "--lr", "1e-3")
    assert refused.returncode == 2 and "lr: 0.001 in place of 0.005" in refused.stderr
    assert "--redo: it does again training, report, and keeps the other steps" in refused.stderr
    assert json.loads((folder / "killed/recipe.json").read_text()) == before
    wrong = tune(folder / "killed", words, "--redo", "--", "--lr-warmup-itres", "3")
    assert wrong.returncode == 2 and "unknown flag --lr-warmup-itres" in wrong.stderr
    assert json.loads((folder / "killed/recipe.json").read_text()) == before
    plan = tune(folder / "killed", words, "--lr", "1e-3", "--dry-run")
    assert plan.returncode == 0 and plan.stdout.count("needs --redo") == 2 and plan.stdout.count(" done ") == 4
    assert json.loads((folder / "killed/recipe.json").read_text()) == before


def test_two_ranks_train_what_the_first_has_prepared(folder: Path, words: list[str], runs: dict[str, Any]) -> None:
    """Beginning at another learning rate: the training alone is done again, by both, on the hidden states kept."""
    result = tune(folder / "killed", words, "--lr", "4e-3", "--redo", ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "done again: training, report (training (lr: 0.004 in place of 0.005))" in result.stdout
    assert "2 ranks = TP 1 x PP 1 x DP 2" in result.stdout and "caching hidden states" not in result.stdout
    assert "1 other ranks wait" in result.stdout
    after, before = heads(folder / "killed")
    assert all(one["loss"] < other["loss"] for one, other in zip(after[:2], before[:2]))
