"""Hidden states in files: what is written is read, in any order, by the right run only."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron.early_exit.data.batches import Batch, collate
from megatron.early_exit.data.hidden_states import CacheContent, CachedSamples, HiddenStateCache

CONTENT = CacheContent(
    seq_length=6, hidden_size=5, dtype="bfloat16", layers={"0": 1.5, "1": 20.25, "2": 3.0}, samples={"0": "a", "1": "b"}
)


def make_cache(folder: Path, num_samples: int = 4, content: CacheContent = CONTENT) -> HiddenStateCache:
    cache = HiddenStateCache(folder, content, num_samples)
    cache.create(["layer_2_output"])
    return cache


def test_parts_of_sequences_are_read_back(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    values = torch.randn(4, 6, 5).bfloat16()
    for first_sample in (2, 0):
        for first_row in (3, 0):
            part = values[first_sample : first_sample + 2, first_row : first_row + 3]
            cache.write("layer_2_output", first_sample, first_row, part)
    for sample in range(4):
        assert torch.equal(cache.read("layer_2_output", sample, slice(None)), values[sample])
        assert torch.equal(cache.read("layer_2_output", sample, slice(3, 6)), values[sample, 3:])


def test_progress_survives(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    assert cache.num_leading(["layer_2_output"]) == 0
    cache.mark("layer_2_output", [0, 1, 3])
    again = make_cache(tmp_path)
    assert again.num_leading(["layer_2_output"]) == 2 and again.done("layer_2_output").tolist() == [1, 1, 0, 1]
    again.mark("layer_2_output", [2])
    assert again.num_leading(["layer_2_output"]) == 4
    assert again.num_leading([]) == 4  # a rank without exits waits for nobody
    larger = make_cache(tmp_path, num_samples=7)
    assert larger.num_leading(["layer_2_output"]) == 4 and larger.num_leading(["layer_2_output", "final"]) == 0


def test_samples_whose_values_were_cut_are_computed_again(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    cache.write("layer_2_output", 0, 0, torch.ones(4, 6, 5))
    cache.mark("layer_2_output", [0, 1, 2, 3])
    values = tmp_path / "layer_2_output.bin"
    values.write_bytes(values.read_bytes()[: 2 * 60 + 1])  # bytes of a sample: 6 tokens x 5 numbers x 2
    again = make_cache(tmp_path)
    assert again.done("layer_2_output").tolist() == [1, 1, 0, 0] and again.num_leading(["layer_2_output"]) == 2
    assert torch.equal(again.read("layer_2_output", 1, slice(None)).float(), torch.ones(6, 5))
    values.unlink()
    assert make_cache(tmp_path).num_leading(["layer_2_output"]) == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cache.json", b'{"seq_length": 6, "hid'),
        ("cache.json", b"{}"),
        ("cache.json", b"[1]"),
        ("cache.json", b"\xff"),
        ("layer_2_output.done", b"\1\1\7\1"),
    ],
)
def test_damaged_files_are_named_with_what_to_do(tmp_path: Path, name: str, content: bytes) -> None:
    make_cache(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged .*: remove the folder {tmp_path}, and it is made again"):
        make_cache(tmp_path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"seq_length": 7}, "seq length 6, not 7"),
    ({"dtype": "float32"}, "dtype bfloat16, not float32"),
    ({"layers": {"0": 1.5, "1": 20.26}}, r"other weights \(layers 1\)"),
    ({"layers": {"0": 1.6}}, r"other weights \(layers embedding\)"),
    ({"samples": {"1": "c"}}, "other data"),
])  # fmt: skip
def test_hidden_states_of_something_else_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    make_cache(tmp_path)
    with pytest.raises(ValueError, match=message):
        make_cache(tmp_path, content=replace(CONTENT, **changes))


def test_deeper_exits_add_to_what_is_known(tmp_path: Path) -> None:
    make_cache(tmp_path)
    make_cache(tmp_path, content=replace(CONTENT, layers={"0": 1.5, "3": 9.0}, samples={"3": "d"}))
    with pytest.raises(ValueError, match=r"other weights \(layers 2, 3\)"):
        make_cache(tmp_path, content=replace(CONTENT, layers={"2": 4.0, "3": 8.0}))


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=239))
    with pytest.raises(OSError, match="4 hidden states of 6 tokens take .* Give fewer --cache-samples"):
        make_cache(tmp_path)
    assert not list(tmp_path.iterdir())


class Numbers(torch.utils.data.Dataset):
    """Sample i holds the token i."""

    def __getitem__(self, index: int) -> Batch:
        token = torch.tensor([index])
        return Batch(token, token, token.float(), token, None)


def test_every_pass_draws_every_sample_once_with_its_own_hidden_states(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, num_samples=8)
    for sample in range(8):
        cache.write("layer_2_output", sample, 0, torch.full((1, 6, 5), float(sample)))
    samples = CachedSamples(
        Numbers(), cache, points=["layer_2_output"], rows=slice(2, 4), num_samples=20, seed=3
    )  # fmt: skip
    assert len(samples) == 20
    drawn = [samples[index] for index in range(20)]
    for batch in drawn:
        assert torch.equal(batch.hidden_states["layer_2_output"].float(), batch.tokens.float().expand(2, 5))
    order = [int(batch.tokens) for batch in drawn]
    assert order[:8] == list(range(8)) and sorted(order[8:16]) == list(range(8)) and order[8:16] != order[:8]
    assert order[16:] != order[8:12] and len(set(order[16:])) == 4
    # A worker's copy draws the same.
    worker = pickle.loads(pickle.dumps(samples))
    assert [int(worker[index].tokens) for index in range(20)] == order


def test_batches_carry_hidden_states(tmp_path: Path) -> None:
    samples = [
        Batch(*(torch.full((3,), value) for value in range(4)), None, {"final": torch.full((3, 2), float(number))})
        for number in range(2)
    ]
    batch = collate(samples).to("cpu")
    assert batch.tokens.shape == (2, 3) and batch.attention_mask is None
    assert np.array_equal(batch.hidden_states["final"][:, 0, 0], [0.0, 1.0])
