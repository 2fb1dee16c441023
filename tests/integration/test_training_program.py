"""The real commands on a tiny model: prepare, train over two stages, stop, resume, generate, refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data_files import write_documents
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
MODEL = [
    "--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "32", "--swiglu",
    "--normalization", "RMSNorm", "--position-embedding-type", "rope", "--disable-bias-linear",
    "--hidden-dropout", "0", "--attention-dropout", "0", "--make-vocab-size-divisible-by", "16",
    "--exit-layer-nums", "2", "3", "--exit-layer-weight", "0.25", "0.5", "--use-exit-norm",
]  # fmt: skip
TRAINING = [
    "--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "1e-2", "--lr-warmup-iters", "2",
    "--log-interval", "1", "--num-workers", "0", "--tokenizer-type", "ByteLevelTokenizer", "--split", "80,10,10",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("program")
    lines = [
        json.dumps({"text": f"document {n}: the quick brown fox jumps over the lazy dog. " * 4}) for n in range(60)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    run_tool("tools/preprocess_data.py", "--input", str(folder / "corpus.jsonl"), "--output-prefix",
             str(folder / "bytes"), "--tokenizer-type", "ByteLevelTokenizer", "--append-eod")  # fmt: skip
    return str(folder / "bytes_text_document")


def environment() -> dict[str, str]:
    joined = lambda first, name: os.pathsep.join(filter(None, [str(first), os.environ.get(name)]))
    return {
        **os.environ, "PYTHONPATH": joined(ROOT, "PYTHONPATH"), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
        "PATH": joined(Path(sys.executable).parent, "PATH"),  # scripts call python and torchrun by name
    }  # fmt: skip


def run_tool(*words: str, timeout: int = 120) -> subprocess.CompletedProcess:
    result = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True,
                            timeout=timeout)  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def torchrun(world_size: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(world_size),
        "--master_port",
        str(free_port()),
    ]


def train(world_size: int, *flags: str, timeout: int = 180) -> subprocess.CompletedProcess:
    command = [*torchrun(world_size), "pretrain_early_exit_gpt.py", *MODEL, *TRAINING, *flags]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


def records(path: Path, kind: str) -> list[dict]:
    return [record for record in map(json.loads, path.read_text().splitlines()) if record["kind"] == kind]


def test_train_resume_and_generate(data: str, tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    common = ["--data-path", data, "--save", str(folder), "--load", str(folder), "--eval-interval", "10",
              "--eval-iters", "1", "--tensorboard-dir", str(tmp_path / "tb"), "--log-timers-to-tracker",
              "--log-throughput"]  # fmt: skip
    first = train(2, *common, "--pipeline-model-parallel-size", "2", "--train-iters", "30", "--exit-interval", "20",
                  "--lr-decay-iters", "30")  # fmt: skip
    assert first.returncode == 0, first.stdout + first.stderr
    assert "PP 2" in first.stdout and "exits 2" in first.stdout and "exits 3" in first.stdout
    assert "early loss [2]" in first.stdout and "early loss [3]" in first.stdout
    assert "stopped after iteration 20: --exit-interval 20" in first.stdout

    second = train(2, *common, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--train-iters", "30")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "training goes on at iteration 20" in second.stdout
    assert "nothing is left to train" not in second.stdout

    third = train(1, *common, "--train-iters", "30")
    assert third.returncode == 0, third.stdout + third.stderr
    assert "nothing is left to train: --train-iters or --train-samples is reached" in third.stdout

    trained = records(folder / "metrics.jsonl", "train")
    assert [record["iteration"] for record in trained] == list(range(1, 31))
    for key in ("lm_loss", "exit_loss/layer_2", "exit_loss/layer_3"):
        assert trained[-1][key] < trained[0][key] - 0.5, key
    assert trained[0]["timers/forward-compute_ms"] > 0
    assert trained[0]["tflops_per_rank"] > 0
    validated = records(folder / "metrics.jsonl", "valid")
    assert [record["iteration"] for record in validated] == [10, 20, 30]
    assert validated[-1]["exit_loss/layer_2"] < validated[0]["exit_loss/layer_2"]
    assert len(records(folder / "metrics.jsonl", "test")) >= 1
    assert list((tmp_path / "tb").iterdir())

    prompt = ["--load", str(folder), "--prompt", "the quick", "--tokens-to-generate", "8", "--json"]
    generated = run_tool("tools/generate.py", *prompt, "--use-early-exit", "--early-exit-thres", "0")
    assert '"exit_layer": 2' in generated.stdout
    full = run_tool("tools/generate.py", *prompt)
    assert '"exit_layer": 2' not in full.stdout and '"exit_layer": 4' in full.stdout
    others = write_documents(
        tmp_path / "others", [list(f"{number} quick brown foxes".encode()) for number in range(40)]
    )
    calibrated = run_tool(
        "tools/evaluate.py", "calibrate", "--load", str(folder), "--data-path", others, "--prompts", "30",
        "--prompt-length", "8", "--answer-tokens", "4", "--levels", "0.5", "--shortlist-size", "20",
    )  # fmt: skip
    assert "20 frequent tokens cover" in calibrated.stdout
    drafted, planned, in_int8 = (
        [json.loads(line) for line in run_tool("tools/generate.py", *prompt, *flags).stdout.splitlines()]
        for flags in (
            ("--prompt", "brown fox", "--mode", "self_speculative", "--draft-length", "2"),
            ("--use-early-exit", "--early-exit-thres", "0.5", "--plan-exits", "--shortlist"),
            ("--quantize", "all", "--top-k", "5", "--samples", "2", "--stop", "zzz"),
        )
    )
    expected = json.loads(full.stdout.splitlines()[-1])
    assert drafted[0]["text"] == expected["text"] and drafted[1]["prompt"] == "brown fox"
    assert len(planned) == 1 and len(planned[0]["tokens"]) == 8
    assert len(in_int8) == 2
    picture = tmp_path / "losses.png"
    run_tool("tools/plot_losses.py", str(folder / "metrics.jsonl"), "--output", str(picture))
    assert picture.stat().st_size > 10_000


def test_training_in_idle_time(data: str, tmp_path: Path) -> None:
    """Plans from the command line, with the picture of an iteration; the tool simulates with what was measured."""
    flags = ["--data-path", data, "--pipeline-model-parallel-size", "2", "--eval-iters", "0", "--exits-in-bubbles",
             "--fill-explicit-bubbles", "--profile-pipeline", str(tmp_path / "profile.svg"),
             "--metrics-file", str(tmp_path / "metrics.jsonl"),
             "--num-workers", "1"]  # fmt: skip
    result = train(2, *flags, "--train-iters", "12", "--lr-decay-iters", "12")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "plan        exits in idle time, bubbles filled when the stages are measured" in result.stdout
    assert "measured: a backward takes" in result.stdout and "profile of the pipeline: " in result.stdout
    assert "iteration       12/      12" in result.stdout
    assert (tmp_path / "profile.svg").read_text().count("rank 1") == 2  # predicted and measured
    planned = run_tool("tools/plan_pipeline.py", "--costs", str(tmp_path / "profile.json"), "--num-microbatches", "4")
    assert "exits in idle time" in planned.stdout


def test_sigterm_saves_and_stops(data: str, tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    command = [sys.executable, "pretrain_early_exit_gpt.py", *MODEL, *TRAINING, "--data-path", data,
               "--save", str(folder), "--train-iters", "100000", "--exit-signal-handler", "--num-workers", "2",
               "--eval-iters", "0"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    for line in process.stdout:
        if "iteration        3/" in line:
            os.killpg(process.pid, signal.SIGTERM)  # as torchrun does: processes that load data get it too
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 0
    assert ": SIGTERM" in rest and "saved iteration" in rest
    saved = int((folder / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < 100000 and (folder / f"iter_{saved:07d}" / "run_config.yaml").exists()


def test_a_disk_that_takes_no_more_ends_all_ranks_and_keeps_the_last_checkpoint(data: str, tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    flags = ["--pipeline-model-parallel-size", "2", "--data-path", data, "--save", str(folder), "--load", str(folder),
             "--eval-iters", "0", "--data-cache-path", str(tmp_path / "cache")]  # fmt: skip
    first = train(2, *flags, "--train-iters", "3")
    assert first.returncode == 0, first.stdout + first.stderr
    limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *torchrun(2), "pretrain_early_exit_gpt.py", *MODEL,
               *TRAINING, *flags, "--train-iters", "5", "--override-opt-param-scheduler"]  # fmt: skip
    failed = subprocess.run(limited, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=150)
    assert failed.returncode != 0
    assert "saving iteration 5" in failed.stderr and "Earlier checkpoints are untouched" in failed.stderr
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert not (folder / "iter_0000005").exists()
    resumed = train(2, *flags, "--train-iters", "5", "--override-opt-param-scheduler")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "5"


@pytest.mark.parametrize(("world_size", "flags", "message"), [
    (2, ["--pipeline-model-parallel-size", "3"], "3"),  # more of this kind: tests/unit/test_validate.py
    (2, ["--data-path", "/nowhere/prefix"], "/nowhere/prefix"),
    (1, ["--load", "/nowhere/checkpoints"], "/nowhere/checkpoints"),
    (2, ["--pipeline-model-parallel-size", "2", "--fill-explicit-bubbles", "--num-fill-warmup-microbatches", "1",
         "--num-fill-cooldown-microbatches", "0"], "Use at most 0"),
], ids=str)  # fmt: skip
def test_bad_input_is_said_once_and_ends_all_ranks(data: str, world_size: int, flags: list[str], message: str) -> None:
    started = time.monotonic()
    result = train(world_size, "--data-path", data, "--train-iters", "5", "--eval-iters", "0", *flags)
    assert result.returncode != 0
    # torchrun adds a report of its own; ours is one line that says what is wrong.
    errors = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error")]
    assert len(errors) == 1, result.stderr
    assert message in result.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in result.stderr
    assert time.monotonic() - started < 120


@pytest.mark.parametrize("clip", ["1", "0"])
def test_divergence_ends_the_run_before_such_weights_are_saved(data: str, tmp_path: Path, clip: str) -> None:
    """With --clip-grad 0 core computes no gradient norm, and the losses show it."""
    flags = ["--train-iters", "6", "--save", str(tmp_path), "--save-interval", "1", "--log-interval", "100"]
    command = [sys.executable, "pretrain_early_exit_gpt.py", *MODEL, *TRAINING, *flags, "--data-path", data]
    command += ["--lr", "1e30", "--lr-warmup-iters", "0", "--clip-grad", clip, "--optimizer", "sgd"]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "training has diverged" in run.stderr, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    saved = [int(path.name.removeprefix("iter_")) for path in tmp_path.glob("iter_???????")]
    assert max(saved, default=0) < 6
