"""Layers in batches of fixed shapes, as CUDA graphs need them; here without the capture, which tests/gpu/ has."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.worker import graphs
from megatron.early_exit.inference.worker.attention import Segment
from tests.configs import VOCAB_SIZE
from tests.distributed.engines import HEADS, STYLES, answer, decoding_config, make_engine, walk_at_random
from tests.distributed.parallel_model import layout
from tests.distributed.workers import run_distributed


def walk_with_graphs(**settings: Any) -> None:
    graphs._MIN_KEYS = 4  # so that sequences of 40 go through several sizes
    walk_at_random(**settings, use_graphs=True)


@pytest.mark.parametrize(("head", "style"), [*((head, "llama") for head in HEADS), *(("tied", s) for s in STYLES)])
def test_caches_whatever_the_requests_do(head: str, style: str) -> None:
    cfg = decoding_config(**HEADS[head], **STYLES[style])
    run_distributed(1, walk_with_graphs, cfg=cfg, num_slots=5, num_steps=40)


def test_answers_are_the_same_with_graphs_and_without() -> None:
    generator = random.Random(3)
    requests = []
    for mode in ("full", "early_exit", "self_speculative"):
        for length in (1, 3, 9, 17):
            prompt = [generator.randrange(VOCAB_SIZE) for _ in range(length)]
            requests.append((prompt, GenerationParams(max_tokens=20, mode=mode, exit_thresholds=(0.05,))))
    cfg = decoding_config(use_exit_norm=True)
    with_graphs, without = (
        run_distributed(1, answer, cfg=cfg, requests=requests, use_graphs=use_graphs)[0] for use_graphs in (True, False)
    )
    assert [result.token_ids for result in with_graphs] == [result.token_ids for result in without]
    for ours, theirs in zip(with_graphs, without, strict=True):
        assert [t.exit_layer for t in ours.tokens] == [t.exit_layer for t in theirs.tokens]
        assert [t.log_prob for t in ours.tokens] == pytest.approx([t.log_prob for t in theirs.tokens], rel=1e-4)


def run_ranges(cfg: RunConfig) -> None:
    """The same ranges with slots, rows and lengths of all kinds: as kernel by kernel, and few graphs."""
    with layout(cfg), torch.inference_mode():
        decoder = make_engine(cfg, num_slots=6, use_graphs=True).decoder
        plain = make_engine(cfg, num_slots=6).decoder
        random.seed(1)
        for _ in range(40):
            slots = sorted(random.sample(range(6), random.randrange(1, 7)))
            segments = [Segment(slot, random.randrange(0, 30), random.randrange(1, 9)) for slot in slots]
            outputs = []
            for one in (decoder, plain):
                place = one.attention_metadata(segments)
                torch.manual_seed(len(segments))
                out, residual = one.run_layers(torch.randn(place.num_rows, cfg.model.hidden_size), place, 1, 3)
                outputs.append(torch.cat([out, residual]))
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        # 1 to 8 slots (6 at most), 1 to 8 rows each, one number of keys: powers of two.
        assert decoder._graphs.num_graphs <= 4 * 4
        # A prompt has more rows than graphs take.
        num_graphs, place = decoder._graphs.num_graphs, decoder.attention_metadata([Segment(0, 0, 9)])
        decoder.run_layers(torch.randn(9, cfg.model.hidden_size), place, 1, 3)
        assert decoder._graphs.num_graphs == num_graphs


def test_ranges_of_layers_equal_those_without_graphs() -> None:
    run_distributed(1, run_ranges, cfg=decoding_config())
