"""What tools/evaluate_exits.py says of a model's exits follows from the reference's logits."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from tests.configs import VOCAB_SIZE, make_config
from tests.data_files import write_documents
from tests.distributed.engines import reference_over
from tests.distributed.parallel_model import layout
from tests.distributed.test_added_exits import save
from tests.distributed.workers import run_distributed


def run_tool(words: list[str]) -> tuple[int, str]:
    """(exit status, what it says of errors)"""
    from megatron.early_exit.evaluation.evaluate_command import main

    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(words)
    return status, errors.getvalue()


def run_tool_with_output(words: list[str]) -> tuple[int, str, str]:
    """(exit status, what it prints, what it says of errors)"""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status, errors = run_tool(words)
    return status, output.getvalue(), errors


def expected_quality(cfg: RunConfig, documents: list[list[int]]) -> list[dict[str, float]]:
    with layout(cfg):
        sums: list[dict[str, float]] = []
        total = 0
        for document in documents:
            _, logits = reference_over(cfg, document[:-1])
            labels, final = torch.tensor(document[1:]), logits[None].argmax(-1)
            sums = sums or [dict.fromkeys(("loss", "accuracy", "agreement", "confidence"), 0.0) for _ in logits]
            for one, head in zip(sums, logits.values(), strict=True):
                log_probs = head.log_softmax(-1)
                one["loss"] -= log_probs.gather(1, labels[:, None]).sum().item()
                one["accuracy"] += (log_probs.argmax(-1) == labels).sum().item()
                one["agreement"] += (log_probs.argmax(-1) == final).sum().item()
                one["confidence"] += log_probs.amax(-1).exp().sum().item()
            total += len(labels)
        return [{name: value / total for name, value in one.items()} for one in sums]


def test_quality_of_exits(tmp_path: Path) -> None:
    cfg = make_config(use_exit_norm=True, max_position_embeddings=128)
    cfg = replace(cfg, data=replace(cfg.data, vocab_size=VOCAB_SIZE - 1))
    run_distributed(1, save, cfg=cfg, folder=tmp_path / "model")
    documents = [[(7 * i + j * j) % (VOCAB_SIZE - 1) for j in range(40 + i)] for i in range(3)]
    prefix = write_documents(tmp_path / "text", documents)
    words = [
        "--load", str(tmp_path / "model"), str(tmp_path / "model"), "--data-path", prefix, "--tokens", "1000",
        "--thresholds", "0.0", "1.0", "--prompts", "2", "--answer-tokens", "8", "--output", str(tmp_path / "out.json"),
    ]  # fmt: skip
    assert run_distributed(1, run_tool, words=words)[0][0] == 0
    one, two = json.loads((tmp_path / "out.json").read_text())
    assert one["heads"] == two["heads"] and one["tokens"] == sum(map(len, documents))
    (expected,) = run_distributed(1, expected_quality, cfg=cfg, documents=documents)
    for head, (layer, numbers) in zip(one["heads"], zip((2, 3, 4), expected, strict=True), strict=True):
        assert (head["layer"], head["is_final"]) == (layer, layer == 4)
        for name, value in numbers.items():
            assert head[name] == pytest.approx(value, rel=1e-4), name
    full, always, never = one["decoding"]
    assert [way["name"] for way in one["decoding"]] == ["full", "threshold 0", "threshold 1"]
    assert full["agreement"] == never["agreement"] == 1.0 and full["perplexity"] == never["perplexity"]
    assert full["runs_saved"] == never["runs_saved"] == 0.0 and always["runs_saved"] == pytest.approx(0.5)
    assert always["agreement"] < 1.0 < full["perplexity"] < always["perplexity"]


@pytest.mark.parametrize(("words", "message"), [
    (["--tokens", "1"], "--tokens and --answer-tokens must be at least 2"),
    (["--sequence-length", "500"], "--sequence-length is 500; the model takes 2 to 128"),
    (["--sequence-length", "0"], "--sequence-length is 0; the model takes 2 to 128"),
    (["--thresholds", "0.5", "1.5"], "an exit threshold is 1.5"),
    (["--thresholds", "0.5", "--answer-tokens", "120"], "room for --answer-tokens 120; the model takes 128"),
    (["--thresholds", "0.5", "--sequence-length", "20"], "no sampled sequence of"),
    (["--output", "."], "--output .: this is a folder"),
    (["--load-iteration", "7"], "iter_0000007 does not exist"),
    (["--data-path", "nowhere"], "nowhere"),
    (["--load", "nowhere"], "nowhere"),
])  # fmt: skip
def test_what_cannot_be_evaluated(words: list[str], message: str, tmp_path: Path) -> None:
    cfg = make_config(use_exit_norm=True, max_position_embeddings=128)
    run_distributed(1, save, cfg=cfg, folder=tmp_path / "model")
    prefix = write_documents(tmp_path / "text", [list(range(40))])
    words = ["--load", str(tmp_path / "model"), "--data-path", prefix, *words]
    ((status, text),) = run_distributed(1, run_tool, words=words)
    assert status == 2 and message in text


def test_all_checkpoints_are_looked_at_first(tmp_path: Path) -> None:
    cfg = make_config(use_exit_norm=True, max_position_embeddings=128)
    run_distributed(1, save, cfg=cfg, folder=tmp_path / "model")
    prefix = write_documents(tmp_path / "text", [list(range(40))])
    words = ["--load", str(tmp_path / "model"), str(tmp_path / "nowhere"), "--data-path", prefix]
    ((status, said, text),) = run_distributed(1, run_tool_with_output, words=words)
    assert status == 2 and "nowhere: no such folder" in text and said == ""
