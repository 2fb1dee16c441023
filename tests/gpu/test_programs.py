"""What a user does first on a GPU, in bf16: text, training, resuming, tuning, generation, evaluation, conversion."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.smoke.programs import ROOT, results_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]

TRAIN = (
    "pretrain_early_exit_gpt.py --bf16 --seq-length 64 --micro-batch-size 8 --global-batch-size 16 --lr 2e-3"
    " --lr-decay-iters 100 --log-interval 1 --eval-interval 20 --eval-iters 1 --split 90,5,5 --num-workers 0"
    " --data-path F/data_text_document"
)
MODEL = (
    "--num-layers 6 --hidden-size 128 --num-attention-heads 4 --group-query-attention --num-query-groups 2 --swiglu"
    " --normalization RMSNorm --disable-bias-linear --position-embedding-type rope --tokenizer-model F/tokenizer"
    " --exit-layer-nums 2 4 --use-exit-norm --exit-layer-weight 0.3 0.3 --save F/trained --load F/trained"
)
SHORT = "--data-path F/data_text_document --prompts 8 --prompt-length 8 --answer-tokens 8"
GENERATE = "tools/generate.py --load F/trained --prompt import --tokens-to-generate 16 --json"

# F stands for the folder of the test.
STEPS = {
    "corpus": "tools/stdlib_corpus.py --output F/corpus.jsonl --max-mb 1",
    "tokenizer": "tools/train_tokenizer.py --input F/corpus.jsonl --output F/tokenizer --vocab-size 500",
    "preprocess": "tools/preprocess_data.py --input F/corpus.jsonl --output-prefix F/data --tokenizer-model F/tokenizer"
    " --append-eod",
    "train": f"{TRAIN} {MODEL} --train-iters 40 --save-interval 40",
    "resume": f"{TRAIN} {MODEL} --train-iters 60",
    "full": GENERATE,
    "early exit": f"{GENERATE} --use-early-exit --early-exit-thres 0.3",
    "speculation": f"{GENERATE} --mode self_speculative",
    "n-grams": f"{GENERATE} --mode self_speculative --draft-source ngram",
    "without graphs": f"{GENERATE} --no-cuda-graphs",
    "exits": "tools/evaluate.py exits --load F/trained --data-path F/data_text_document --prompts 8 --prompt-length 32",
    "correctness": f"tools/evaluate.py correctness --load F/trained {SHORT}",
    "benchmark": f"tools/evaluate.py benchmark --load F/trained {SHORT} --batch 1 4 --rounds 1",
    "calibrate": "tools/evaluate.py calibrate --load F/trained --data-path F/data_text_document --prompts 30"
    " --prompt-length 8 --answer-tokens 8 --levels 0.5 --rounding-prompts 2",
    "certified": "tools/generate.py --load F/trained --prompt import --tokens-to-generate 8 --certified 0.5",
    "remove": "tools/convert_checkpoint.py remove-exits --load F/trained --save F/plain",
    "add": "tools/convert_checkpoint.py add-exits --load F/plain --save F/with_exits --exit-layer-nums 1 3"
    " --use-exit-mlp",
    "tune": f"{TRAIN} --train-iters 10 --tune-exit --pretrained-checkpoint F/with_exits"
    " --use-checkpoint-args --save F/tuned",
    "tune on kept hidden states": f"{TRAIN} --train-iters 10 --tune-exit --pretrained-checkpoint F/with_exits"
    " --use-checkpoint-args --cache-hidden-states F/hidden --cache-samples 64 --save F/tuned_kept",
    "distil": f"{TRAIN} --train-iters 10 --tune-exit --tune-exit-distillation 0.5 --pretrained-checkpoint F/with_exits"
    " --use-checkpoint-args --save F/distilled",
    "tuned": "tools/generate.py --load F/distilled --prompt import --tokens-to-generate 16 --use-early-exit"
    " --early-exit-thres 0.3",
    "export": "tools/convert_checkpoint.py to-hf --load F/plain --output F/exported",
}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """None in this process: the programs make their own."""
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict]:
    """Of all steps up to the first that failed."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return results_of(STEPS, folder, 300, PYTHONPATH=path)


@pytest.mark.parametrize("step", STEPS)
def test_step(step: str, results: dict[str, dict]) -> None:
    if step not in results:
        pytest.fail(f"not reached: {list(results)[-1]} failed before it")
    result = results[step]
    assert result["status"] == 0, result["output"][-2000:] + result["errors"][-4000:]


def test_losses_fall_and_go_on_where_they_were(results: dict[str, dict], folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "trained/metrics.jsonl").read_text().splitlines()]
    losses = {line["iteration"]: line["lm_loss"] for line in lines if line["kind"] == "train"}
    assert sorted(losses) == list(range(1, 61))
    assert losses[40] < 0.85 * losses[1]
    assert losses[41] < losses[20], "a resumed run goes on with the weights"


def test_lossless_ways_give_the_same_tokens(results: dict[str, dict]) -> None:
    """In bf16 products of several rows may round otherwise than those of one: nearly all tokens are the same."""
    tokens = {}
    for step in ("full", "speculation", "n-grams", "without graphs"):
        tokens[step] = [token["token"] for token in json.loads(results[step]["output"].splitlines()[0])["tokens"]]
        assert len(tokens[step]) == 16
    for step, ours in tokens.items():
        assert ours[:4] == tokens["full"][:4], step
