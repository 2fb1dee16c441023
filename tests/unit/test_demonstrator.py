"""The demonstrator's script gives flags that programs take; its seeds are put together as they should be."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import demonstrator
from megatron.early_exit.config.flags import parse_run_config
from megatron.early_exit.evaluation.command_line import build_parser
from megatron.early_exit.evaluation.exit_quality import HeadScores, used_heads_row

ROOT = Path(__file__).parents[2]

FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\0' "$@" >> "$COMMANDS" && printf '\\n' >> "$COMMANDS"
while [ $# -gt 0 ]; do
    case $1 in
        --output-prefix) mkdir -p "$(dirname "$2")" && touch "$2_text_document.idx" ;;
        --output) case $2 in
            */tokenizer) mkdir -p "$2" && touch "$2/tokenizer.json" ;;
            *) mkdir -p "$(dirname "$2")" && seq 3000 > "$2" ;;
        esac ;;
    esac
    shift
done
"""


def commands(folder: Path, size: str) -> list[list[str]]:
    """What the script runs, every program of it a fake."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(FAKE_PYTHON)
    (folder / "bin" / "python").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "COMMANDS": str(folder / "commands"), "SIZE": size,
        "SEEDS": "1 2", "PACKAGES": str(folder),
    }  # fmt: skip
    script = str(ROOT / "examples" / "demonstrator" / "run.sh")
    subprocess.run(["bash", script, str(folder / "work")], env=environment, check=True, capture_output=True)
    return [line.rstrip("\0").split("\0") for line in (folder / "commands").read_text().splitlines()]


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_script_trains_a_model_with_exits_and_its_twin(tmp_path: Path, size: str) -> None:
    run = commands(tmp_path, size)
    trainings = [
        parse_run_config(words[1:], world_size=1, warn=lambda message: None)
        for words in run if words[0] == "pretrain_early_exit_gpt.py"
    ]  # fmt: skip
    assert len(trainings) == 4
    for with_exits, twin in (trainings[:2], trainings[2:]):
        if not with_exits.exits.exit_layer_nums:  # they start at once
            with_exits, twin = twin, with_exits
        exits, layers = with_exits.exits, with_exits.model.num_layers
        assert not twin.exits.exit_layer_nums and twin.training.seed == with_exits.training.seed
        leaving = [layer for index, layer in enumerate(exits.exit_layer_nums) if exits.may_leave(index)]
        assert leaving == [layers // 8, layers // 4, layers // 2]
        assert [exits.use_of(index) for index in range(4)] == ["draft", "leave", "leave", "leave"]
        assert exits.head_of(0).block and not exits.head_of(1).block and exits.head_of(1).mlp
    evaluations = [words[1:] for words in run if words[0] == "tools/evaluate.py"]
    kinds = [words[0] for words in evaluations]
    assert kinds == ["probes", "calibrate", "exits", "benchmark"] * 2 + ["report"]
    for words in evaluations:
        build_parser().parse_args(words)
    assert run[-1][:2] == ["-m", "benchmarks.demonstrator"]


def document(speedups: dict[str, float], loss: float, twin: float, ratio: float) -> dict[str, Any]:
    head = lambda value: {"layer": 16, "is_final": True, "loss": value}
    rows = [
        {"name": name, "batch": 1, "mode": "early_exit" if "certified" in name else "self_speculative",
         "level": 0.99 if "certified" in name else None, "speedup": value, "layer_run_speedup": 2.0, "agreement": 0.99,
         "identical_answers": 1.0, "acceptance": None, "loop_rate": 0.5}
        for name, value in speedups.items()
    ]  # fmt: skip
    common = {"machine": {"cpu": "some cpu", "cpu_cores": 2}, "settings": {"seed": 1}, "model": {}, "data": {}}
    return {
        "exits": {**common, "results": {
            "heads": [head(loss)], "compare": [{"heads": [head(twin)]}],
            "used_heads": [{"level": 0.99, "perplexity_ratio": ratio}],
        }},
        "calibrate": {**common, "results": {"certificates": [], "coverage_risk": {}, "text": {}}},
        "benchmark": {**common, "results": {"rows": rows}},
    }  # fmt: skip


def write_seeds(folder: Path, seeds: list[dict[str, Any]]) -> None:
    for number, documents in enumerate(seeds, 1):
        (folder / f"seed_{number}").mkdir(parents=True)
        for kind, one in documents.items():
            (folder / f"seed_{number}" / f"{kind}.json").write_text(json.dumps(one))


def test_seeds_are_put_together(tmp_path: Path) -> None:
    write_seeds(tmp_path, [
        document({"certified 0.99": 1.2, "drafts": 1.1}, 2.00, 2.0, 1.001),
        document({"certified 0.99": 1.8, "drafts": 1.2}, 2.03, 2.0, 1.002),
    ])  # fmt: skip
    demonstrator.main(["--folder", str(tmp_path), "--output", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    certified = next(row for row in result["results"]["speedups"] if row["level"] == 0.99)
    assert certified["speedup"]["ratio"] == pytest.approx(math.sqrt(1.2 * 1.8))
    assert certified["speedup"]["low"] < 1.2 and certified["speedup"]["of_seeds"] == [1.2, 1.8]
    goals = {name: goal["met"] for name, goal in result["goals"].items()}
    assert goals == {
        "certified_0.99_batch_1_at_least_1.3": True,
        "lossless_batch_1_at_least_1.3": False,
        "final_loss_within_0.01_of_the_twin": True,
        "perplexity_of_used_heads_within_0.01": True,
    }


def test_a_seed_that_is_not_done_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no seed_"):
        demonstrator.read_seeds(tmp_path)
    write_seeds(tmp_path, [document({"drafts": 1.0}, 2.0, 2.0, 1.0)])
    (tmp_path / "seed_1" / "benchmark.json").unlink()
    with pytest.raises(ValueError, match="seed_1 has no benchmark.json"):
        demonstrator.read_seeds(tmp_path)


def test_each_token_is_judged_by_the_head_that_would_give_it() -> None:
    def head(layer: int, scores: list[float], log_probs: list[float]) -> HeadScores:
        none = (np.zeros(2, bool), np.zeros(2, bool))
        parts = lambda values: (np.array(values[:2]), np.array(values[2:]))
        return HeadScores(layer, layer == 8, parts(log_probs), parts(scores), none, none)

    heads = [head(2, [0.9, 0.1, 0.8, 0.1], [-1, -9, -2, -9]), head(4, [1.0, 0.7, 0.1, 0.1], [-9, -3, -9, -9]),
             head(8, [0.5] * 4, [-9, -9, -9, -4])]  # fmt: skip
    row = used_heads_row(heads, {2: 0.8, 4: 0.7}, "head")
    assert row["loss"] == pytest.approx((1 + 3 + 2 + 4) / 4)
    assert row["shares"] == {"2": 0.5, "4": 0.25, "final": 0.25}
    assert row["perplexity_ratio"] == pytest.approx(math.exp((10 - 31) / 4))
    alone = used_heads_row(heads, {4: 0.7}, "head")
    assert alone["loss"] == pytest.approx((9 + 3 + 9 + 4) / 4) and alone["shares"] == {"4": 0.5, "final": 0.5}
    assert used_heads_row(heads, {}, "head")["perplexity_ratio"] == 1.0
    with_probe = [replace(heads[0], probe_scores=(np.array([0.1, 0.9]), np.array([0.1, 0.1]))), heads[2]]
    assert used_heads_row(with_probe, {2: 0.5}, "probe")["shares"] == {"2": 0.25, "final": 0.75}
