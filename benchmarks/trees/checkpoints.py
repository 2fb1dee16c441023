"""Checkpoints to decode with: made by the tools of one tree, since every later one must read them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Model:
    """A calibrated checkpoint with exits."""

    name: str
    folder: Path
    num_tokens: int
    """To generate in one timed run."""
    num_positions: int = 512

    @property
    def threshold(self) -> float:
        """What the first exit's confidence reaches on half of the calibration's tokens."""
        (file,) = self.folder.glob("iter_*/exit_calibration.npz")
        with np.load(file) as arrays:
            return float(np.median(arrays["confidences"][:, 0]))


def run(tree: Path, *command: str | Path) -> None:
    """Run one of the tree's programs; its output goes to the terminal. Raises CalledProcessError."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=tree, env=environment, stdout=sys.stderr)


def calibrate(tree: Path, checkpoint: Path, data: Path, tokens: int) -> None:
    """Do what planned exits need, unless it is done."""
    if list(checkpoint.glob("iter_*/exit_calibration.npz")):
        return
    if (tree / "tools/calibrate_exits.py").is_file():
        run(tree, "tools/calibrate_exits.py", "--load", checkpoint, "--data-path", data, "--tokens", str(tokens))
    else:  # later trees have records of whole answers in its place; here the confidences over a text are enough
        run(tree, Path(__file__).with_name("score_exits.py"), checkpoint, data, str(tokens))


def corpus(tree: Path, folder: Path) -> Path:
    if not (folder / "corpus.jsonl").is_file():
        run(tree, "tools/stdlib_corpus.py", "--output", folder / "corpus.jsonl")
    return folder / "corpus.jsonl"


def preprocess(tree: Path, folder: Path, tokenizer: Path, name: str) -> Path:
    """Prefix of the corpus in ids of `tokenizer`."""
    prefix = folder / name
    if not (folder / f"{name}_text_document.idx").is_file():
        run(
            tree, "tools/preprocess_data.py", "--input", corpus(tree, folder), "--output-prefix", prefix,
            "--tokenizer-model", tokenizer, "--append-eod", "--workers", "2", "--overwrite",
        )  # fmt: skip
    return folder / f"{name}_text_document"


def tiny(tree: Path, folder: Path) -> Model:
    """Two layers of 16 channels, an exit after the first: a step of it is Python, nearly all of it."""
    checkpoint, tokenizer = folder / "tiny", folder / "tiny_tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        run(
            tree, "tools/train_tokenizer.py", "--input", corpus(tree, folder), "--output", tokenizer,
            "--vocab-size", "512", "--overwrite",
        )  # fmt: skip
    data = preprocess(tree, folder, tokenizer, "tiny_data")
    if not (checkpoint / "latest_checkpointed_iteration.txt").is_file():
        run(
            tree, "pretrain_early_exit_gpt.py", "--num-layers", "2", "--hidden-size", "16", "--num-attention-heads",
            "2", "--swiglu", "--normalization", "RMSNorm", "--position-embedding-type", "rope",
            "--disable-bias-linear", "--seq-length", "64", "--max-position-embeddings", "2560",
            "--micro-batch-size", "8", "--global-batch-size", "8", "--train-iters", "50", "--lr", "0.01",
            "--exit-layer-nums", "1", "--exit-layer-weight", "1", "--use-exit-norm", "--tokenizer-model", tokenizer,
            "--data-path", data, "--split", "1,0,0", "--num-workers", "0", "--eval-iters", "0", "--save", checkpoint,
            "--save-interval", "50",
        )  # fmt: skip
    calibrate(tree, checkpoint, data, 1024)
    return Model("tiny", checkpoint, num_tokens=96, num_positions=2560)


def demo(tree: Path, folder: Path) -> Model:
    """The model of `make demo`, if `folder` (runs/demo) holds it."""
    checkpoint = folder / "checkpoints"
    if not (checkpoint / "latest_checkpointed_iteration.txt").is_file():
        raise ValueError(f"{checkpoint} holds no checkpoint; run `make demo`, or name the demo's folder with --demo")
    calibrate(tree, checkpoint, folder / "data/stdlib_text_document", 2048)
    return Model("demo", checkpoint, num_tokens=32, num_positions=128)


def smollm2(tree: Path, folder: Path) -> Model:
    """SmolLM2-135M-Instruct with an exit that nobody trained: final norm and output weight after layer 25 of 30."""
    checkpoint, base = folder / "smollm2_exits", folder / "smollm2_base"
    if not (base / "latest_checkpointed_iteration.txt").is_file():
        run(tree, "-m", "benchmarks.smollm2", "--output", folder / "gguf")
        run(tree, "tools/convert_checkpoint.py", "from-hf", "--input", folder / "gguf", "--save", base)
    if not (checkpoint / "latest_checkpointed_iteration.txt").is_file():
        run(
            tree, "tools/convert_checkpoint.py", "add-exits", "--load", base, "--save", checkpoint,
            "--init", "copy", "--exit-layer-nums", "25", "--use-exit-norm",
        )  # fmt: skip
    calibrate(tree, checkpoint, preprocess(tree, folder, base / "iter_0000000/tokenizer", "smollm2_data"), 1024)
    return Model("smollm2", checkpoint, num_tokens=10)
