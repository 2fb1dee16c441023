"""Parts of the model in batches of fixed shapes, as CUDA graphs need them. The capture itself is in tests/gpu/; here
what a graph keeps is recorded, and run again over the same memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.worker import graphs
from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.inference.worker.decoder import Decoder
from tests.configs import VOCAB_SIZE
from tests.distributed.engines import answer, decoder_of, make_engine, walk_at_random
from tests.distributed.parallel_model import layout
from tests.distributed.workers import run_distributed
from tests.reference_checkpoint import HEADS, STYLES, decoding_config


class RecordedKernels(TorchDispatchMode):
    """What a CUDA graph keeps of a computation: operations and the memory that they read and write, no Python."""

    # They read the device's memory on the host, or copy from the host's: a capture refuses them.
    _REFUSED = frozenset("_local_scalar_dense item is_nonzero equal nonzero masked_select lift_fresh".split())

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert str(func).split(".")[1] not in self._REFUSED, f"{func} cannot be captured"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Run the operations again, into the memory of the first time."""
        for func, args, kwargs, first in self.calls:
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(first), tree_leaves(again), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class Captures:
    """In place of captures: counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, launch: Callable[[], None], cuda: None) -> Callable[[], None]:
        assert cuda is None
        self.count += 1
        with RecordedKernels() as recorded:
            launch()
        return recorded.replay


@contextmanager
def recorded_graphs() -> Iterator[Captures]:
    """Graphs are recordings, with key counts small enough for sequences of 40 to go through several."""
    captures = Captures()
    with mock.patch.multiple(graphs, _MIN_KEYS=4, _graph=captures):
        yield captures


def two_decoders(cfg: RunConfig, num_slots: int = 9) -> tuple[Decoder, Decoder]:
    """(with graphs, without), with the same weights"""
    engines = (make_engine(cfg, num_slots=num_slots, use_graphs=use_graphs) for use_graphs in (True, False))
    return tuple(map(decoder_of, engines))


def random_segments(num_slots: int, most_rows: int = 16) -> list[Segment]:
    slots = sorted(random.sample(range(num_slots), random.choice([1, 2, random.randrange(1, num_slots + 1)])))
    return [Segment(slot, random.randrange(0, 24), random.randrange(1, most_rows + 1)) for slot in slots]


def run_parts(cfg: RunConfig) -> None:
    """The same parts over slots, rows and lengths of all kinds: results and the whole cache as kernel by kernel."""
    with layout(cfg), torch.inference_mode(), recorded_graphs() as captures:
        random.seed(1)
        decoder, plain = two_decoders(cfg)
        num_captured = captures.count
        assert num_captured == decoder.graphs.num_graphs > 0
        depths = [0, 1, 2, 3, cfg.model.num_layers]
        blocks = [index for index, one in enumerate(decoder.exits) if one.block is not None]
        for _ in range(40):
            segments = random_segments(9, random.choice([1, 4, 16]))
            first, last = sorted(random.sample(depths, 2))
            hidden = torch.randn(sum(one.num_rows for one in segments), cfg.model.hidden_size)
            outputs = []
            for one in (decoder, plain):
                metadata = one.attention_metadata(segments)
                parts = [*one.run_layers(hidden, metadata, first, last)]
                parts += [one.run_exit_block(index, hidden, metadata) for index in blocks]
                outputs.append(torch.stack(parts))
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
            # Rows that fill a batch have written nowhere but behind the last position.
            caches = [one.cache._cache[:, :, : one.num_positions] for one in (decoder, plain)]
            torch.testing.assert_close(*caches, rtol=1e-4, atol=1e-5)
        assert captures.count == num_captured, "captured in traffic"


@pytest.mark.parametrize("head", ["tied", "mlp", "block", "pre_exit_block"])
def test_parts_equal_those_without_graphs(head: str) -> None:
    run_distributed(1, run_parts, cfg=decoding_config(**HEADS[head]))


def test_learned_positions_equal_those_without_graphs() -> None:
    run_distributed(1, run_parts, cfg=decoding_config(**STYLES["gpt2"]))


def run_what_no_graph_holds(cfg: RunConfig) -> None:
    """Prompts, and layers that are not between exits, run kernel by kernel."""
    with layout(cfg), torch.inference_mode():
        decoder, plain = two_decoders(cfg, num_slots=2)
        with mock.patch.object(graphs.ModelGraphs, "_describe", side_effect=AssertionError("runs as a graph")):
            for segment, first, last in ((Segment(1, 0, 17), 0, 3), (Segment(1, 5, 1), 0, 2)):
                hidden = torch.randn(segment.num_rows, cfg.model.hidden_size)
                outputs = [
                    torch.stack(one.run_layers(hidden, one.attention_metadata([segment]), first, last))
                    for one in (decoder, plain)
                ]
                torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_what_no_graph_holds_runs_kernel_by_kernel() -> None:
    cfg = decoding_config(exit_layer_nums=(1, 3))
    run_distributed(1, run_what_no_graph_holds, cfg=cfg)


def make_metadata(cfg: RunConfig) -> None:
    with layout(cfg), torch.inference_mode():
        decoder, plain = two_decoders(cfg)
        segments = [Segment(0, 3, 1), Segment(1, 5, 2), Segment(2, 0, 2)]
        hidden = torch.randn(5, cfg.model.hidden_size)
        ranges = ((0, 1), (1, 3), (3, cfg.model.num_layers))
        metadata = decoder.attention_metadata(segments)
        before = dict(vars(metadata))
        describe = mock.patch.object(graphs.ModelGraphs, "_describe", autospec=True, side_effect=ORIGINAL_DESCRIBE)
        with describe as described:
            for first, last in ranges:
                decoder.run_layers(hidden, metadata, first, last)
            assert described.call_count == 1, "all ranges of a step share what is in the buffers"
            decoder.run_layers(hidden, decoder.attention_metadata(segments[:2]), *ranges[0])
            assert described.call_count == 2
        assert vars(metadata) == before, "made what only layers that run kernel by kernel need"
        metadata = plain.attention_metadata(segments)
        assert vars(metadata).keys() == before.keys(), "made before a layer needs it"
        plain.run_layers(hidden, metadata, *ranges[0])
        made = dict(vars(metadata))
        assert len(made) > len(before)
        for first, last in ranges[1:]:
            plain.run_layers(hidden, metadata, first, last)
        assert {name: id(value) for name, value in vars(metadata).items()} == {
            name: id(value) for name, value in made.items()
        }, "made twice"


ORIGINAL_DESCRIBE = graphs.ModelGraphs._describe


def test_attention_metadata_is_made_once_and_only_where_it_is_needed() -> None:
    run_distributed(1, make_metadata, cfg=decoding_config())


def walk_with_graphs(**settings: Any) -> None:
    with recorded_graphs():
        walk_at_random(**settings, use_graphs=True)


@pytest.mark.parametrize(("head", "style"), [*((head, "llama") for head in HEADS), *(("tied", s) for s in STYLES)])
def test_caches_whatever_the_requests_do(head: str, style: str) -> None:
    cfg = decoding_config(**HEADS[head], **STYLES[style])
    run_distributed(1, walk_with_graphs, cfg=cfg, num_slots=8, num_steps=40)


def answers_with_and_without(cfg: RunConfig, requests: list) -> list[list]:
    with recorded_graphs() as captures:
        results = [answer(cfg, requests, use_graphs=use_graphs) for use_graphs in (True, False)]
        assert captures.count > 0
        return results


def test_answers_are_the_same_with_graphs_and_without() -> None:
    generator = random.Random(3)
    requests = []
    for mode in ("full", "early_exit", "self_speculative"):
        for length in (1, 3, 9, 17):
            prompt = [generator.randrange(VOCAB_SIZE) for _ in range(length)]
            requests.append((prompt, GenerationParams(max_tokens=20, mode=mode, exit_thresholds=(0.05,))))
    cfg = decoding_config(use_exit_norm=True)
    (with_graphs, without) = run_distributed(1, answers_with_and_without, cfg=cfg, requests=requests)[0]
    assert [result.token_ids for result in with_graphs] == [result.token_ids for result in without]
    for ours, theirs in zip(with_graphs, without, strict=True):
        assert [t.exit_layer for t in ours.tokens] == [t.exit_layer for t in theirs.tokens]
        assert [t.log_prob for t in ours.tokens] == pytest.approx([t.log_prob for t in theirs.tokens], rel=1e-4)


def test_no_more_rows_are_deferred_than_a_graph_completes() -> None:
    request = ([5, 3], GenerationParams(max_tokens=30, mode="early_exit", exit_thresholds=(0.0,), max_deferred=32))
    cfg = decoding_config(exit_layer_nums=(2,))
    (with_graphs, without) = run_distributed(1, answers_with_and_without, cfg=cfg, requests=[request])[0]
    assert [result.token_ids for result in with_graphs] == [result.token_ids for result in without]
    caught_up = [[number for number, one in enumerate(a[0].tokens) if one.caught_up] for a in (with_graphs, without)]
    assert caught_up == [[15], []]


def run_gpu_test_on_cpu(head: str) -> None:
    from tests.gpu import test_decoding

    with mock.patch.object(test_decoding, "GPU", test_decoding.CPU):
        test_decoding.test_tokens_and_exits_are_those_of_the_cpu(head, True, test_decoding.SAMPLINGS[1])


def test_the_gpu_s_tests_fit_the_engine() -> None:
    """They run here with graphs that are none, so that they are ready where there is a GPU."""
    run_distributed(1, run_gpu_test_on_cpu, head="mlp")
