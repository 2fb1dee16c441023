"""A checkpoint that was trained with exits: early exit and self-speculation against all layers."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.decode.models import Checkpoint, score
from benchmarks.decode.runs import quality, run_requests
from benchmarks.rounds import in_turn, progress
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from megatron.early_exit.inference.results import RequestResult


def corpus_prompts(data_path: str, count: int, length: int = 48) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = IndexedDataset(data_path)
    # From the end: the demo trains on the beginning.
    candidates = (documents[index] for index in range(len(documents) - 1, 0, -1))
    prompts = []
    for document in candidates:
        if len(document) > 2 * length and len(prompts) < count:
            prompts.append(document[length : 2 * length].tolist())
    if len(prompts) < count:
        raise ValueError(f"{data_path} has only {len(prompts)} documents of more than {2 * length} tokens")
    return prompts


def compare_modes(
    engine: Engine, prompts: list[list[int]], variants: dict[str, GenerationParams], rounds: int
) -> list[dict[str, Any]]:
    """Every variant against "full", one request after the other, with the quality of what each generates."""
    last: dict[str, list[RequestResult]] = {}

    def run(name: str) -> float:
        taken, last[name] = 0.0, []
        for prompt in prompts:
            seconds, results = run_requests(engine, [prompt], variants[name])
            taken += seconds
            last[name] += results
        return taken

    seconds = in_turn({name: (lambda n=name: run(n)) for name in variants}, rounds)
    rows = []
    for name, params in variants.items():
        results = last[name]
        drafted = sum(result.statistics.drafted for result in results)
        passes = sum(result.statistics.full_layer_passes for result in results)
        rows.append({
            "variant": name,
            "speedup": common.median_ratio(seconds["full"], seconds[name]),
            **quality(engine, prompts, results),
            "same_tokens": [r.token_ids for r in results] == [r.token_ids for r in last["full"]],
            "layer_runs_saved": 1 - sum(result.statistics.layer_runs for result in results) / passes,
            "acceptance": sum(r.statistics.accepted for r in results) / drafted if drafted else None,
            "exits_enabled": list(results[0].exit_layers),
            "mode": params.mode,
            "tokens_per_second": len(prompts) * (params.max_tokens - 1) / common.median(seconds[name]),
            "raw_seconds": seconds[name],
        })  # fmt: skip
    return rows


def measure_early_exit(model: Checkpoint, settings: argparse.Namespace) -> list[dict[str, Any]]:
    engine = model.engine(num_slots=4)
    params = GenerationParams(max_tokens=settings.tokens, ignore_eod=True)
    variants = {"full": params}
    for threshold in (0.9, 0.7, 0.5, 0.3, 0.2, 0.1):
        variants[f"threshold {threshold}"] = GenerationParams(
            max_tokens=settings.tokens, ignore_eod=True, mode="early_exit", exit_thresholds=(threshold,)
        )
        # Exits that do not pay are not evaluated: this should never be slower than the full model.
        variants[f"planned, threshold {threshold}"] = replace(variants[f"threshold {threshold}"], plan_exits=True)
    progress("early exit")
    prompts = corpus_prompts(settings.data_path, 30)
    scored = score(engine, prompts[6:], [ScoreParams(final=False)] * len(prompts[6:]))
    confidences = [np.array([head.confidences for head in one.heads]).T for one in scored]
    engine = model.engine(num_slots=4, exit_scores=np.concatenate(confidences))
    return compare_modes(engine, prompts[:6], variants, settings.rounds)


def measure_speculative(model: Checkpoint, settings: argparse.Namespace) -> list[dict[str, Any]]:
    engine = model.engine(num_slots=4)
    variants = {"full": GenerationParams(max_tokens=settings.tokens, ignore_eod=True)}
    for layer in model.config.exits.exit_layer_nums:
        for length in (1, 2, 4, None):
            variants[f"exit {layer}, drafts of {length or 'adaptive length'}"] = GenerationParams(
                max_tokens=settings.tokens, ignore_eod=True, mode="self_speculative", draft_exit=layer,
                draft_length=length,
            )  # fmt: skip
    progress("speculative")
    return compare_modes(engine, corpus_prompts(settings.data_path, 6), variants, settings.rounds)


def measure_throughput(model: Checkpoint, settings: argparse.Namespace) -> list[dict[str, Any]]:
    base = {"max_tokens": settings.tokens, "ignore_eod": True}
    modes = {
        "full": GenerationParams(**base),
        "early_exit": GenerationParams(**base, mode="early_exit", exit_thresholds=(0.3,)),
        "self_speculative": GenerationParams(**base, mode="self_speculative"),
    }
    rows = []
    for batch in settings.concurrent:
        progress(f"throughput: {batch} requests")
        engine = model.engine(num_slots=batch)
        prompts = corpus_prompts(settings.data_path, batch)
        seconds = in_turn(
            {name: (lambda p=params: run_requests(engine, prompts, p)[0]) for name, params in modes.items()},
            settings.rounds,
        )
        rows.append({
            "requests": batch,
            **{name: batch * (settings.tokens - 1) / common.median(taken) for name, taken in seconds.items()},
            "raw_seconds": seconds,
        })  # fmt: skip
    return rows
