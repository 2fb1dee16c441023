"""Datasets and iterators: what a batch holds, the order of samples, and every way in which data files can be bad."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.data import token_files
from megatron.early_exit.data.batches import DataExhaustedError, build_iterator
from megatron.early_exit.data.core_datasets import TokenDataset
from megatron.early_exit.data.datasets import build_datasets
from megatron.early_exit.data.token_files import check_token_file
from megatron.early_exit.data.tokenizer import Tokenizer, build_tokenizer

EOD = 256
SEQ_LENGTH = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer_type="ByteLevelTokenizer"))


def write_tokens(prefix: Path, documents: list[list[int]]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def numbered(num_documents: int, first: int = 0, length: int = 20) -> list[list[int]]:
    return [[(first + i) % 200] * (length - 1) + [EOD] for i in range(num_documents)]


def build(
    data: DataConfig,
    tokenizer: Tokenizer,
    num_samples: tuple[int, int, int] = (10, 0, 0),
    vocab_size: int = 257,
    seq_length: int = SEQ_LENGTH,
) -> tuple[TokenDataset | None, ...]:
    return build_datasets(
        data, tokenizer, seq_length=seq_length, seed=7, num_samples=num_samples, vocab_size=vocab_size
    )


# What a sample holds


def test_samples_are_the_documents_cut_into_sequences(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = write_tokens(tmp_path / "d", [list(range(100)), list(range(100, 200))])
    train, valid, test = build(DataConfig(data_path=(prefix,), split="1,0,0"), tokenizer, (24, 0, 0))
    assert (valid, test) == (None, None)
    assert len(train) >= 24
    starts = set()
    for i in range(len(train)):
        sample = train[i]
        assert sample.tokens.dtype == sample.labels.dtype == sample.position_ids.dtype == torch.int64
        assert torch.equal(sample.labels[:-1], sample.tokens[1:])
        assert torch.equal(sample.loss_mask, torch.ones(SEQ_LENGTH))
        assert torch.equal(sample.position_ids, torch.arange(SEQ_LENGTH))
        assert sample.attention_mask is None
        starts.add(int(sample.tokens[0]))
    assert len(starts) >= 24  # all different: one epoch


def sample_of(tmp_path: Path, tokenizer: Tokenizer, tokens: list[int], **flags: bool):
    prefix = write_tokens(tmp_path / "hand", [tokens])
    train, _, _ = build(DataConfig(data_path=(prefix,), split="1,0,0", **flags), tokenizer, (1, 0, 0))
    return train[0]


HAND_MADE = [10, 11, EOD, 12, 13, EOD, 14, 15, 16]  # 8 inputs and the last label


def test_eod_mask_loss_masks_where_the_input_is_eod(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sample = sample_of(tmp_path, tokenizer, HAND_MADE, eod_mask_loss=True)
    assert sample.tokens.tolist() == HAND_MADE[:-1]
    assert sample.labels.tolist() == HAND_MADE[1:]
    assert sample.loss_mask.tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    assert sample.position_ids.tolist() == list(range(8))


def test_reset_position_ids_counts_from_0_after_each_eod(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sample = sample_of(tmp_path, tokenizer, HAND_MADE, reset_position_ids=True)
    assert sample.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert sample.loss_mask.tolist() == [1] * 8
    assert sample.attention_mask is None


def test_reset_attention_mask_separates_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sample = sample_of(tmp_path, tokenizer, HAND_MADE, reset_attention_mask=True)
    document = [0, 0, 0, 1, 1, 1, 2, 2]
    expected = [[[j > i or document[i] != document[j] for j in range(8)] for i in range(8)]]
    assert sample.attention_mask.tolist() == expected
    batch = next(build_iterator(_Repeat(sample, 4), micro_batch_size=2, dp_rank=0, dp_size=1))
    assert batch.attention_mask.shape == (2, 1, 8, 8)
    assert batch.attention_mask.dtype == torch.bool


class _Repeat(torch.utils.data.Dataset):
    def __init__(self, sample, length: int) -> None:
        self.sample, self.length = sample, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        return self.sample


# Splits, blends, caches


def test_split_gives_each_document_to_one_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = write_tokens(tmp_path / "d", numbered(100))
    datasets = build(DataConfig(data_path=(prefix,), split="80,10,10"), tokenizer, (40, 10, 10))
    seen = [{int(token) for i in range(len(d)) for token in d[i].tokens if token != EOD} for d in datasets]
    assert all(token < 80 for token in seen[0])
    assert all(80 <= token < 90 for token in seen[1])
    assert all(90 <= token < 100 for token in seen[2])


def test_data_for_each_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    a, b = (write_tokens(tmp_path / name, numbered(20, first)) for name, first in (("a", 0), ("b", 100)))
    train, valid, test = build(DataConfig(train_data_path=(a,), valid_data_path=(b,)), tokenizer, (30, 5, 5))
    assert all(int(train[i].tokens.min()) < 20 for i in range(30))
    assert all(int(valid[i].tokens.min()) >= 100 for i in range(5))
    assert test is None


@pytest.mark.parametrize(("shares", "share_of_b"), [((0.75, 0.25), 0.25), ((3, 1), 0.25), ((), 1 / 3)])
def test_blend_weights_are_honoured(
    tmp_path: Path, tokenizer: Tokenizer, shares: tuple[float, ...], share_of_b: float
) -> None:
    prefixes = [write_tokens(tmp_path / "a", numbered(20)), write_tokens(tmp_path / "b", numbered(10, 100))]
    data_path = [str(x) for pair in zip(shares, prefixes, strict=True) for x in pair] if shares else prefixes
    data = DataConfig(data_path=tuple(data_path), split="1,0,0", data_cache_path=str(tmp_path / "cache"))
    train, _, _ = build(data, tokenizer, (1200, 0, 0))  # several epochs of both
    from_b = sum(int(train[i].tokens.min()) >= 100 for i in range(1200))
    assert from_b / 1200 == pytest.approx(share_of_b, abs=0.005)


def test_small_validation_over_many_unequal_members(tmp_path: Path, tokenizer: Tokenizer) -> None:
    # Core alone stops with "the blend oversamples the contributing datasets".
    weights = [0.9, *[0.1 / 39] * 39]
    prefixes = [write_tokens(tmp_path / f"d{i}", numbered(2, i, length=9)) for i in range(40)]
    data_path = tuple(str(x) for pair in zip(weights, prefixes, strict=True) for x in pair)
    train, _, _ = build(DataConfig(data_path=data_path, split="1,0,0"), tokenizer, (10, 0, 0))
    assert len(train) >= 10


def test_new_data_under_an_old_name_are_not_read_through_the_old_index(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = DataConfig(
        data_path=(write_tokens(tmp_path / "d", numbered(50)),), split="1,0,0", data_cache_path=str(tmp_path / "cache")
    )
    build(data, tokenizer)
    files = sorted((tmp_path / "cache").iterdir())
    assert files
    build(data, tokenizer)
    assert sorted((tmp_path / "cache").iterdir()) == files  # found again
    write_tokens(tmp_path / "d", [[150] * 9] * 20)
    train, _, _ = build(data, tokenizer)
    assert all(int(train[i].tokens.min()) == 150 for i in range(10))


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def truncate(path: Path, num_bytes: int = 0) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def garbage(path: Path) -> None:
    path.write_bytes(b"\0" * 3000)


def negative_numbers(path: Path) -> None:
    np.save(path, np.load(path).astype(np.int64) - 1000)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(path.with_name("executed"))))


def pickled_array(path: Path) -> None:
    np.save(path, np.array([Payload(path.with_name("executed"))], dtype=object), allow_pickle=True)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """Core keeps lists of blends for process groups alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("damage", [cut, garbage, negative_numbers, pickled, pickled_array, Path.unlink, truncate])
