"""Runs on workers: an engine over the reference's parameters, and the reference's word on what it did."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.engine.audit import ExitAudit
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.engine.generation import RunningGeneration
from megatron.early_exit.inference.engine.speculation import DraftingThenVerifying, RunningSpeculation
from megatron.early_exit.inference.executor.local import LocalExecutor
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from megatron.early_exit.inference.protocol import ExitThreshold, Rows, Step
from megatron.early_exit.inference.results import RequestResult, ScoreResult
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel
from megatron.early_exit.inference.worker.weight_reading import decoder_weights
from megatron.early_exit.inference.worker.weights import DecoderWeights
from megatron.early_exit.inference.worker.worker import Worker
from tests.configs import VOCAB_SIZE
from tests.distributed.parallel_model import layout
from tests.reference import ReferenceBatch, ReferenceModel
from tests.reference_checkpoint import reference_description, reference_tensors

COSTS = StepCosts((1.0,) * 6, (1.0,) * 6, (1.0,) * 6, (1.0,) * 6)

Request = tuple[list[int], GenerationParams]


def reference_weights(cfg: RunConfig, **changes: Any) -> DecoderWeights:
    """This rank's part of the reference's parameters; under tensor parallelism within `layout(cfg)`."""
    is_parallel = cfg.parallel.tensor_model_parallel_size > 1
    tp = TensorParallel(parallel_state.get_tensor_model_parallel_group() if is_parallel else None)
    return decoder_weights(reference_tensors(cfg), reference_description(cfg), tp=tp, **changes)


def make_engine(
    cfg: RunConfig, num_slots: int = 4, vocab_size: int = VOCAB_SIZE, use_graphs: bool = False, **changes: Any
) -> Engine:
    weights = reference_weights(cfg)
    decoder = Decoder(weights, num_slots=num_slots, vocab_size=vocab_size, use_graphs=use_graphs)
    return Engine(LocalExecutor(Worker(decoder)), cfg.exits, **{"costs": COSTS, **changes})


def worker_of(engine: Engine) -> Worker:
    return engine.executor.worker


def decoder_of(engine: Engine) -> Decoder:
    return worker_of(engine).decoder


def head_logits(folder: Path, tokens: list[list[int]], tp_size: int = 1, dtype: str | None = None) -> dict[str, Tensor]:
    """[sequences, positions, vocabulary] of every exit (exit_N) and of the final head, from a checkpoint."""
    engine = LLM.load(str(folder), tensor_parallel_size=tp_size, max_requests=1, dtype=dtype).engine
    results = score_all(engine, tokens, ScoreParams(logits=True))
    names = ["final" if one.exit_layer is None else f"exit_{one.exit_layer}" for one in results[0].heads]
    logits = [[torch.from_numpy(head.logits.copy()) for head in result.heads] for result in results]
    return {name: torch.stack(of_head) for name, of_head in zip(names, zip(*logits), strict=True)}


def score_all(engine: Engine, sequences: list[list[int]], params: ScoreParams) -> list[ScoreResult]:
    ids = [engine.add_scoring(sequence, params) for sequence in sequences]
    results = run_all(engine)
    return [results[one] for one in ids]


def run_all(engine: Engine) -> dict[int, RequestResult]:
    results = {}
    while engine.has_work:
        for event in engine.step():
            if event.result is not None:
                results[event.request_id] = event.result
    return results


def answer(cfg: RunConfig, requests: list[Request], together: bool = True, **changes: Any) -> list[RequestResult]:
    """The results of `requests`, in one batch or one after the other in the same engine."""
    with layout(cfg):
        engine = make_engine(cfg, **changes)
        results = {}
        for prompt, params in requests:
            engine.add(prompt, params)
            if not together:
                results |= run_all(engine)
        results |= run_all(engine)
        check_invariants(engine)
        return [results[key] for key in sorted(results)]


def answer_and_check(cfg: RunConfig, requests: list[Request], **changes: Any) -> list[RequestResult]:
    results = answer(cfg, requests, **changes)
    with layout(cfg):
        for (prompt, params), result in zip(requests, results, strict=True):
            check_against_reference(cfg, prompt, params, result, changes.get("vocab_size", VOCAB_SIZE))
            check_statistics(cfg, params, result)
    return results


def audit_and_check(cfg: RunConfig, engine: Engine, requests: list[Request]) -> float:
    """Audit all of `requests`, greedy ones with early exit; the losses are those of the reference over their answers.
    Returns the mean loss."""
    engine.audit = ExitAudit(1.0)
    ids = [engine.add(prompt, params) for prompt, params in requests]
    results = run_all(engine)
    while engine.audit.has_work:
        assert engine.step() == []
    losses = []
    for (prompt, _), request_id in zip(requests, ids, strict=True):
        answer = results[request_id].token_ids
        _, logits = reference_over(cfg, prompt + answer[:-1])
        best = logits[None][len(prompt) - 1 :, :VOCAB_SIZE].argmax(-1).tolist()
        losses.append(sum(map(int.__ne__, best, answer)) / len(answer))
    (report,) = engine.audit.reports()
    assert (report.num_audited, report.num_not_auditable, report.num_dropped) == (len(requests), 0, 0)
    assert report.loss_sum == pytest.approx(sum(losses))
    engine.audit = ExitAudit()
    return report.mean_loss


class RecordingReference(ReferenceModel):
    """Keeps the fused query-key-value projections, [1, s, all] by parameter name."""

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__(cfg, VOCAB_SIZE)
        self.qkv: dict[str, Tensor] = {}

    def linear(self, name: str, x: Tensor, out_size: int, bias: bool | None = None) -> Tensor:
        y = super().linear(name, x, out_size, bias)
        if name.endswith("linear_qkv"):
            self.qkv[name] = y.detach()
        return y

    def keys_and_values(self, name: str) -> tuple[Tensor, Tensor]:
        """What the attention `name` caches: this TP rank's part, each [s, kv heads / tp, d], keys rotated."""
        m = self.cfg.model
        qkv = self.qkv[f"{name}.self_attention.linear_qkv"][0]
        qkv = qkv.view(qkv.size(0), m.num_kv_heads, -1, m.head_size)
        tp_size = self.cfg.parallel.tensor_model_parallel_size
        tp_rank = parallel_state.get_tensor_model_parallel_rank() if tp_size > 1 else 0
        qkv = qkv.chunk(tp_size, 1)[tp_rank]
        keys, values = qkv[:, :, -2], qkv[:, :, -1]
        if m.position_embedding_type == "rope":
            keys = self.rotate(keys.transpose(0, 1)[None])[0].transpose(0, 1)
        return keys, values


