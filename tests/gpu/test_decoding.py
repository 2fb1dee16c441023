"""Decoding on one GPU, kernel by kernel and with graphs: the reference's tokens and the CPU's draws in fp32, and bf16.

Everything but what is CUDA's own also runs on the CPU (`tests/distributed/test_graphs.py`, `test_engine.py`)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from megatron.early_exit.config.run import RunConfig
    from megatron.early_exit.inference.engine.engine import Engine
    from megatron.early_exit.inference.params import GenerationParams
    from megatron.early_exit.inference.results import RequestResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
PROMPTS = [[5, 17, 80, 3, 41], [9] * 20, [1]]
HEADS = ("untied_norm", "mlp", "block")
SAMPLINGS = ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}, {"temperature": 1.3, "seed": 6})


def config(head: str = "untied_norm") -> RunConfig:
    from tests.reference_checkpoint import HEADS, decoding_config

    return decoding_config(**HEADS[head])


def make_engine(
    device: torch.device, cfg: RunConfig, dtype: torch.dtype = torch.float32, use_graphs: bool = False
) -> Engine:
    """An engine of two slots, so that requests queue and join."""
    from megatron.early_exit.inference.engine.engine import Engine
    from megatron.early_exit.inference.executor.local import LocalExecutor
    from megatron.early_exit.inference.worker.decoder import Decoder
    from megatron.early_exit.inference.worker.worker import Worker
    from tests.configs import VOCAB_SIZE
    from tests.distributed.engines import COSTS, reference_weights

    weights = reference_weights(cfg, device=device, dtype=dtype)
    decoder = Decoder(weights, num_slots=2, vocab_size=VOCAB_SIZE, use_graphs=use_graphs)
    return Engine(LocalExecutor(Worker(decoder)), cfg.exits, costs=COSTS)


def median_confidence(cfg: RunConfig) -> float:
    """A threshold at which about half of the tokens leave at an exit."""
    from megatron.early_exit.inference.params import ScoreParams
    from tests.distributed.engines import score_all

    results = score_all(make_engine(CPU, cfg), [PROMPTS[0] * 4, PROMPTS[1]], ScoreParams(final=False))
    return float(
        np.median([confidence for result in results for head in result.heads for confidence in head.confidences])
    )


def all_modes(threshold: float, **sampling: Any) -> list[GenerationParams]:
    """Settings of every mode; with early exit once at the threshold, and once where nothing leaves."""
    from megatron.early_exit.inference.params import GenerationParams, SamplingSettings

    settings = {"max_tokens": 15, "sampling": SamplingSettings(**sampling)}
    return [
        GenerationParams(**settings),
        GenerationParams(**settings, mode="early_exit", exit_thresholds=(1.0,)),
        GenerationParams(**settings, mode="self_speculative"),
        GenerationParams(**settings, mode="early_exit", exit_thresholds=(threshold,), max_deferred=4),
    ]


def answers(engine: Engine, settings: list[GenerationParams]) -> list[RequestResult]:
    """The results of every prompt with all settings, in one run; nothing is captured meanwhile."""
    from megatron.early_exit.inference.worker import graphs
    from tests.distributed.engines import check_invariants, run_all

    with mock.patch.object(graphs, "_graph", side_effect=AssertionError("captured in traffic")):
        for prompt in PROMPTS:
            for params in settings:
                engine.add(prompt, params)
        results = run_all(engine)
    check_invariants(engine)
    return [results[one] for one in sorted(results)]


def reference_tokens(cfg: RunConfig) -> list[list[int]]:
    from tests.distributed.engines import reference_over

    expected = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(15):
            tokens.append(int(reference_over(cfg, tokens)[1][None][-1].argmax()))
        expected.append(tokens[len(prompt) :])
    return expected


@pytest.mark.parametrize("use_graphs", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_modes_without_exits_give_the_reference_s_tokens(head: str, use_graphs: bool) -> None:
    cfg = config(head)
    *settings, _ = all_modes(threshold=1.0)
    expected = [tokens for tokens in reference_tokens(cfg) for _ in settings]
    engine = make_engine(GPU, cfg, use_graphs=use_graphs)
    assert [result.token_ids for result in answers(engine, settings)] == expected


@pytest.mark.parametrize("use_graphs", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_tokens_and_exits_are_those_of_the_cpu(head: str, use_graphs: bool, sampling: dict) -> None:
    cfg = config(head)
    settings = all_modes(median_confidence(cfg), **sampling)
    on_gpu = answers(make_engine(GPU, cfg, use_graphs=use_graphs), settings)
    on_cpu = answers(make_engine(CPU, cfg), settings)
    exits = [token.exit_layer for result in on_cpu for token in result.tokens]
    assert len(set(exits)) > 1, "some tokens leave and some do not"
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.error is None and ours.token_ids == theirs.token_ids
        assert [token.exit_layer for token in ours.tokens] == [token.exit_layer for token in theirs.tokens]
        for mine, other in zip(ours.tokens, theirs.tokens, strict=True):
            assert mine.log_prob == pytest.approx(other.log_prob, rel=1e-3, abs=1e-4)
            assert mine.confidence == pytest.approx(other.confidence, rel=1e-3)


def test_bf16_runs() -> None:
    for use_graphs in (False, True):
        results = answers(make_engine(GPU, config(), torch.bfloat16, use_graphs), all_modes(threshold=0.1))
        assert [(result.error, len(result.token_ids)) for result in results] == [(None, 15)] * len(results)


def test_graphs_are_captured_when_the_decoder_is_made_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    from tests.distributed.engines import decoder_of

    with caplog.at_level(logging.INFO):
        graphs = decoder_of(make_engine(GPU, config(), use_graphs=True)).graphs
    assert 0 < graphs.num_graphs <= 64 * 6 and graphs.seconds > 0
    assert f"captured {graphs.num_graphs} CUDA graphs" in caplog.text


@pytest.mark.parametrize("use_graphs", [False, True])
def test_layers_never_wait_for_the_device(use_graphs: bool) -> None:
    from megatron.early_exit.inference.worker.attention import Segment
    from tests.distributed.engines import decoder_of

    decoder = decoder_of(make_engine(GPU, config("block"), use_graphs=use_graphs))
    segments = [Segment(0, 6, 1), Segment(1, 3, 2)]

    def run() -> None:
        metadata = decoder.attention_metadata(segments)
        hidden = decoder.embed([1, 2, 3], metadata)
        hidden, _ = decoder.run_layers(hidden, metadata, 0, decoder.num_layers)
        decoder.run_exit_block(0, hidden, metadata)

    with torch.inference_mode():
        run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_hidden_states_travel_as_bytes() -> None:
    from megatron.early_exit.inference.executor.hidden_states import from_bytes, to_bytes

    hidden = torch.randn(7, 48, device=GPU).to(torch.bfloat16)[1:]
    described, data = to_bytes(hidden)
    received = from_bytes(described, bytes(data))
    assert received.is_cuda and torch.equal(received, hidden)


def test_costs_are_measured_with_graphs_and_without() -> None:
    from megatron.early_exit.inference.worker.cost_measurement import measure_costs
    from tests.distributed.engines import decoder_of

    for use_graphs in (False, True):
        decoder = decoder_of(make_engine(GPU, config(), use_graphs=use_graphs))
        costs = measure_costs(decoder, repetitions=2)
        assert all(value > 0 for value in (*costs.layer_seconds, *costs.exit_head_seconds, *costs.final_head_seconds))
        assert costs.batch_seconds > 0
