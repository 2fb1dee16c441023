"""Tuning on token files with a loss mask: what is masked gives no gradient, whatever it says; texts see themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.early_exit.data.conversations import MarkedTokens, prompt_and_answer
from megatron.early_exit.tuning.samples import write_samples
from tests.configs import VOCAB_SIZE
from tests.data_files import write_token_files
from tests.distributed.test_tuning import HEADS, TP2, UNTIED, base_model, tune, weights_of

LENGTH = 12  # of a sample of the small configuration
DISTILLED = {**UNTIED, "tune_exit_distillation": 0.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    return base_model(write_token_files(folder, VOCAB_SIZE), folder / "model", **HEADS["mlp"], **UNTIED)


def rows(folder: Path, filler: int, order: int = 1, answers: bool = True) -> str:
    """Two short texts in each row, and what fills it. order: in which the two stand."""
    texts = []
    for number in range(30):
        pair = [
            prompt_and_answer([(number + 7 * place) % 90 for place in range(3)], [(3 * number + 1) % 90, 5]),
            prompt_and_answer([(2 * number + 1) % 90], [(number + place) % 90 for place in range(4)]),
        ][::order]
        texts += pair
    if not answers:
        texts = [MarkedTokens(text.ids, [mark & 2 for mark in text.marks]) for text in texts]
        texts.append(prompt_and_answer([1] * (LENGTH - 1), [2]))  # in the row that no epoch reaches, or one of few
    write_samples(folder / "rows", texts, LENGTH, filler, VOCAB_SIZE)
    return str(folder / "rows")


def run(folder: Path, base: str, data: str, world_size: int = 1, **changes: Any) -> tuple[list[dict], dict]:
    settings = {**HEADS["mlp"], "split": "1,0,0", "reset_attention_mask": True, **DISTILLED, **changes}
    log = tune(data, folder, base, world_size, **settings)
    return log, weights_of(folder / "ck")


@pytest.mark.parametrize(("world_size", "changes"), [
    (1, {}), (1, {"cache_samples": 8}), (2, {**TP2, "sequence_parallel": True}),
], ids=["plain", "kept hidden states", "tensor parallel"])  # fmt: skip
def test_what_is_masked_changes_no_bit(tmp_path: Path, base: str, world_size: int, changes: dict) -> None:
    """Rows that differ in what fills them alone: nothing attends to it, and nothing is to predict it."""
    results = []
    for filler in (0, 77):
        folder = tmp_path / str(filler)
        folder.mkdir()
        cache = {"cache_hidden_states": str(folder / "cache")} if "cache_samples" in changes else {}
        results.append(run(folder, base, rows(folder, filler), world_size, **changes, **cache))
    (first_log, first), (second_log, second) = results
    assert [line["exit_loss/layer_3"] for line in first_log] == [line["exit_loss/layer_3"] for line in second_log]
    assert [line["grad_norm"] for line in first_log] == [line["grad_norm"] for line in second_log]
    assert first_log[0]["grad_norm"] > 0
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_texts_of_one_row_do_not_see_each_other(tmp_path: Path, base: str) -> None:
    """The other order of two texts in a row gives the same losses, but for rounding; without the reset it does not."""
    losses = {}
    for order in (1, -1):
        for reset in (True, False):
            folder = tmp_path / f"{order} {reset}"
            folder.mkdir()
            data = rows(folder, 0, order)
            log, _ = run(folder, base, data, train_iters=1, reset_attention_mask=reset)
            losses[order, reset] = log[0]["exit_loss/layer_3"]
    assert losses[1, True] == pytest.approx(losses[-1, True], rel=1e-6)
    assert losses[1, False] != pytest.approx(losses[-1, False], rel=1e-4)
    assert losses[1, True] != pytest.approx(losses[1, False], rel=1e-4)


def test_without_answers_there_is_no_gradient(tmp_path: Path, base: str) -> None:
    log, tuned = run(tmp_path, base, rows(tmp_path, 0, answers=False), train_iters=1, global_batch_size=2,
                     weight_decay=0.0)  # fmt: skip
    assert log[0]["grad_norm"] == 0.0 and log[0]["exit_loss/layer_3"] is None
    before = weights_of(base)
    assert all(torch.equal(tuned[name], before[name]) for name in tuned)