def reference_over(cfg: RunConfig, tokens: list[int]) -> tuple[RecordingReference, dict[int | None, Tensor]]:
    """(reference after a full forward, logits [s, vocabulary] by exit layer, None: final head)."""
    reference = RecordingReference(cfg)
    ids = torch.tensor([tokens])
    batch = ReferenceBatch(ids, ids, torch.ones_like(ids), torch.arange(len(tokens))[None])
    with torch.no_grad():
        logits = [head[0] for head in reference.logits(batch)]
    return reference, dict(zip((*cfg.exits.exit_layer_nums, None), logits, strict=True))


def check_against_reference(
    cfg: RunConfig, prompt: list[int], params: GenerationParams, result: RequestResult, vocab_size: int
) -> None:
    """Every token, its exit, its numbers and every asked head's reading follow from the reference's logits."""
    tokens = prompt + result.token_ids
    _, logits = reference_over(cfg, tokens[:-1])
    log_probs = {head: value[:, :vocab_size].log_softmax(-1) for head, value in logits.items()}
    policy = params.exit_policy(cfg.exits)
    for row, token in enumerate(result.tokens, start=len(prompt) - 1):
        enabled = () if policy is None else policy.exit_layers
        enabled = cfg.exits.leaving_layers if params.observe_exits else enabled
        predictions = iter(token.predictions)
        for head in (*enabled, None):
            log_prob, best = log_probs[head][row].max(0)
            reading = next(predictions)
            assert (reading.exit_layer, reading.token) == (head, best.item()), (row, token)
            assert reading.confidence == pytest.approx(log_prob.exp().item(), rel=1e-5)
            if head is None or policy is None:
                continue
            if log_prob.exp().item() >= policy.thresholds[policy.exit_layers.index(head)]:
                break
        assert next(predictions, None) is None
        assert (token.exit_layer, token.is_final) == (head or cfg.model.num_layers, head is None)
        assert token.confidence == reading.confidence
        assert token.log_prob == pytest.approx(log_probs[head][row, token.token].item(), rel=1e-5, abs=1e-6)
        if params.sampling.is_greedy and not params.sampling.has_penalty:
            allowed = log_probs[head][row].clone()
            for biased, bias in params.sampling.logit_bias:
                allowed[biased] += bias
            if row + 1 - len(prompt) < params.min_tokens:
                allowed[list(params.stop_tokens)] = -torch.inf
            assert token.token == allowed.argmax().item()
        for (_, ours), theirs in zip(token.top_log_probs, log_probs[head][row].topk(4).values.tolist(), strict=False):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    if params.echo:
        assert [one.token for one in result.prompt] == prompt
        assert result.prompt[0].log_prob is None
        for row, one in enumerate(result.prompt[1:]):
            assert one.log_prob == pytest.approx(log_probs[None][row, one.token].item(), rel=1e-5, abs=1e-6)


