"""What loading a model for inference takes: seconds and memory, of this tree and of another, by turns.

    python -m benchmarks.loading --tree ../other-checkout --rounds 7

A random Llama is written as a checkpoint; each load is a process of its own, which reads it from the page cache. Peaks
are of the resident set, above what the process had when everything was imported. What is kept may be more than the
model: on some processors weights in fp32 are kept in two forms (`worker/linear.py`). Keys and values take next to
nothing here: one request of 16 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from megatron.early_exit.checkpoint.parameters import expected_shapes
from megatron.early_exit.checkpoint.tensors import LazyTensor
from megatron.early_exit.checkpoint.writing import write_checkpoint
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig

_TIMEOUT_SECONDS = 600

# Runs with the modules of either tree: it uses nothing that changed between them.
_LOAD = """
import json, sys, time
started = time.perf_counter()
from megatron.early_exit.inference.llm import LLM
imported = time.perf_counter()

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
llm = LLM.load(sys.argv[1], dtype=sys.argv[2], max_requests=1, max_length=16)
loaded = time.perf_counter()
print(json.dumps({"import_seconds": imported - started, "load_seconds": loaded - imported,
                  "peak_bytes": memory("VmHWM") - before, "kept_bytes": memory("VmRSS") - before}))
"""


def random_llama(folder: Path, num_layers: int, seed: int, hidden_size: int = 1024) -> int:
    """Write a checkpoint of a Llama with exits into `folder`, in fp32. Returns the bytes of its parameters."""
    model = ModelConfig(
        num_layers=num_layers, hidden_size=hidden_size, num_attention_heads=16, ffn_hidden_size=11 * hidden_size // 4,
        group_query_attention=True, num_query_groups=4, max_position_embeddings=2048, position_embedding_type="rope",
        normalization="RMSNorm", swiglu=True, add_bias_linear=False, padded_vocab_size=32000,
    )  # fmt: skip
    exits = ExitConfig(exit_layer_nums=(num_layers // 4, num_layers // 2), use_exit_norm=True)
    description = ModelDescription(model, exits, TokenizerConfig("NullTokenizer", vocab_size=31999), "fp32")
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: 0.02 * torch.randn(shape, generator=generator)
    tensors = {
        name: LazyTensor(shape, torch.float32, lambda shape=shape: draw(shape))
        for name, shape in expected_shapes(model, exits).items()
    }
    write_checkpoint(folder, description, tensors)
    return sum(tensor.num_bytes for tensor in tensors.values())


def load(tree: Path, checkpoint: Path, dtype: str) -> dict[str, float]:
    """Load once in a process that imports from `tree`."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(checkpoint), dtype],
        cwd=tree, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"loading with {tree} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(trees: dict[str, Path], checkpoint: Path, dtypes: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """For each type and tree what each round took; trees take turns. The first round of all is not counted."""
    rows = []
    for dtype in dtypes:
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
        for number in range(rounds + 1):
            for name, tree in trees.items():
                one = load(tree, checkpoint, dtype)
                if number:
                    taken[name].append(one)
                print(f"{dtype}, round {number} of {rounds}, {name}: {one}", file=sys.stderr, flush=True)
        rows += [{"dtype": dtype, "tree": name, "loads": loads} for name, loads in taken.items()]
    return rows


def _median(row: dict[str, Any], name: str) -> float:
    return common.median([one[name] for one in row["loads"]])


def _table(rows: list[dict[str, Any]], model_bytes: dict[str, int]) -> str:
    header = ("tree, type", "import s", "load s", "peak MiB", "kept MiB", "peak / kept", "kept / model")
    cells = []
    for row in rows:
        peak, kept = _median(row, "peak_bytes"), _median(row, "kept_bytes")
        cells.append((
            f"{row['tree']}, {row['dtype']}", _median(row, "import_seconds"), _median(row, "load_seconds"),
            int(peak / common.MIB), int(kept / common.MIB), peak / kept, kept / model_bytes[row["dtype"]],
        ))  # fmt: skip
    return common.format_table(header, cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="checkout to compare with")
    parser.add_argument("--rounds", type=int, default=7, help="loads of each tree in each type")
    parser.add_argument(
        "--layers", type=int, default=16, help="of the random Llama: 47 MB each, and 131 MB beside them"
    )
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--output", type=Path, help="file for the JSON")
    settings = parser.parse_args(argv)
    trees = {"this": common.ROOT} | ({"other": settings.tree.resolve()} if settings.tree else {})
    machine, seed = common.machine_info(), 0
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = random_llama(Path(folder), settings.layers, seed)
        rows = measure(trees, Path(folder), settings.dtypes, settings.rounds)
    model_bytes = {"fp32": num_bytes, "bf16": num_bytes // 2}
    print(_table(rows, model_bytes))
    this = {row["dtype"]: row for row in rows if row["tree"] == "this"}
    ratios = {
        row["dtype"]: {
            name: common.median_ratio(*([one[name] for one in side["loads"]] for side in (row, this[row["dtype"]])))
            for name in ("import_seconds", "load_seconds", "peak_bytes")
        }
        for row in rows
        if row["tree"] == "other"
    }
    peaks = {dtype: _median(row, "peak_bytes") / _median(row, "kept_bytes") for dtype, row in this.items()}
    document = common.result_document(
        "loading", machine,
        {"rounds": settings.rounds, "layers": settings.layers, "model_bytes": model_bytes, "device": "cpu",
         "threads": torch.get_num_threads(), "other_commit": common.commit(settings.tree) if settings.tree else None},
        seed, {"loads": rows, "other_over_this": ratios},
        {"little_beside_what_is_kept": {"met": all(peak < 1.2 for peak in peaks.values()), "peak_over_kept": peaks}},
    )  # fmt: skip
    common.finish(document, settings.output)


if __name__ == "__main__":
    main()