@pytest.mark.parametrize(
    "name", ["document_index", "sample_index", "shuffle_index", "dataset_index", "dataset_sample_index"]
)
def test_damaged_lists_of_samples_are_made_again(
    tmp_path: Path, tokenizer: Tokenizer, name: str, damage: Callable[[Path], object], one_rank: None
) -> None:
    prefixes = tuple(write_tokens(tmp_path / name, numbered(20, first)) for name, first in (("a", 0), ("b", 100)))
    data = DataConfig(data_path=prefixes, split="1,0,0", data_cache_path=str(tmp_path / "cache"))
    train, _, _ = build(data, tokenizer, (100, 0, 0))
    samples = [train[i].tokens.tolist() for i in range(100)]
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(names) == 11  # descriptions too, nothing else
    damaged = next((tmp_path / "cache").glob(f"*-{name}.npy"))
    whole = damaged.read_bytes()
    damage(damaged)
    with pytest.warns(UserWarning, match="made again"):
        train, _, _ = build(data, tokenizer, (100, 0, 0))
    assert [train[i].tokens.tolist() for i in range(100)] == samples
    assert damaged.read_bytes() == whole
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == names


def test_a_killed_run_leaves_no_list_that_is_not_whole(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(
        data_path=(write_tokens(tmp_path / "d", numbered(50)),), split="1,0,0", data_cache_path=str(tmp_path / "cache")
    )
    save, paths = np.save, []

    def save_and_fail(path: str, *args: object, **kwargs: object) -> None:
        paths.append(Path(path))
        if len(paths) == 3:
            raise OSError(28, "No space left on device")
        save(path, *args, **kwargs)

    monkeypatch.setattr(np, "save", save_and_fail)
    message = r"lists of samples cannot be written in .*cache \(No space left on device\): give --data-cache-path"
    with pytest.raises(ValueError, match=message):
        build(data, tokenizer)
    assert len(paths) == 3 and all(path.parent.parent == tmp_path / "cache" for path in paths)
    assert not list((tmp_path / "cache").iterdir())
    left_behind = tmp_path / "cache" / f".{paths[0].name.removesuffix('-document_index.npy')}.killed"
    left_behind.mkdir()
    os.utime(left_behind, (0, 0))
    monkeypatch.undo()
    build(data, tokenizer)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").touch()
    prefix = write_tokens(tmp_path / "d", numbered(50))
    data = DataConfig(data_path=(prefix,), split="1,0,0", data_cache_path=str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"cannot be written in .*file/cache \(Not a directory\): give"):
        build(data, tokenizer)


def test_mock_data_need_no_files() -> None:
    data = DataConfig(mock_data=True, vocab_size=50)
    train, valid, test = build(data, build_tokenizer(data.tokenizer), (20, 4, 0), vocab_size=64, seq_length=2048)
    assert len(train) >= 20
    assert test is None
    assert int(max(valid[i].tokens.max() for i in range(4))) <= 50


def _build_on_rank(rank: int, data: DataConfig, folder: str, queue: multiprocessing.Queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="ByteLevelTokenizer"))
    train, valid, _ = build(data, tokenizer, (30, 4, 0))
    queue.put((rank, [train[i].tokens.tolist() for i in range(30)], [valid[i].tokens.tolist() for i in range(4)]))
    torch.distributed.destroy_process_group()


