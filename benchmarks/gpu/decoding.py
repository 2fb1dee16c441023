"""Decoding on one GPU in bf16: all layers with and without CUDA graphs against `transformers`, early exit, speculation.

The model has the shape of Llama-3.2-1B and random weights, which time does not depend on. So that exits are worth
something, the layers behind the last exit add little to the residual (`_DEEP_SCALE`) and the final norm spreads the
logits (`_NORM_SCALE`): exits then agree with the final head often, not always, and confidences fill (0, 1). Thresholds
are quantiles of the confidences seen, so that a known share of tokens leaves. How much exits save at a quality is a
question for trained models; here it is what the machinery costs and gains at that share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.decode.models import TwinModel, make_engine, score
from benchmarks.decode.runs import quality, run_requests, their_seconds
from benchmarks.gpu.record import Record
from benchmarks.rounds import in_turn
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from megatron.early_exit.inference.results import RequestResult
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.platform.device import use_cuda

_LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096, "rope_theta": 5e5,
}  # fmt: skip
_TOY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_DEEP_SCALE, _NORM_SCALE = 0.1, 10.0
_EXIT_SHARES = (0.3, 0.6, 0.9)
"""Shares of tokens that leave at an exit when thresholds are chosen by them."""
_PROMPT_TOKENS, _TOKENS, _ROUNDS = 64, 64, 3
_TOY_TOKENS, _TOY_ROUNDS = 6, 1
_BATCHES, _TOY_BATCHES = (1, 16, 64), (1, 2)


class Decoding:
    """The model, and the sizes of this run."""

    def __init__(self, is_toy: bool) -> None:
        self.tokens, self.rounds = (_TOY_TOKENS, _TOY_ROUNDS) if is_toy else (_TOKENS, _ROUNDS)
        self.kind = "bf16" if use_cuda() else "fp32"
        shape = _TOY if is_toy else _LLAMA_1B
        # A quarter for drafts, half for leaving.
        self.exit_layers = (shape["num_hidden_layers"] // 4, shape["num_hidden_layers"] // 2)
        self.model = TwinModel(_model(shape, self.exit_layers[-1]), self.exit_layers)
        self.model.theirs.to(torch.bfloat16 if use_cuda() else torch.float32)

    def prompts(self, count: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.model.vocab_size, (count, _PROMPT_TOKENS), generator=generator)
        return ids.tolist()

    def decoder(self, batch: int, use_graphs: bool | None = None) -> Decoder:
        length = _PROMPT_TOKENS + 2 * self.tokens
        return self.model.decoder(kind=self.kind, num_slots=batch, length=length, use_graphs=use_graphs)

    def engine(self, decoder: Decoder) -> Engine:
        return make_engine(decoder, self.model.config)

    def params(self, **settings: Any) -> GenerationParams:
        return GenerationParams(max_tokens=self.tokens, ignore_eod=True, **settings)


@torch.no_grad()
def _model(shape: dict[str, Any], last_exit: int) -> Any:
    """A Llama with random weights in fp32 whose exits are worth something."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    with torch.device("cuda" if use_cuda() else "cpu"):
        theirs = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).eval()
    for layer in theirs.model.layers[last_exit:]:
        layer.self_attn.o_proj.weight *= _DEEP_SCALE
        layer.mlp.down_proj.weight *= _DEEP_SCALE
    theirs.model.norm.weight *= _NORM_SCALE
    return theirs


def measure(record: Record, is_toy: bool) -> None:
    """Add rows: batch 1 first, then the larger ones."""
    batches = _TOY_BATCHES if is_toy else _BATCHES
    cases = [(batch, kind) for batch in batches for kind in (_full, _exits)]
    wanted = [(batch, kind) for batch, kind in cases if record.wants(_name(batch, kind))]
    if not wanted:
        return
    run = Decoding(is_toy)
    for batch, kind in wanted:
        if record.wants(_name(batch, kind)):
            print(f"{_name(batch, kind)} ...", flush=True)
            kind(run, batch, record)
            record.finish(_name(batch, kind))


def _name(batch: int, kind: Callable[..., None]) -> str:
    return f"batch {batch} {kind.__name__.strip('_')}"


