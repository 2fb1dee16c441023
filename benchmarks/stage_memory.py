"""Memory of each rank where a model is spread over pipeline stages: peak resident sets, keys and values.

    python -m benchmarks.stage_memory --rounds 3

The random Llama of `benchmarks.loading` is loaded with 1, 2 and 4 stages in turn, each time by a process of its own,
and answers prompts that fill all slots. Peaks are of the resident set of the rank's process, less what a process has
when it has imported all that a rank imports. On some processors weights in fp32 are kept in two forms
(`worker/linear.py`), so a rank may keep more than its part of the model.
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
from benchmarks.loading import random_llama
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.saved_description import read_description
from megatron.early_exit.inference.stage_layers import layer_ranges, split_layers
from megatron.early_exit.inference.worker.kv_cache import bytes_per_token

_TIMEOUT_SECONDS = 900
_SLOTS, _LENGTH = 4, 1024

_IMPORT = """
import megatron.early_exit.inference.executor.worker_process
import megatron.early_exit.inference.loading
lines = open("/proc/self/status").read().splitlines()
print(next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")))
"""

_ANSWER = """
import json, sys
import psutil
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams

def peak(process):
    lines = open(f"/proc/{process.pid}/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

path, dtype, stages, slots, length = sys.argv[1:3] + [int(text) for text in sys.argv[3:]]
with LLM.load(path, dtype=dtype, pipeline_parallel_size=stages, max_requests=slots, max_length=length) as llm:
    engine = psutil.Process()
    ranks = sorted(engine.children(), key=lambda process: process.pid) if stages > 1 else [engine]
    assert len(ranks) == stages
    loaded = [peak(rank) for rank in ranks]
    prompts = [[(7 * slot + place) % 31000 for place in range(length - 8)] for slot in range(slots)]
    answers = llm.generate(prompts, GenerationParams(max_tokens=8))
    assert all(one.error is None for one in answers), answers[0].error
    print(json.dumps({"loaded_bytes": loaded, "peak_bytes": [peak(rank) for rank in ranks],
                      "engine_bytes": peak(engine) if stages > 1 else None}))
"""


def _run(program: str, *arguments: object) -> Any:
    """The JSON on the last line of what a new process prints."""
    environment = {**os.environ, "PYTHONPATH": str(common.ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"a measured process failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(checkpoint: Path, dtypes: Sequence[str], sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """For each type and number of stages the bytes of each rank, the largest of all rounds; sizes take turns."""
    imported = max(_run(_IMPORT) for _ in range(2))
    description = read_description(checkpoint_folder(checkpoint))
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for number in range(rounds):
        for dtype in dtypes:
            for size in sizes:
                found = _run(_ANSWER, checkpoint, dtype, size, _SLOTS, _LENGTH)
                print(f"round {number + 1} of {rounds}, {dtype}, {size} stages: {found}", file=sys.stderr, flush=True)
                layers = split_layers(description.model.num_layers, size)
                itemsize = {"fp32": 4, "bf16": 2}[dtype]
                per_token = [bytes_per_token(description, 1, itemsize, one) for one in layer_ranges(layers)]
                row = rows.setdefault((dtype, size), {
                    "dtype": dtype, "stages": size, "layers": layers, "imported_bytes": imported,
                    "kv_bytes": [count * _SLOTS * _LENGTH for count in per_token], "rounds": [],
                })  # fmt: skip
                row["rounds"].append(found)
    return [row | {"rank_bytes": _above_imports(row)} for row in rows.values()]


def _above_imports(row: dict[str, Any]) -> list[int]:
    """Of each rank the largest peak of all rounds, without what was there before loading."""
    of_ranks = zip(*(one["peak_bytes"] for one in row["rounds"]), strict=True)
    return [max(peaks) - row["imported_bytes"] for peaks in of_ranks]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    in_mib = lambda values: " ".join(str(round(value / common.MIB)) for value in values)
    header = ("type, stages", "layers", "peak of each rank, MiB", "of which keys and values, MiB")
    cells = [
        (f"{row['dtype']}, {row['stages']}", " ".join(map(str, row["layers"])), in_mib(row["rank_bytes"]),
         in_mib(row["kv_bytes"]))
        for row in rows
    ]  # fmt: skip
    return common.format_table(header, cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each type and number of stages")
    parser.add_argument(
        "--layers", type=int, default=16, help="of the random Llama: 47 MB each, and 131 MB beside them"
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--output", type=Path, help="file for the JSON")
    settings = parser.parse_args(argv)
    machine, seed = common.machine_info(), 0
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = random_llama(Path(folder), settings.layers, seed)
        rows = measure(Path(folder), settings.dtypes, settings.stages, settings.rounds)
    print(_table(rows))
    largest = {(row["dtype"], row["stages"]): max(row["rank_bytes"]) for row in rows}
    ratios = {
        dtype: {str(size): largest[dtype, size] / largest[dtype, settings.stages[0]] for size in settings.stages}
        for dtype in settings.dtypes
    }
    document = common.result_document(
        "stage_memory", machine,
        {"rounds": settings.rounds, "layers": settings.layers, "slots": _SLOTS, "positions": _LENGTH, "device": "cpu",
         "model_bytes": {"fp32": num_bytes, "bf16": num_bytes // 2}, "threads": torch.get_num_threads()},
        seed, {"ranks": rows, "largest_rank_over_that_of_the_first": ratios}, {},
    )  # fmt: skip
    common.finish(document, settings.output)


if __name__ == "__main__":
    main()