def test_two_ranks_build_the_same_datasets(tmp_path: Path) -> None:
    prefixes = [write_tokens(tmp_path / name, numbered(20, first)) for name, first in (("a", 0), ("b", 100))]
    data = DataConfig(
        data_path=("0.5", prefixes[0], "0.5", prefixes[1]), split="1,1,0", data_cache_path=str(tmp_path / "cache")
    )
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_build_on_rank, args=(r, data, str(tmp_path), queue)) for r in range(2)]
    for process in processes:
        process.start()
    first, second = sorted(queue.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(timeout=20)
        assert process.exitcode == 0
    assert first[1:] == second[1:]


# Bad data


def change_index(prefix: Path, position: int, form: str, value: int) -> None:
    """Write a number into PREFIX.idx; position: bytes after the header."""
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    struct.pack_into(form, content, 34 + position, value)
    Path(f"{prefix}.idx").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: Path(f"{p}.bin").unlink(), r"d\.bin does not exist"),
        (lambda p: Path(f"{p}.idx").unlink(), r"d\.idx does not exist"),
        (lambda p: truncate(Path(f"{p}.bin"), 0), r"d\.bin is empty: .*d\.idx expects 400 bytes, it has 0"),
        (lambda p: truncate(Path(f"{p}.bin"), 399), r"d\.bin is truncated: .*expects 400 bytes, it has 399"),
        (lambda p: Path(f"{p}.bin").write_bytes(b"x" * 401), r"d\.bin is too long: .*expects 400 bytes, it has 401"),
        (lambda p: truncate(Path(f"{p}.idx"), 0), r"d\.idx is empty: expected at least 34 bytes, it has 0"),
        (lambda p: truncate(Path(f"{p}.idx"), 33), r"d\.idx is truncated: expected at least 34 bytes, it has 33"),
        (lambda p: truncate(Path(f"{p}.idx"), 200), r"d\.idx is truncated: expected 242 bytes .*it has 200"),
        (lambda p: Path(f"{p}.idx").write_bytes(b"TNTIDX\0\0" + b"\0" * 99), r"d\.idx is not an index"),
        (lambda p: change_index(p, 4 * 3, "<i", -20), r"d\.idx is damaged: sequence 3 has a length of -20 tokens"),
        (lambda p: change_index(p, 4 * 3, "<i", 19), r"d\.idx is damaged: sequence 4 begins at byte 160, .* byte 158"),
        (lambda p: change_index(p, 4 * 9, "<i", 19), r"d\.bin is too long: .*expects 398 bytes, it has 400"),
        (lambda p: change_index(p, 40 + 8 * 5, "<q", 202), r"d\.idx is damaged: sequence 5 begins at byte 202"),
        (lambda p: change_index(p, 40, "<q", -2), r"d\.idx is damaged: sequence 0 begins at byte -2"),
        (lambda p: change_index(p, 120 + 8 * 4, "<q", 9), r"d\.idx is damaged: the documents do not divide"),
        (lambda p: change_index(p, 120 + 8 * 10, "<q", 11), r"d\.idx is damaged: the documents .*from 0 to 11"),
        (lambda p: change_index(p, -17, "<B", 6), r"d\.idx is not an index .*type 6"),
        (lambda p: write_tokens(p, []), r"d\.idx holds no sequences"),
        (lambda p: write_tokens(p, [[], []]), r"d\.bin holds no tokens"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, tokenizer: Tokenizer, damage: Callable[[Path], object], message: str
) -> None:
    prefix = tmp_path / "d"
    write_tokens(prefix, numbered(10))
    assert check_token_file(str(prefix)).num_tokens == 200
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        build(DataConfig(data_path=(str(prefix),), split="1,0,0"), tokenizer)


