"""SmolLM2 with an untrained exit: against `transformers`, and where the time goes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from benchmarks.decode.models import SmolLM2, make_engine
from benchmarks.decode.runs import run_requests, their_seconds
from benchmarks.rounds import in_turn, progress
from benchmarks.timing import now
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.results import RequestResult
from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.platform.device import use_cuda

SMOLLM2_EXIT = 25
TEXT = (
    "The history of the city begins with a small settlement on the bank of the river, where merchants met in spring. "
    "In the years that followed, the town grew, and its people built walls, a market hall, three churches and a school."
)


def smollm2_prompts(model: SmolLM2, count: int, length: int = 24) -> list[list[int]]:
    ids = model.tokenizer(TEXT)["input_ids"]
    return [ids[i % 8 : i % 8 + length] for i in range(count)]


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