def _full(run: Decoding, batch: int, record: Record) -> None:
    """All layers: `transformers`, and ours with and without CUDA graphs."""
    prompts = run.prompts(batch)
    decoders = {"ours": run.decoder(batch, use_graphs=False)}
    if use_cuda():
        decoders["ours, graphs"] = run.decoder(batch, use_graphs=True)
    engines = {name: run.engine(decoder) for name, decoder in decoders.items()}
    tokens: dict[str, list[list[int]]] = {}

    def ours(name: str) -> float:
        seconds, results = run_requests(engines[name], prompts, run.params())
        tokens[name] = [result.token_ids for result in results]
        return seconds

    def theirs() -> float:
        seconds, tokens["transformers"] = their_seconds(run.model, prompts, run.tokens)
        return seconds

    seconds = in_turn({"transformers": theirs, **{name: (lambda n=name: ours(n)) for name in engines}}, run.rounds)
    for name, taken in seconds.items():
        same = [a == b for one, other in zip(tokens[name], tokens["transformers"]) for a, b in zip(one, other)]
        record.add(f"batch {batch} full, {name}", {
            "batch": batch,
            "tokens_per_second": batch * (run.tokens - 1) / common.median(taken),
            "speedup_over_transformers": common.median_ratio(seconds["transformers"], taken),
            "same_tokens": sum(same) / len(same),
            "peak_mib": torch.cuda.max_memory_allocated() / common.MIB if use_cuda() else None,
            **_captured(decoders.get(name)),
            "raw_seconds": taken,
        })  # fmt: skip


def _captured(decoder: Decoder | None) -> dict[str, Any]:
    """What capturing the graphs took; the columns are empty without graphs."""
    graphs = None if decoder is None else decoder.graphs
    if graphs is None:
        return {"num_graphs": None, "capture_seconds": None, "graphs_mib": None}
    return {
        "num_graphs": graphs.num_graphs,
        "capture_seconds": graphs.seconds,
        "graphs_mib": graphs.num_bytes / common.MIB,
    }


def _exits(run: Decoding, batch: int, record: Record) -> None:
    """Early exit at several shares of leaving tokens, and self-speculation, against all layers."""
    engine, prompts = run.engine(run.decoder(batch)), run.prompts(batch)
    leaving = run.exit_layers[-1]
    scored = score(engine, run.prompts(4), [ScoreParams(exit_layers=(leaving,))] * 4)
    confidences = np.concatenate([one.heads[0].confidences for one in scored])
    agrees = np.concatenate([np.equal(one.heads[0].tokens, one.heads[1].tokens) for one in scored])
    variants = {"all layers": run.params()}
    for share in _EXIT_SHARES:
        threshold = float(np.quantile(confidences, 1 - share))
        variants[f"early exit, {share:.0%} leave"] = run.params(
            mode="early_exit", exit_thresholds=(threshold,), exit_layers=(leaving,)
        )
    for layer in run.exit_layers:
        variants[f"speculation, exit {layer}"] = run.params(mode="self_speculative", draft_exit=layer)
    last: dict[str, list[RequestResult]] = {}

    def one(name: str) -> float:
        seconds, last[name] = run_requests(engine, prompts, variants[name])
        return seconds

    seconds = in_turn({name: (lambda n=name: one(n)) for name in variants}, run.rounds)
    for name, taken in seconds.items():
        results = last[name]
        drafted = sum(result.statistics.drafted for result in results)
        passes = sum(result.statistics.full_layer_passes for result in results)
        record.add(f"batch {batch} {name}", {
            "batch": batch,
            "tokens_per_second": batch * (run.tokens - 1) / common.median(taken),
            "speedup_over_all_layers": common.median_ratio(seconds["all layers"], taken),
            "layer_runs_saved": 1 - sum(result.statistics.layer_runs for result in results) / passes,
            "acceptance": sum(result.statistics.accepted for result in results) / drafted if drafted else None,
            "agreement": quality(engine, prompts[:1], results[:1])["agreement"],
            "exit_agrees": float(agrees.mean()),
            "raw_seconds": taken,
        })  # fmt: skip