def check_statistics(cfg: RunConfig, params: GenerationParams, result: RequestResult) -> None:
    statistics, num_layers = result.statistics, cfg.model.num_layers
    assert sum(usage.tokens for usage in result.usage) == len(result.tokens)
    for usage in result.usage:
        mine = [t.confidence for t in result.tokens if (t.exit_layer, t.is_final) == (usage.exit_layer, usage.is_final)]
        assert usage.tokens == len(mine)
        assert usage.mean_confidence == (pytest.approx(sum(mine) / len(mine)) if mine else None)
    from_prefill = params.mode == "full" and not params.observe_exits and len(result.tokens) > 0
    assert statistics.full_layer_passes == (len(result.tokens) - from_prefill) * num_layers
    assert statistics.queue_seconds >= 0
    if result.tokens:
        assert statistics.first_token_seconds >= statistics.queue_seconds
    if params.mode == "full":
        assert statistics.layer_passes == statistics.layer_runs == statistics.full_layer_passes
    if params.mode == "early_exit" and not any(head.block for head in cfg.exits.heads):
        # Rows that exited and were not run later saved the layers above the deepest later exit; nothing else does.
        depths, deepest = [], 0
        for token in reversed(result.tokens):
            pre = cfg.exits.pre_exit and not token.is_final
            deepest = num_layers if token.caught_up else max(deepest, token.exit_layer - pre)
            depths.append(deepest)
        assert statistics.layer_passes == sum(depths)
        if not any(token.caught_up for token in result.tokens):
            # A token runs the layers up to its exit once, with all rows that wait for them.
            assert statistics.layer_runs == sum(
                token.exit_layer - (cfg.exits.pre_exit and not token.is_final) for token in result.tokens
            )


def check_invariants(engine: Engine) -> None:
    """Slots are free or taken once; deferred rows are consecutive, shallow ones last, and end with the newest."""
    running = list(engine._running.values())
    assert len({request.slot for request in running}) == len(running)
    assert engine.slots.num_free + len(running) == engine.description.num_slots
    for request in running:
        if request.num_rows == request.num_shared:
            continue  # the workers have not heard of it, or have run nothing for it
        state = worker_of(engine).slots[request.slot]
        assert (state.request.request_id, state.request.generation) == (request.request_id, request.generation)
        drafts = drafts_of(request)
        tokens = request.tokens + drafts
        assert 0 <= request.num_rows < len(tokens) <= engine.description.num_positions + 1 + len(drafts)
        is_drafting = isinstance(request, DraftingThenVerifying) and request.is_drafting
        is_waiting = request.num_rows == len(request.tokens) - 1 and not is_drafting  # with drafts from text
        assert request.is_prefilling or request.num_rows == len(tokens) - 1 or is_waiting
        assert state.ids[: request.num_rows] == tokens[: request.num_rows]
        assert len(request.generated) < request.request.max_tokens or request.request.max_tokens == 0
        deferred = [state.deferred[index] for index in sorted(state.deferred, reverse=True)]
        stops = [rows.stop for rows in deferred]
        assert [rows.first for rows in deferred[1:]] == stops[:-1]
        assert not deferred or stops[-1] == request.num_rows
        assert request.complete_to == (deferred[0].first if deferred else request.num_rows)
        assert state.num_deferred <= max(request.params.max_deferred, len(drafts))


def drafts_of(request: RunningGeneration) -> list[int]:
    """Tokens behind the answer that are not verified."""
    return request.drafts if isinstance(request, RunningSpeculation) else []


def cached_rows(engine: Engine, request: RunningGeneration, layer_number: int) -> int:
    """Rows whose keys and values the layer (counted from 1) has cached: those that have run it."""
    state, exits = worker_of(engine).slots[request.slot], engine.description.exits
    return request.num_rows - sum(
        rows.hidden.size(0) for index, rows in state.deferred.items() if exits[index].depth < layer_number
    )


