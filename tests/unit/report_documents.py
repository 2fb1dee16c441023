"""Result documents as the commands of evaluate.py write them, with invented numbers of a plausible size."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def model(layers: int = 30, exits: tuple[int, ...] = (8, 15, 22), checkpoint: str = "runs/study/tuned") -> Json:
    return {
        "checkpoint": checkpoint, "iteration": 300, "fingerprint": f"{layers:02d}ab" * 16, "tokenizer": "cd12" * 16,
        "num_layers": layers, "exit_layers": list(exits), "dtype": "fp32", "quantize": None, "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1, "num_slots": 16, "threads": 2,
    }  # fmt: skip


def document(kind: str, results: Json, of: Json | None = None, **changes: Any) -> Json:
    of = of or model()
    return {
        "kind": kind, "date": "2026-11-26T17:00:00+00:00",
        "command": f"evaluate.py {kind} --load {of['checkpoint']} --seed 1", "commit": "0123456789abcdef" * 2,
        "versions": {"python": "3.11.2", "torch": "2.9.0", "megatron-core": "0.16.1", "numpy": "2.3.1"},
        "machine": {
            "cpu": "AMD EPYC 9V84", "cpu_cores": 2, "memory_bytes": 25769803776, "gpus": [], "system": "Linux x86_64",
            "load_average_1min": 0.4,
        },
        "model": of, "settings": {"seed": 1, "max_tokens": 64, "data_path": "held_out_text_document"},
        "data": {"held_out_text_document.bin": "beef" * 16}, "results": results,
    } | changes  # fmt: skip


def all_documents(of: Json | None = None, seed: int = 0) -> list[Json]:
    of = of or model()
    draw = random.Random(seed)
    return [
        document("exits", exits_results(of, draw), of),
        document("probes", probes_results(of, draw), of),
        document("calibrate", calibrate_results(of, draw), of),
        document("sweep", sweep_results(of, draw), of),
        document("correctness", correctness_results(), of),
        document("benchmark", benchmark_results(of, draw), of),
        document("tasks", tasks_results(), of),
    ]


def write_all(folder: Path, documents: list[Json]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{one['kind']}.json" for one in documents]
    for path, one in zip(paths, documents):
        path.write_text(json.dumps(one))
    return paths


def around(value: float, width: float) -> list[float]:
    return [max(value - width, 0.0), value + width * 1.1]


def heads(of: Json, shift: float = 0.0) -> list[Json]:
    found = []
    for layer in [*of["exit_layers"], of["num_layers"]]:
        depth = layer / of["num_layers"]
        is_final = layer == of["num_layers"]
        agreement = 1.0 if is_final else 0.2 + 0.4 * depth + shift
        loss = 5.2 - 2.1 * depth - shift
        found.append({
            "layer": layer, "is_final": is_final, "loss": loss, "perplexity": math.exp(loss),
            "accuracy": 0.15 + 0.28 * depth, "agreement": agreement,
            "agreement_interval": [1.0, 1.0] if is_final else around(agreement, 0.011),
            "confidence": 0.2 + 0.3 * depth, "ece": None if is_final else 0.12 - 0.1 * depth,
            "auroc": None if is_final else 0.79 + 0.12 * depth, "cost_in_layers": 8.03,
        })  # fmt: skip
    return found


def exits_results(of: Json, draw: random.Random) -> Json:
    return {
        "tokens": 40960, "heads": heads(of),
        "reliability": {
            str(layer): [
                {
                    "score": (i + 0.5) / 15,
                    "agreement": min(max(((i + 0.5) / 15) ** 1.25 + draw.uniform(-0.03, 0.03), 0), 1),
                    "count": int(6000 * math.exp(-i / 4)) + 300 + 100 * i,
                }
                for i in range(15)
            ]
            for layer in of["exit_layers"]
        },
        "by_domain": {"code": heads(of, 0.1), "news": heads(of, -0.03), "chat": heads(of)},
    }  # fmt: skip


def probes_results(of: Json, draw: random.Random) -> Json:
    score = lambda: {
        "auroc": draw.uniform(0.7, 0.95), "ece": draw.uniform(0.01, 0.5),
        "leaving": {"0.01": draw.uniform(0.1, 0.2), "0.05": draw.uniform(0.3, 0.5)},
    }  # fmt: skip
    return {
        "exits": [
            {"layer": layer, "agreement": draw.uniform(0.3, 0.8), "probe": score(), "head": score()}
            for layer in of["exit_layers"]
        ],
        "decisions": {"train": 20480, "held_out": 5120},
    }


def certified_thresholds(of: Json) -> Json:
    return {str(layer): 0.97 - 0.004 * layer for layer in of["exit_layers"]}


def card(of: Json, level: float, certified: bool = True) -> Json:
    alpha = 1 - level
    budgets = [alpha / 32 * 64 ** (i / 63) for i in range(50)]
    path = [
        {
            "budget": budget, "risk": budget * 0.93,
            "thresholds": {str(layer): 0.999 - 4 * budget for layer in of["exit_layers"]},
            "p_value": min(1.0, 0.001 * math.exp(6.1 * budget / alpha)),
        }
        for budget in budgets
    ]  # fmt: skip
    path = path[: next(i for i, point in enumerate(path) if point["p_value"] > 0.025) + 1]
    return {
        "level": level, "delta": 0.05, "risk": "A-max", "status": "certified" if certified else "refused",
        "reason": None if certified else "120 prompts of calibration are too few for 99.9%: 2,875 more are needed",
        "thresholds": certified_thresholds(of) if certified else None,
        "prompts": {"tuning": 200, "calibration": 500, "free_running": 150, "test": 150},
        "p_value": 0.0113 if certified else 1.0, "calibration_risk": alpha * 0.55, "test_risk": alpha * 0.61,
        "test_risk_interval": [alpha * 0.42, alpha * 0.83],
        "free_running": {
            "p_value": 0.0114, "risk": alpha * 0.6, "is_certified": True, "test_risk": alpha * 0.5,
            "test_risk_interval": [alpha * 0.3, alpha * 0.8], "runs_saved": 0.139,
        } if certified else None,
        "expected_runs_saved": 0.143 if certified else None, "path": path if certified else [],
    }  # fmt: skip


def calibrate_results(of: Json, draw: random.Random) -> Json:
    exits = of["exit_layers"]
    curves = {}
    for layer in exits:
        right = 0.2 + 0.4 * layer / of["num_layers"]
        risk = lambda share, right=right: max((1 - right) * share**0.9, 1 - right / share)
        curves[str(layer)] = [
            {
                "threshold": 1 - i / 30, "coverage": i / 30, "risk": risk(i / 30),
                "oracle_risk": max(0.0, 1 - right / (i / 30)),
            }
            for i in range(1, 31)
        ]  # fmt: skip
    positions = []
    for position in range(64):
        shares = {str(layer): 0.06 + 0.05 * i + draw.uniform(0, 0.04) for i, layer in enumerate(exits)}
        positions.append({"position": position, "shares": shares | {"final": 1 - sum(shares.values())}})
    return {
        "certificates": [card(of, 0.95), card(of, 0.99), card(of, 0.999, certified=False)],
        "coverage_risk": curves, "exit_share_by_position": positions,
        "text": {"loop_rate": 0.214, "distinct_1": 0.412, "distinct_2": 0.703},
        "rounding": {"batch_1_vs_n": 0.0004, "decisions": 64000},
        "cost": {"record_seconds": 812.5, "rounding_seconds": 60.3, "level_seconds": {"0.99": 3.0},
            "test_seconds": {"0.99": 142.0}}, "per_prompt": [],
    }  # fmt: skip


def row(name: str, mode: str, batch: int, speedup: float, agreement: float, **changes: Any) -> Json:
    full = 26.0 * batch**0.7
    layer_run = 1 + (speedup - 1) * 1.3 + 0.12 * (mode != "full")
    return {
        "name": name, "mode": mode, "thresholds": None, "level": None, "draft_exit": None, "draft_length": None,
        "batch": batch, "tokens_per_second": full * speedup, "speedup": speedup,
        "speedup_interval": None if mode == "full" else [speedup - 0.03, speedup + 0.028],
        "layer_run_speedup": layer_run, "layers_saved": 1 - 1 / layer_run, "runs_saved": 1 - 1 / layer_run,
        "agreement": agreement,
        "agreement_interval": [1.0, 1.0] if agreement == 1 else [agreement - 0.012, min(agreement + 0.01, 1)],
        "identical_answers": agreement**20, "acceptance": None, "perplexity": 7.1 + 4 * (1 - agreement),
        "loop_rate": 0.2, "first_token_seconds": 0.081, "seconds_per_token": batch / (full * speedup),
        "exit_shares": {"8": 0.13, "15": 0.11, "22": 0.2, "final": 0.56}, "is_baseline": mode == "full",
    } | changes  # fmt: skip


def sweep_results(of: Json, draw: random.Random) -> Json:
    rows = [row("full", "full", 1, 1.0, 1.0)]
    for threshold, speedup, agreement in (
        (0.95, 1.02, 0.993), (0.9, 1.06, 0.981), (0.8, 1.13, 0.952), (0.7, 1.19, 0.921), (0.6, 1.27, 0.883),
        (0.4, 1.45, 0.71),
    ):  # fmt: skip
        rows.append(row(f"early exit {threshold}", "early_exit", 1, speedup, agreement, thresholds=[threshold]))
    for level, speedup in ((0.99, 1.05), (0.95, 1.16)):
        name = f"certified {level:.0%}"
        rows.append(row(name, "early_exit", 1, speedup, level + 0.004, level=level,
                        thresholds=certified_thresholds(of)))  # fmt: skip
    for exit_layer in of["exit_layers"]:
        for length in (1, 2, 3, 4, 6):
            speedup = 1.3 - 0.02 * exit_layer - 0.05 * abs(length - 3) + draw.uniform(0, 0.02)
            rows.append(row(
                f"drafts of {length} from {exit_layer}", "self_speculative", 1, speedup, 1.0, draft_exit=exit_layer,
                draft_length=length, acceptance=0.8 - 0.06 * length,
            ))  # fmt: skip
    return {"rows": rows, "per_prompt": []}


def benchmark_results(of: Json, draw: random.Random) -> Json:
    rows = []
    for batch in (1, 4, 16, 32):
        fade = 1 - 0.06 * math.log2(batch)
        rows += [
            row("full", "full", batch, 1.0, 1.0),
            row("early exit 0.8", "early_exit", batch, 1.13 * fade, 0.952, thresholds=[0.8]),
            row("early exit 0.6", "early_exit", batch, 1.27 * fade, 0.883, thresholds=[0.6]),
            row("certified 99%", "early_exit", batch, 1.05 * fade, 0.994, level=0.99,
                thresholds=certified_thresholds(of)),
            row("self-speculative", "self_speculative", batch, 1.17 * fade * fade, 1.0, draft_exit=of["exit_layers"][0],
                acceptance=0.61),
        ]  # fmt: skip
    parts = (("layers", 0.0224), ("final head", 0.0071), ("rest", 0.0029))
    columns = ("batch", "tokens_per_second", "speedup", "speedup_interval", "first_token_seconds", "seconds_per_token")
    beside = [
        {"name": name, "mode": "transformers"} | {key: row("", "other", 1, speedup, 1.0)[key] for key in columns}
        for name, speedup in (("transformers", 0.71), ("transformers, prompt lookup", 0.93))
    ]
    return {
        "rows": rows, "per_prompt": [],
        "transformers": beside[0], "beside": beside,
        "step": [
            {"batch": batch, "part": name, "seconds": seconds * batch**0.4, "share": seconds / 0.0324}
            for batch in (1, 4, 16, 32) for name, seconds in parts
        ],
    }  # fmt: skip


def correctness_results() -> Json:
    difference = {"prompt": 17, "position": 41, "expected": 318, "got": 2041, "gap": 0.00004, "margin": 0.00003}
    rows = [
        ("self-speculative, drafts of 3", "self_speculative", 199, [difference]),
        ("early exit 1.0", "early_exit", 200, []),
    ]
    return {
        "rows": [
            {
                "name": name, "mode": mode, "settings": {"draft_length": 3}, "prompts": 200, "identical": identical,
                "identical_interval": [0.9725, 0.9999], "tokens": 12800, "errors": 0, "first_differences": differences,
            }
            for name, mode, identical, differences in rows
        ]
    }  # fmt: skip


def tasks_results() -> Json:
    scores = {
        "full": {"value": 0.421, "stderr": 0.0494}, "early exit 0.8": {"value": 0.409, "stderr": 0.0492},
        "certified 99%": {"value": 0.42, "stderr": 0.0493},
    }  # fmt: skip
    paired = {
        "early exit 0.8": {"metric": "acc,none", "mcnemar_p": 0.375, "difference": -0.012, "interval": [-0.04, 0.013]},
        "certified 99%": {"mcnemar_p": 1.0, "difference": -0.001, "interval": [-0.01, 0.01]},
    }
    return {
        "tasks": {
            "hellaswag": {"n": 100, "metrics": {"acc,none": scores, "acc_norm,none": scores}, "paired": paired},
            "gsm8k": {"n": 100, "metrics": {"exact_match": scores}, "paired": paired},
        },
        "modes": {
            "full": {"mode": "full"},
            "early exit 0.8": {"mode": "early_exit", "forced_exit": None, "thresholds": {"8": 0.8}},
        },
    }
