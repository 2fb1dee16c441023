"""All programs once, each on what the ones before it made: from a corpus to a tuned model that generates.

That they start, take each other's files, end with status 0, and say what they should and nothing of the libraries.
Whether what they do is right is for the other tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.smoke.programs import ROOT, results_of

TRAIN = "pretrain_early_exit_gpt.py"
LENGTH = "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3 --num-workers 0"
MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --swiglu --normalization RMSNorm --disable-bias-linear"
    " --position-embedding-type rope --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 16"
)
REPORTS = "--log-interval 1 --eval-interval 2 --eval-iters 1 --split 80,10,10"

# F stands for the folder of the test. Names of steps are for the assertions below.
STEPS = {
    "corpus": "tools/stdlib_corpus.py --output F/corpus.jsonl --max-mb 0.1",
    "tokenizer": "tools/train_tokenizer.py --input F/corpus.jsonl --output F/tokenizer --vocab-size 300",
    "preprocess": "tools/preprocess_data.py --input F/corpus.jsonl --output-prefix F/data --tokenizer-model F/tokenizer"
    " --append-eod",
    "train": f"{TRAIN} {MODEL} {LENGTH} {REPORTS} --exit-layer-nums 2 --use-exit-norm --tokenizer-model F/tokenizer"
    " --data-path F/data_text_document --save F/trained",
    "plot": "tools/plot_losses.py F/trained/metrics.jsonl --output F/losses.svg",
    "generate": "tools/generate.py --load F/trained --prompt import --tokens-to-generate 4 --use-early-exit"
    " --early-exit-thres 0",
    "exits": "tools/evaluate.py exits --load F/trained --data-path F/data_text_document --prompts 4 --prompt-length 8",
    "sweep": "tools/evaluate.py sweep --load F/trained --data-path F/data_text_document --prompts 2 --prompt-length 4"
    " --answer-tokens 4 --rounds 1 --thresholds 0.5 --draft-lengths 2 --csv F/sweep.csv",
    "calibrate": "tools/evaluate.py calibrate --load F/trained --data-path F/data_text_document --prompts 10"
    " --prompt-length 4 --answer-tokens 4 --levels 0.5 --rounding-prompts 2",
    "remove": "tools/convert_checkpoint.py remove-exits --load F/trained --save F/plain",
    "export": "tools/convert_checkpoint.py to-hf --load F/plain --output F/exported",
    "import": "tools/convert_checkpoint.py from-hf --input F/exported --save F/imported",
    "add": "tools/convert_checkpoint.py add-exits --load F/imported --save F/with_exits --exit-layer-nums 1 3"
    " --use-exit-norm",
    "tune": f"{TRAIN} {LENGTH} {REPORTS} --tune-exit --pretrained-checkpoint F/with_exits --use-checkpoint-args"
    " --data-path F/data_text_document --save F/tuned --load F/tuned",
    "inspect": "tools/convert_checkpoint.py inspect --load F/tuned",
    "reshard": "tools/convert_checkpoint.py reshard --load F/tuned --save F/resharded --tensor-model-parallel-size 2",
    "draft": "tools/generate.py --load F/resharded --prompt import --tokens-to-generate 4 --mode self_speculative"
    " --draft-length 2 --json",
    "to Megatron": "tools/convert_checkpoint.py to-megatron --load F/plain --output F/megatron",
    "from Megatron": "tools/convert_checkpoint.py from-megatron --load F/megatron --save F/from_megatron"
    " --tokenizer-model F/tokenizer",
    "one exit": "tools/convert_checkpoint.py to-hf --load F/tuned --output F/exit_1 --exit 1",
    "verify": "tools/convert_checkpoint.py inspect --load F/from_megatron --verify",
    "plan": "tools/plan_pipeline.py --case 1.3B --num-microbatches 8 --output F/plan.svg",
    "dry run": f"{TRAIN} {MODEL} {LENGTH} --mock-data --vocab-size 300 --dry-run",
}

SAID = {
    "corpus": "documents",
    "tokenizer": "300 ids",
    "preprocess": "tokens",
    "train": "test at iteration 2",
    "plot": "wrote",
    "generate": "stopped by max_tokens",
    "exits": "exit 2",
    "sweep": "threshold 0.5",
    "calibrate": "certified:0.5 (A-max, delta 0.05)",
    "export": "llama",
    "inspect": "after layers 1, 3",
    "tune": "early loss [3]",
    "draft": '"tokens"',
    "to Megatron": "Megatron",
    "from Megatron": "no exits",
    "one exit": "llama",
    "plan": "rank",
    "dry run": "stage 0",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict]:
    """Of all steps up to the first that failed."""
    return results_of(STEPS, folder, 400, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("step", STEPS)
def test_step(step: str, results: dict[str, dict]) -> None:
    if step not in results:
        pytest.fail(f"not reached: {list(results)[-1]} failed before it")
    result = results[step]
    assert result["status"] == 0, result["output"] + result["errors"]
    assert SAID.get(step, "") in result["output"], result["output"]
    libraries = [line for line in result["errors"].splitlines() if "Warning" in line or "site-packages" in line]
    assert not libraries, result["errors"]


def test_every_tool_is_run() -> None:
    tools = {f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")}
    run = {step.split()[0] for step in STEPS.values()}
    elsewhere = {
        "tools/make_flags_doc.py",  # writes the documentation: tests/unit/test_flags.py
        "tools/make_api_docs.py",  # the same: tests/unit/test_api_docs.py
        "tools/tune_exits.py",  # tests/integration/test_tuning_recipe.py
        "tools/run_text_generation_server.py", "tools/request_client.py",  # run side by side: tests/server
    }  # fmt: skip
    assert tools - run == elsewhere
    assert TRAIN in run