def check_caches(cfg: RunConfig, engine: Engine) -> None:
    """Every layer, and the block of every exit that may be asked, has cached what the reference computes."""
    for request in engine._running.values():
        if request.num_rows == request.num_shared:
            continue
        tokens = (request.tokens + drafts_of(request))[: request.num_rows]
        reference, _ = reference_over(cfg, tokens)
        caches = [
            (layer - 1, f"decoder.layers.{layer - 1}", cached_rows(engine, request, layer))
            for layer in range(1, cfg.model.num_layers + 1)
        ]
        for index, block in decoder_of(engine)._blocks.items():
            if index in request.request.enabled_exits:
                exit_ = decoder_of(engine).exits[index]
                # Rows that wait at the exit have been through its block.
                seen = cached_rows(engine, request, exit_.depth)
                caches.append((block.cache_index, f"decoder.layers.{exit_.layer_number - 1}.exit_head.block", seen))
        for cache_index, name, count in (one for one in caches if one[2]):
            ours = cached(cfg, engine, cache_index, request.slot, count)
            for mine, theirs in zip(ours, reference.keys_and_values(name), strict=True):
                assert mine.shape == theirs[:count].shape
                assert (mine - theirs[:count]).abs().max() < 1e-5 * max(1.0, theirs.abs().max().item()), name


def cached(cfg: RunConfig, engine: Engine, cache_index: int, slot: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values, each [count, kv heads / tp, d], the channels of keys in the model's order."""
    keys, values = (
        of_layers[cache_index][0].transpose(0, 1)
        for of_layers in decoder_of(engine).cache.keys_and_values(slot, 1, count)
    )
    m = cfg.model
    if m.position_embedding_type == "rope":
        size = int(m.head_size * m.rotary_percent)
        keys = torch.cat([keys[..., :size:2], keys[..., 1:size:2], keys[..., size:]], -1)
    return keys, values


class RandomExits(LocalExecutor):
    """Rows exit by chance, so that some are deferred at all depths."""

    def submit(self, step: Step) -> None:
        def by_chance(rows: Rows) -> Rows:
            if rows.phase != "decode":
                return rows
            exits = (ExitThreshold(one.exit, 0.0 if random.random() < 0.4 else 2.0) for one in rows.exits)
            return msgspec.structs.replace(rows, exits=tuple(exits))

        super().submit(msgspec.structs.replace(step, rows=tuple(map(by_chance, step.rows))))


def walk_at_random(cfg: RunConfig, num_steps: int = 60, seed: int = 0, **changes: Any) -> None:
    """Requests of all modes come, go and are cancelled; after every step the caches are what the reference computes."""
    random.seed(seed)
    with layout(cfg):
        engine = make_engine(cfg, **{"num_slots": 3, "prefill_chunk": 7, "ends": {5}, **changes})
        engine.executor = RandomExits(worker_of(engine))
        modes = ["full", "early_exit", "self_speculative"]
        for step in range(num_steps):
            if random.random() < 0.4:
                add_random_request(engine, cfg, random.choice(modes))
            if random.random() < 0.05 and engine._running:
                engine.cancel(random.choice(list(engine._running)))
            engine.step()
            check_invariants(engine)
            if step % 4 == 0:
                check_caches(cfg, engine)


def add_random_request(engine: Engine, cfg: RunConfig, mode: str, vocab_size: int = VOCAB_SIZE) -> int:
    from megatron.early_exit.inference.params import SamplingSettings

    prompt = [random.randrange(vocab_size) for _ in range(random.choice([1, 2, 5, 12, 20]))]
    layers, drafting = list(cfg.exits.leaving_layers), list(cfg.exits.drafting_layers)
    params = GenerationParams(
        mode=mode,
        max_tokens=random.randrange(1, 25),
        sampling=SamplingSettings(temperature=random.choice([0.0, 1.0]), seed=random.randrange(1000)),
        exit_layers=tuple(random.sample(layers, random.randrange(1, len(layers) + 1))),
        max_deferred=random.choice([0, 2, 6, 32]),
        draft_source=(source := random.choice(["exit", "exit", "ngram", "both"])),
        draft_exit=None if source == "ngram" else random.choice([*drafting, None]),
        draft_length=random.choice([None, 1, 3]),
        echo=random.random() < 0.2,
    )
    return engine.add(prompt, params)
