"""What is settled before a checkpoint is read: settings, the memory for keys and values, what it is of."""

from __future__ import annotations

import argparse
import functools
import logging
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import pytest
import torch

from megatron.early_exit.checkpoint.read_model import fingerprint, read_model
from megatron.early_exit.checkpoint.writing import write_checkpoint
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.inference import loading
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.loading import InferenceCheckpoint, LoadConfig
from megatron.early_exit.inference.model_flags import add_model_flags, engine_settings
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.shortlist import Shortlist
from megatron.early_exit.inference.stage_layers import split_layers, stages_in_words
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.kv_cache import (
    DEFAULT_SLOTS,
    GIB,
    CacheMemory,
    CacheSize,
    bytes_per_token,
    cache_memory,
    choose_cache_size,
)
from megatron.early_exit.inference.worker.placement import AlonePlacement
from megatron.early_exit.inference.worker.stage import Stage
from megatron.early_exit.inference.worker.worker import Worker
from tests.configs import VOCAB_SIZE, make_config
from tests.reference_checkpoint import decoding_config, reference_description, reference_tensors

T = TypeVar("T")

LLAMA_8B = {
    "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8, "ffn_hidden_size": 14336,
    "max_position_embeddings": 131072, "exit_layer_nums": (8, 16),
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    cfg = decoding_config(use_exit_block=True)
    description = replace(reference_description(cfg), dtype="fp32")
    write_checkpoint(tmp_path / "ck", description, reference_tensors(cfg))
    return tmp_path / "ck"


def describe(**changes: object) -> ModelDescription:
    return make_config(**changes).describe(VOCAB_SIZE)


def test_reading_says_nothing(checkpoint: Path) -> None:
    """PyTorch would tell users of `LLM.load` that torch.distributed is disabled."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _, tensors = read_model(checkpoint_folder(checkpoint))
        for tensor in tensors.values():
            tensor.read()
    assert [str(one.message) for one in said if issubclass(one.category, UserWarning)] == []


# The memory for keys and values.


def test_bytes_of_a_token() -> None:
    llama = describe(**LLAMA_8B)
    assert bytes_per_token(llama, 1, 2) == 32 * 2 * 8 * 128 * 2 == 128 * 1024
    assert bytes_per_token(llama, 4, 2) == 32 * 1024
    assert bytes_per_token(llama, 1, 2, range(4)) == 16 * 1024
    with_blocks = describe(**LLAMA_8B, use_exit_block=True)
    assert bytes_per_token(with_blocks, 1, 2) == 34 * 4096
    assert [bytes_per_token(with_blocks, 1, 2, range(8 * i, 8 * i + 8)) // 4096 for i in range(4)] == [9, 9, 8, 8]


@pytest.mark.parametrize(
    ("share", "asked", "size"),
    [
        (4 * GIB, {}, (8, 4096)),  # 512 MiB a slot of Llama 8B
        (80 * GIB, {}, (16, 4096)),
        (80 * GIB, {"max_requests": 100}, (100, 4096)),
        (4 * GIB, {"max_requests": 100}, (8, 4096)),
        (4 * GIB, {"max_requests": 2}, (2, 4096)),
        (4 * GIB, {"max_length": 1024}, (16, 1024)),
        (4 * GIB, {"max_length": 32768}, (1, 32768)),
        # What is asked for may take more than the share.
        (4 * GIB, {"max_length": 131072}, (1, 131072)),
        (4 * GIB, {"max_requests": 20, "max_length": 8192}, (20, 8192)),
    ],
)
def test_sizes(share: int, asked: dict, size: tuple[int, int]) -> None:
    chosen = choose_cache_size(128 * 1024, CacheMemory(share, 100 * GIB), 131072, **asked)
    assert (chosen.num_slots, chosen.num_positions) == size
    assert chosen.num_bytes == size[0] * size[1] * 128 * 1024


def test_the_model_s_own_limit_is_the_longest_sequence() -> None:
    assert choose_cache_size(1000, CacheMemory(GIB, GIB), 2048).num_positions == 2048


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_requests": 11, "max_length": 10}, "max_requests 11 and max_length 10 need .*: at most 11 requests of 9 "
         "tokens or 10 of 10 fit"),
        ({"max_requests": 101, "max_length": 101}, "at most 100 tokens fit"),
        ({"max_requests": 3, "max_length": 64}, "at most 3 requests of 33 tokens or 1 of 64 fit"),
        ({"max_length": 101}, "at most 1 request of 100 tokens fit"),
        ({"max_requests": 5}, "max_length 128 need .*: at most 1 request of 100 tokens fit"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(": at", "; at")):
        choose_cache_size(1000, CacheMemory(50_000, 100_000), 128, **asked)
    smaller = {"max_requests": 10, "max_length": 10}
    assert choose_cache_size(1000, CacheMemory(50_000, 100_000), 128, **smaller) == CacheSize(10, 10, 1000)


def test_memory() -> None:
    assert cache_memory(20 * GIB, is_gpu=False) == CacheMemory(4 * GIB, 20 * GIB)
    assert cache_memory(6 * GIB, is_gpu=False) == CacheMemory(3 * GIB, 6 * GIB)
    assert cache_memory(10 * GIB, is_gpu=True) == CacheMemory(9 * GIB, 9 * GIB)
    assert cache_memory(10 * GIB, is_gpu=True, stated_gib=1.5) == CacheMemory(3 * GIB // 2, 3 * GIB // 2)
    with pytest.raises(ValueError, match="kv_cache_gib is 11, but 10.00 GiB are free beside the weights"):
        cache_memory(10 * GIB, is_gpu=False, stated_gib=11)


def test_what_was_chosen_in_a_line() -> None:
    line = "8 slots x 4,096 tokens x 131,072 bytes a token = 4.00 GiB"
    assert str(choose_cache_size(128 * 1024, CacheMemory(4 * GIB, 4 * GIB), 131072)) == line


# Loading.


def patch_free(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    """What is free, one time after the other; then always the last."""
    left = list(free)
    monkeypatch.setattr(loading, "free_memory_bytes", lambda: left.pop(0) if len(left) > 1 else left[0])


def test_a_model_is_loaded_and_says_what_it_took(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, loading.__name__)
    per_token = (4 + 3) * 2 * 2 * 8 * 4  # layers and blocks, keys and values, heads, channels, fp32
    patch_free(monkeypatch, GIB, 2 * 5 * 40 * per_token)
    decoder = InferenceCheckpoint(LoadConfig(str(checkpoint))).load_decoder(VOCAB_SIZE)
    assert decoder.cache.size == CacheSize(5, 40, per_token)
    assert [record.message for record in caplog.records] == [f"keys and values: {decoder.cache.size}"]
    decoder = InferenceCheckpoint(LoadConfig(str(checkpoint), max_requests=3, max_length=7)).load_decoder(VOCAB_SIZE)
    assert decoder.cache.size == CacheSize(3, 7, per_token)


def test_memory_is_that_beside_the_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is read."""
    monkeypatch.setattr(loading, "read_model", lambda folder: pytest.fail("it was read"))
    config = LoadConfig(str(checkpoint), max_requests=1, max_length=40)
    weights = sum(tensor.num_bytes for tensor in reference_tensors(decoding_config(use_exit_block=True)).values())
    needed = 40 * (4 + 3) * 2 * 2 * 8 * 4
    patch_free(monkeypatch, weights + needed)
    InferenceCheckpoint(config)
    patch_free(monkeypatch, weights + needed - 1)
    with pytest.raises(ValueError, match="at most 1 request of 39 tokens fit"):
        InferenceCheckpoint(config)
    patch_free(monkeypatch, weights // 2)
    with pytest.raises(ValueError, match="0.0 MiB of memory are free for them .*; at most 0 tokens fit"):
        InferenceCheckpoint(config)


class Meeting:
    """Ranks in threads of this process, one a pipeline stage: they wait for each other where they agree."""

    def __init__(self, size: int) -> None:
        self.size, self._has_failed, self._changed = size, False, threading.Condition()
        self._values: list[list[int]] = [[] for _ in range(size)]

    def run(self, function: Callable[[MetPlacement], T]) -> list[T | Exception]:
        """What `function` gives on each rank, or raises."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(functools.partial(self._try, function), range(self.size)))

    def _try(self, function: Callable[[MetPlacement], T], stage: int) -> T | Exception:
        try:
            return function(MetPlacement(self, stage))
        except Exception as error:
            with self._changed:
                self._has_failed = True  # nobody waits for it
                self._changed.notify_all()
            return error

    def smallest(self, stage: int, value: int) -> int:
        with self._changed:
            self._values[stage].append(value)
            count = len(self._values[stage])
            self._changed.notify_all()
            everyone_is_here = lambda: all(len(values) >= count for values in self._values)
            self._changed.wait_for(lambda: everyone_is_here() or self._has_failed, timeout=60)
            assert everyone_is_here(), "another rank has failed"
            return min(values[count - 1] for values in self._values)


class MetPlacement(AlonePlacement):
    """One rank of a `Meeting`."""

    def __init__(self, meeting: Meeting, stage: int) -> None:
        self.stage, self._meeting = stage, meeting

    def smallest(self, value: int) -> int:
        return self._meeting.smallest(self.stage, value)


def load_stages(checkpoint: Path, num_stages: int, num_ids: int = VOCAB_SIZE, **settings: object) -> list[Decoder]:
    def load(placement: MetPlacement) -> Decoder:
        config = LoadConfig(str(checkpoint), pipeline_parallel_size=num_stages, **settings)
        return InferenceCheckpoint(config, placement.stage).load_decoder(num_ids, placement)

    decoders = Meeting(num_stages).run(load)
    for one in decoders:
        assert isinstance(one, Decoder), one
    return decoders


def test_all_ranks_take_what_fits_on_each(checkpoint: Path) -> None:
    class Another(AlonePlacement):
        """A rank beside one that has room for two slots."""

        def smallest(self, value: int) -> int:
            return 2 if value == DEFAULT_SLOTS else value

    decoder = InferenceCheckpoint(LoadConfig(str(checkpoint))).load_decoder(VOCAB_SIZE, Another())
    assert decoder.cache.num_slots == 2


@pytest.mark.parametrize("num_stages", [1, 2])
def test_ranks_that_see_different_checkpoints(
    checkpoint: Path, tmp_path: Path, num_stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All refuse, before anything is read."""
    monkeypatch.setattr(loading, "decoder_weights", lambda *_, **__: pytest.fail("it was read"))
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    (settings,) = other.rglob("model.yaml")
    settings.write_text(settings.read_text() + "# another\n")

    def load(placement: MetPlacement) -> None:
        path, stage = str(other if placement.stage else checkpoint), placement.stage if num_stages == 2 else 0
        config = LoadConfig(path, pipeline_parallel_size=num_stages)
        InferenceCheckpoint(config, stage).load_decoder(VOCAB_SIZE, placement)

    for error in Meeting(2).run(load):
        assert isinstance(error, ValueError) and "ranks find different checkpoints in" in str(error)


@pytest.mark.parametrize("layers", [None, (1, 2, 1)])
def test_a_stage_loads_its_own_layers(
    checkpoint: Path, layers: tuple[int, ...] | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, loading.__name__)
    stages = load_stages(checkpoint, 3, pipeline_layers=layers, max_requests=2)
    ranges = [(0, 2), (2, 3), (3, 4)] if layers is None else [(0, 1), (1, 3), (3, 4)]
    assert [(one.first_layer, one.last_layer) for one in stages] == ranges
    assert [[(exit_.index, exit_.layer_number) for exit_ in one.exits] for one in stages] == (
        [[(0, 1), (1, 2)], [(2, 3)], []] if layers is None else [[(0, 1)], [(1, 2), (2, 3)], []]
    )
    per_layer = 2 * 2 * 8 * 4  # keys and values, heads, channels, fp32
    counts = [4, 2, 1] if layers is None else [2, 4, 1]  # layers and blocks of exits
    assert [one.cache.size.bytes_per_token for one in stages] == [count * per_layer for count in counts]
    descriptions = {msgspec.msgpack.encode(Worker(one).description) for one in stages}
    assert len(descriptions) == 1
    described = Worker(stages[2]).description
    assert described.layers_per_stage == ((2, 1, 1) if layers is None else layers)
    assert [described.stage_of(index) for index in range(3)] == ([0, 0, 1] if layers is None else [0, 1, 1])
    assert [(one.layer_number, one.depth, one.has_block) for one in described.exits] == [
        (1, 1, True), (2, 2, True), (3, 3, True)
    ]  # fmt: skip
    assert (described.bytes_per_token, described.num_slots, described.num_layers) == (4 * per_layer, 2, 4)
    assert [record.message for record in caplog.records] == [
        f"keys and values: 2 slots x 40 tokens x {4 * per_layer} bytes a token = 0.00 GiB on each rank"
    ]


@pytest.mark.parametrize("num_exits", [0, 3])
def test_stages_agree_on_the_ids_that_the_model_knows(tmp_path: Path, num_exits: int) -> None:
    """A stage without heads does not see the rows of zeros."""
    cfg = decoding_config(exit_layer_nums=(1, 2, 3)[:num_exits], untie_exit_output_weights=num_exits > 0)
    tensors, word = reference_tensors(cfg), "embedding.word_embeddings.weight"
    zeroed = lambda tensor: torch.cat([tensor[:90], torch.zeros_like(tensor[90:])])
    tensors[word] = tensors[word].then(tensors[word].shape, zeroed)
    write_checkpoint(tmp_path / "ck", reference_description(cfg), tensors)
    assert [one.vocab_size for one in load_stages(tmp_path / "ck", 4, 93)] == [90] * 4


def test_all_stages_say_whether_exits_are_evaluated_at_less_cost(checkpoint: Path) -> None:
    Shortlist.of_counts(np.arange(VOCAB_SIZE), 20).save(checkpoint / "iter_0000000")
    assert [one.has_approximate_heads for one in load_stages(checkpoint, 2)] == [True] * 2
    assert [one.has_approximate_heads for one in load_stages(checkpoint, 2, shortlist=False)] == [False] * 2


def test_memory_is_that_of_the_stage(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own weights, and keys and values of its own layers."""
    per_layer = 40 * 2 * 2 * 8 * 4
    config = LoadConfig(str(checkpoint), pipeline_parallel_size=2, max_requests=1, max_length=40)
    for stage, num_caches in enumerate((4, 3)):
        names = [f"decoder.layers.{index}." for index in (2 * stage, 2 * stage + 1)]
        names += ["embedding."] + ["decoder.final_layernorm."] * stage
        tensors = reference_tensors(decoding_config(use_exit_block=True))
        weights = sum(one.num_bytes for name, one in tensors.items() if name.startswith(tuple(names)))
        patch_free(monkeypatch, weights + num_caches * per_layer)
        InferenceCheckpoint(config, stage)
        patch_free(monkeypatch, weights + num_caches * per_layer - 1)
        with pytest.raises(ValueError, match="at most 1 request of 39 tokens fit"):
            InferenceCheckpoint(config, stage)


def test_a_rank_of_several_stages_is_a_stage(checkpoint: Path) -> None:
    settings = {"path": str(checkpoint), "pipeline_parallel_size": 2, "pipeline_layers": [3, 1], "max_requests": 2}
    both = Meeting(2).run(lambda placement: loading.load_worker(placement, VOCAB_SIZE, **settings, fill_min_rows=5))
    assert all(isinstance(stage, Stage) and text == fingerprint(checkpoint / "iter_0000000") for stage, text in both)


@pytest.mark.parametrize(
    ("cores", "num_ranks", "has_gpu", "rows"),
    [(2, 2, False, 1), (2, 3, False, 8), (64, 8, False, 1), (2, 4, True, 1)],
)
def test_rows_go_on_several_at_a_time_where_ranks_share_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, num_ranks: int, has_gpu: bool, rows: int
) -> None:
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(loading, "use_cuda", lambda: has_gpu)
    assert loading.default_fill_min_rows(num_ranks) == rows


# Layers of stages.


@pytest.mark.parametrize("num_layers", range(1, 13))
def test_layers_are_spread_evenly(num_layers: int) -> None:
    for num_stages in range(1, num_layers + 1):
        layers = split_layers(num_layers, num_stages)
        assert (len(layers), sum(layers)) == (num_stages, num_layers)
        assert max(layers) - min(layers) <= 1 and layers[-1] == min(layers)


def test_stages_in_words() -> None:
    assert stages_in_words((4, 4, 1), (2, 6, 8)) == "layers 1 to 4 (exit 2), 5 to 8 (exits 6, 8), 9"


def test_fingerprints(checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint / "iter_0000000"
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert fingerprint(copy) == fingerprint(folder)
    cfg = decoding_config(use_exit_block=True)
    tensors = reference_tensors(cfg)
    name = "decoder.final_layernorm.weight"
    tensors[name] = tensors[name].then(tensors[name].shape, lambda tensor: tensor + 1)
    other = write_checkpoint(tmp_path / "other", reference_description(cfg), tensors)
    assert fingerprint(other) != fingerprint(folder)


def test_an_exit_that_no_stage_has(tmp_path: Path) -> None:
    """In settings that were edited: the heads of these exits have no parameters that could be missing."""
    cfg = decoding_config()
    write_checkpoint(tmp_path / "ck", reference_description(cfg), reference_tensors(cfg))
    (settings,) = tmp_path.rglob("model.yaml")
    text = settings.read_text()
    settings.write_text(re.sub(r"exit_layer_nums:.*?(?=\n\S|\n  \w)", "exit_layer_nums: [1, 7]", text, flags=re.DOTALL))
    with pytest.raises(ValueError, match="name an exit at layer 7, which no stage has: .* layers 1 to 4; correct"):
        InferenceCheckpoint(LoadConfig(str(tmp_path / "ck"), pipeline_parallel_size=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "fp8"}, "dtype is 'fp8'; choose one of fp32, bf16"),
        ({"max_requests": 0}, "max_requests is 0; it must be at least 1"),
        ({"max_length": -1}, "max_length is -1; it must be at least 1"),
        ({"max_length": 41}, "max_length is 41; the model takes sequences of 1 to 40 tokens"),
        ({"kv_cache_gib": 0}, "kv_cache_gib is 0.0; it must be a number above 0"),
        ({"kv_cache_gib": float("nan")}, "kv_cache_gib is nan"),
        ({"kv_cache_gib": "4"}, "kv_cache_gib is '4'; it must be a number"),
        ({"kv_cache_gib": 1e-6}, "at most .* fit"),
        ({"tensor_parallel_size": 4}, "4 tensor-parallel ranks cannot share the model in equal parts"),
        ({"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, "4 tensor-parallel ranks cannot share"),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size is 0; it must be at least 1"),
        ({"pipeline_parallel_size": 2.0}, "pipeline_parallel_size is 2.0; it must be an integer"),
        ({"pipeline_parallel_size": 5}, "pipeline_parallel_size is 5, but the model has 4 layers .*; choose at most 4"),
        (
            {"pipeline_parallel_size": 2, "pipeline_layers": (2, 1, 1)},
            r"pipeline_layers is 2 1 1, but "
            "pipeline_parallel_size is 2; give one number for each stage",
        ),
        ({"pipeline_layers": (2, 2)}, "pipeline_layers is 2 2, but pipeline_parallel_size is 1"),
        (
            {"pipeline_parallel_size": 2, "pipeline_layers": (2, 3)},
            "pipeline_layers is 2 3, 5 layers in all, but the "
            "model has 4; choose numbers that add up to 4, such as 2 2",
        ),
        (
            {"pipeline_parallel_size": 2, "pipeline_layers": (4, 0)},
            "pipeline_layers is 4 0; every stage needs at least",
        ),
        ({"pipeline_parallel_size": 2, "pipeline_layers": (5, -1)}, "pipeline_layers is 5 -1; every stage needs"),
        ({"pipeline_parallel_size": 2, "pipeline_layers": (2, 2.0)}, "pipeline_layers is 2.0; it must be an integer"),
        ({"pipeline_parallel_size": 2, "pipeline_layers": "2 2"}, "pipeline_layers is '2 2'; it must be an integer"),
        ({"pipeline_parallel_size": 2, "fill_min_rows": 0}, "fill_min_rows is 0; it must be at least 1"),
        ({"fill_min_rows": 8}, "fill_min_rows has no effect on one stage"),
        ({"pipeline_parallel_size": 2, "fill_min_rows": 65}, "fill_min_rows is 65; at most 64 rows go on at once"),
        ({"quantize": "int8"}, "quantize is 'int8'; choose 'all', or leave it out"),
        ({"quantize": "exits"}, "quantize is 'exits', which there is no more.* leave it out: .* a shortlist .* probes"),
        ({"shortlist": True}, "shortlist needs frequent tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_reading(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, message: str
) -> None:
    monkeypatch.setattr(loading, "read_model", lambda folder: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=message):
        InferenceCheckpoint(LoadConfig(str(checkpoint), **settings))


def test_the_command_line_refuses_exits_in_int8(capsys: pytest.CaptureFixture) -> None:
    """At once, and not when the model is loaded: tuning does other work before."""
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    assert engine_settings(parser.parse_args(["--load", "ck", "--quantize", "all"]))["quantize"] == "all"
    with pytest.raises(SystemExit):
        parser.parse_args(["--load", "ck", "--quantize", "exits"])
    assert "argument --quantize: quantize is 'exits', which there is no more" in capsys.readouterr().err


def test_a_worker_from_plain_values(checkpoint: Path) -> None:
    """As a process for one rank makes it."""
    settings = {"path": str(checkpoint), "max_requests": 2, "max_length": 30, "dtype": "bf16", "quantize": None}
    worker, text = loading.load_worker(AlonePlacement(), VOCAB_SIZE - 1, **settings)
    assert text == fingerprint(checkpoint / "iter_0000000")
    described = worker.description
    assert (described.num_slots, described.num_positions, described.vocab_size) == (2, 30, VOCAB_SIZE - 1)
    assert described.bytes_per_token == (4 + 3) * 2 * 2 * 8 * 2


def test_it_answers_without_a_process_group(checkpoint: Path) -> None:
    answers = LLM.load(str(checkpoint)).generate([[1, 2, 3]], GenerationParams(max_tokens=3))
    assert len(answers[0].result.token_ids) == 3
    assert not torch.distributed.is_initialized()


def test_fewer_requests_at_once_than_asked_for_are_said(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    patch_free(monkeypatch, 4 * GIB)
    few = InferenceCheckpoint(LoadConfig(str(checkpoint), max_requests=10**6, kv_cache_gib=0.001)).load_decoder(96)
    assert f"{few.cache.num_slots} requests at once, not of max_requests 1000000" in caplog.text
