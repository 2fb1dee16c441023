"""What is settled before a checkpoint is read: settings, the memory for keys and values, what it is of."""

from __future__ import annotations

import logging
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.early_exit.checkpoint.read_model import fingerprint, read_model
from megatron.early_exit.checkpoint.store import checkpoint_folder, write_checkpoint
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.inference import loading
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.loading import InferenceCheckpoint, LoadConfig
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.worker.kv_cache import (
    GIB,
    CacheMemory,
    CacheSize,
    bytes_per_token,
    cache_memory,
    choose_cache_size,
)
from megatron.early_exit.inference.worker.placement import AlonePlacement
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel
from tests.configs import VOCAB_SIZE, make_config
from tests.distributed.engines import decoding_config
from tests.distributed.parallel_model import reference_description, reference_tensors

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


def test_all_ranks_take_what_fits_on_each(checkpoint: Path) -> None:
    class Another(TensorParallel):
        """A rank beside one that has room for two slots."""

        def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
            return [tensor, torch.full_like(tensor, 2) if tensor.numel() == 1 else tensor]

    decoder = InferenceCheckpoint(LoadConfig(str(checkpoint))).load_decoder(VOCAB_SIZE, Another)
    assert decoder.cache.num_slots == 2


def test_ranks_that_see_different_checkpoints(checkpoint: Path) -> None:
    class Another(TensorParallel):
        def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
            return [tensor, tensor + 1]

    with pytest.raises(ValueError, match="rank 0 finds another checkpoint in .* than rank 1"):
        InferenceCheckpoint(LoadConfig(str(checkpoint))).load_decoder(VOCAB_SIZE, Another)


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
        ({"quantize": "int8"}, "quantize is 'int8'"),
        ({"shortlist": True}, "shortlist needs a calibration"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_reading(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, message: str
) -> None:
    monkeypatch.setattr(loading, "read_model", lambda folder: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=message):
        InferenceCheckpoint(LoadConfig(str(checkpoint), **settings))


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