def test_idx_header_is_what_core_writes(tmp_path: Path) -> None:
    write_tokens(tmp_path / "d", numbered(10))
    magic, version, code, sequences, documents = struct.unpack_from("<9sQBQQ", (tmp_path / "d.idx").read_bytes())
    assert (magic, version, code, sequences, documents) == (b"MMIDIDX\0\0", 1, 8, 10, 11)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of"),
        ({"data_path": ("d",), "train_data_path": ("d",)}, "exactly one of"),
        ({"data_path": ("d",), "mock_data": True}, "exactly one of"),
        ({"valid_data_path": ("d",)}, "need --train-data-path"),
        ({"data_path": ("d.bin",)}, "without .bin or .idx"),
        ({"data_path": ("d",), "split": "0,1,0"}, "leaves nothing for training"),
        ({"data_path": ("d",), "split": "1,x"}, "up to three shares"),
        ({"data_path": ("d",), "split": "1,1,1,1"}, "up to three shares"),
        ({"data_path": ("d",), "split": "1,-1,1"}, "up to three shares"),
        ({"data_path": ("d",), "split": "99,1,0"}, "no tokens for valid: d has 10 documents, of which it gets 0"),
        ({"data_path": ("1e308", "d", "1e308", "e")}, "blend weights .* too large or too far apart"),
        ({"data_path": ("1e-300", "d", "1e300", "e")}, "blend weights .* too large or too far apart"),
    ],
)
def test_bad_settings_are_clear_errors(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, settings: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tokens(Path("d"), numbered(10))
    with pytest.raises(ValueError, match=message):
        build(DataConfig(**settings), tokenizer, (10, 2, 0))


def test_data_that_hold_no_sample_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix, short = write_tokens(tmp_path / "d", numbered(10)), write_tokens(tmp_path / "short", numbered(1))
    data = DataConfig(data_path=(prefix,), split="80,20,0")
    build(data, tokenizer, (10, 1, 0), seq_length=39)
    with pytest.raises(ValueError, match=r"40 tokens for valid: .*gets 2, and a sample takes 41 \(--seq-length 40\)"):
        build(data, tokenizer, (10, 1, 0), seq_length=40)
    with pytest.raises(ValueError, match=r"20 tokens for train: .*short has 1 documents"):
        build(DataConfig(data_path=(prefix, short), split="1,0,0"), tokenizer, (10, 0, 0), seq_length=20)
    with pytest.raises(ValueError, match=r"20 tokens for valid: .*short has 1 documents"):
        per_split = DataConfig(train_data_path=(prefix,), valid_data_path=(short,))
        build(per_split, tokenizer, (10, 1, 0), seq_length=20)


def test_validation_beyond_its_data(tmp_path: Path, tokenizer: Tokenizer, recwarn: pytest.WarningsRecorder) -> None:
    data = DataConfig(data_path=(write_tokens(tmp_path / "d", numbered(10)),), split="80,20,0")
    build(data, tokenizer, (10, 4, 0))
    assert not recwarn.list
    message = r"takes 5 samples \(--eval-iters .* its data hold 4 of --seq-length 8: it uses"
    with pytest.warns(UserWarning, match=message):
        build(data, tokenizer, (10, 5, 0))
    with pytest.raises(ValueError, match=r"takes 401 samples .* hold 4 of --seq-length 8: give fewer --eval-iters"):
        build(data, tokenizer, (10, 401, 0))


def test_tiny_corpus_goes_without_a_test_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = write_tokens(tmp_path / "d", numbered(50))
    with pytest.warns(UserWarning, match="no documents for the test"):
        train, valid, test = build(DataConfig(data_path=(prefix,)), tokenizer, (10, 2, 2))
    assert train is not None
    assert valid is not None
    assert test is None
    with pytest.warns(UserWarning, match="or fewer tokens than one sample has"):
        _, _, test = build(DataConfig(data_path=(prefix,), split="90,8,2"), tokenizer, (10, 2, 2), seq_length=20)
    assert test is None


def test_ids_of_another_tokenizer_are_errors_that_name_the_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = write_tokens(tmp_path / "d", [*numbered(3), [1] * 10 + [260] + [1] * 10])
    data = DataConfig(data_path=(prefix,), split="1,0,0")
    for rows in (300, 257):  # rows of the embedding beyond the tokenizer's ids are there to pad it
        with pytest.raises(ValueError, match=r"document 3 of .*d \(.*has the token id 260, .*are 0 to 256: "):
            build(data, tokenizer, (2, 0, 0), vocab_size=rows)
    with pytest.raises(ValueError, match="257 ids but the model's embedding has 256 rows"):
        build(data, tokenizer, vocab_size=256)
    build(data, build_tokenizer(DataConfig(tokenizer_type="NullTokenizer", vocab_size=260)), (2, 0, 0), vocab_size=300)


@pytest.mark.parametrize("is_blended", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_ids_that_only_a_batch_shows_name_the_sample_and_its_document(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, is_blended: bool, num_workers: int
) -> None:
    monkeypatch.setattr(token_files, "NUM_LOOKED_AT", 2)
    monkeypatch.setattr(token_files, "TOKENS_LOOKED_AT", 20)  # the first document and the last
    prefixes = [write_tokens(tmp_path / "d", [*numbered(2), [300] * 20, *numbered(2)])]
    if is_blended:
        prefixes.append(write_tokens(tmp_path / "e", numbered(5)))
    data = DataConfig(data_path=tuple(prefixes), split="1,0,0")
    train, _, _ = build(data, tokenizer, (20, 0, 0), vocab_size=400)
    batches = build_iterator(train, micro_batch_size=1, dp_rank=0, dp_size=1, num_workers=num_workers)
    message = r"^sample \d+, from the documents .*2.* of .*/d, .*has the token id 300"
    with pytest.raises(ValueError, match=message) as raised:
        list(batches)
    assert "Traceback" not in str(raised.value)


def test_large_files_are_looked_at_in_many_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "TOKENS_LOOKED_AT", 8)
    documents = [[1] * 50 for _ in range(100)]
    write_tokens(tmp_path / "d", documents)
    check_token_file(str(tmp_path / "d")).check_ids(2)
    for document in (0, 99):
        write_tokens(tmp_path / "d", [[2] * 50 if i == document else tokens for i, tokens in enumerate(documents)])
        with pytest.raises(ValueError, match=f"document {document} of .*has the token id 2"):
            check_token_file(str(tmp_path / "d")).check_ids(2)


# Iterators


@pytest.fixture(scope="module")
def train_set(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> TokenDataset:
    rng = np.random.default_rng(0)
    prefix = write_tokens(tmp_path_factory.mktemp("data") / "d", [rng.integers(0, 256, 500).tolist()])
    train, _, _ = build(DataConfig(data_path=(prefix,), split="1,0,0"), tokenizer, (50, 0, 0))
    return train


def rows(dataset: TokenDataset, count: int, **options: int) -> list[list[int]]:
    """The first `count` microbatches as one list of samples."""
    batches = itertools.islice(build_iterator(dataset, **{"dp_rank": 0, "dp_size": 1, **options}), count)
    return [row.tolist() for batch in batches for row in batch.tokens]


def test_batches_are_the_samples_in_order(train_set: TokenDataset) -> None:
    assert rows(train_set, 5, micro_batch_size=3) == [train_set[i].tokens.tolist() for i in range(15)]
    batch = next(build_iterator(train_set, micro_batch_size=3, dp_rank=0, dp_size=1, device="cpu"))
    assert [tuple(field.shape) for field in batch[:4]] == [(3, SEQ_LENGTH)] * 4
    assert batch.loss_mask.dtype == torch.float32
    assert batch.attention_mask is None


def test_resuming_equals_skipping(train_set: TokenDataset) -> None:
    whole = rows(train_set, 10, micro_batch_size=4)
    assert rows(train_set, 7, micro_batch_size=4, consumed_samples=12) == whole[12:]
    # Also with another layout, at any sample.
    assert rows(train_set, 3, micro_batch_size=5, consumed_samples=12) == whole[12:27]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_global_batch_holds_the_same_samples_in_every_layout(train_set: TokenDataset, micro_batch_size: int) -> None:
    global_batch_size, iteration = 8, 3
    start = iteration * global_batch_size
    expected = sorted(rows(train_set, 1, micro_batch_size=8, consumed_samples=start))
    options = {"micro_batch_size": micro_batch_size, "consumed_samples": start}
    for dp_size in (1, 2):
        count = global_batch_size // (micro_batch_size * dp_size)
        drawn = [rows(train_set, count, dp_rank=r, dp_size=dp_size, **options) for r in range(dp_size)]
        assert sorted(itertools.chain(*drawn)) == expected
    # Megatron's order: replica 1 begins one microbatch after replica 0.
    assert rows(train_set, 1, dp_rank=1, dp_size=2, **options) == [
        train_set[start + micro_batch_size + i].tokens.tolist() for i in range(micro_batch_size)
    ]


def test_loading_in_processes_gives_the_same_batches(train_set: TokenDataset) -> None:
    assert rows(train_set, 6, micro_batch_size=2, num_workers=2) == rows(train_set, 6, micro_batch_size=2)


def test_training_ends_with_a_clear_error_when_the_data_do(train_set: TokenDataset) -> None:
    count = len(train_set) // 6
    iterator = build_iterator(train_set, micro_batch_size=3, dp_rank=1, dp_size=2)
    for _ in range(count):
        next(iterator)
    with pytest.raises(DataExhaustedError, match=f"all {len(train_set)} samples"):
        next(iterator)
    with pytest.raises(DataExhaustedError):
        next(build_iterator(train_set, consumed_samples=10**6, micro_batch_size=1, dp_rank=0, dp_size=1))


def test_cyclic_iterator_starts_again(train_set: TokenDataset) -> None:
    count = len(train_set) // 7
    once = rows(train_set, count, micro_batch_size=7)
    assert rows(train_set, 2 * count + 1, micro_batch_size=7, is_cyclic=True) == once + once + once[:7]
    consumed = {"consumed_samples": len(once) * 3 + 14, "is_cyclic": True}
    assert rows(train_set, 1, micro_batch_size=7, **consumed) == once[14:21]


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_size": 0, "dp_rank": 0, "dp_size": 1},
        {"micro_batch_size": 1, "dp_rank": 2, "dp_size": 2},
        {"micro_batch_size": 1, "dp_rank": 0, "dp_size": 1, "consumed_samples": -1},
        {"micro_batch_size": 1000, "dp_rank": 0, "dp_size": 2},
    ],
)
def test_impossible_iterators_are_refused(train_set: TokenDataset, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="micro_batch_size"):
        build_iterator(train_set, **options)


def test_a_program_ends_while_processes_load_data() -> None:
    """They ignore the signal by which Python ends them."""
    program = """
import torch
from megatron.early_exit.data.batches import Batch, build_iterator
class Samples(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return Batch(*[torch.zeros(2)] * 4, None)
batches = build_iterator(Samples(), micro_batch_size=2, dp_rank=0, dp_size=1, num_workers=1)
next(batches)
print("end", flush=True)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=90)
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")
