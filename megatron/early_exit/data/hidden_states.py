"""Hidden states of frozen layers, kept in files: computed once, they serve several passes and several kinds of exits.

    FOLDER/cache.json                       what they are of: data, layers, sizes
    FOLDER/layer_10_output.bin              [samples, s, h]: what layer 10 returns
    FOLDER/layer_10_attention.bin           the residual after its attention, which MLP branches read
    FOLDER/final.bin                        what the final output projection reads
    FOLDER/layer_10_output.done             a byte for each sample: 1 when it is there

Ranks write their samples at their place in the files, with plain writes that work on shared file systems.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron.early_exit.data.batches import Batch

_DESCRIPTION = "cache.json"


@dataclass(frozen=True)
class CacheContent:
    """What kept hidden states are of; they serve only what agrees with it."""

    seq_length: int
    hidden_size: int
    dtype: str
    layers: Mapping[str, float]
    """A sum over the weights of each frozen layer, by its number; "0" is the embedding, "final" the final norm."""
    samples: Mapping[str, str]
    """Digests of some samples, by their number."""

    def differences(self, other: CacheContent) -> list[str]:
        """What `other`, the content of the files, does not share with this one."""
        found = [
            f"{name.replace('_', ' ')} {getattr(other, name)}, not {getattr(self, name)}"
            for name in ("seq_length", "hidden_size", "dtype")
            if getattr(self, name) != getattr(other, name)
        ]
        common = self.layers.keys() & other.layers.keys()
        # Summed in another order by another layout, so not the same to the last bit.
        layers = [key for key in common if not math.isclose(self.layers[key], other.layers[key], rel_tol=1e-9)]
        if layers:
            in_order = sorted(layers, key=lambda key: (not key.isdecimal(), int(key) if key.isdecimal() else 0))
            names = ", ".join({"0": "embedding", "final": "final norm"}.get(key, key) for key in in_order[:5])
            found.append(f"other weights (layers {names}{', ...' if len(layers) > 5 else ''})")
        if any(self.samples[key] != other.samples[key] for key in self.samples.keys() & other.samples.keys()):
            found.append("other data, or their order")
        return found


class HiddenStateCache:
    """Files of hidden states in one folder."""

    def __init__(self, folder: Path, content: CacheContent, num_samples: int) -> None:
        self.folder, self.content, self.num_samples = folder, content, num_samples
        self._dtype: torch.dtype = getattr(torch, content.dtype)
        self._row_bytes = content.hidden_size * self._dtype.itemsize

    def create(self, points: Sequence[str]) -> None:
        """Make room for `points` of all samples beside what is there; one rank calls it, before any other uses the
        files. Raises ValueError if the folder holds hidden states of something else, OSError if the disk is too
        small."""
        self.folder.mkdir(parents=True, exist_ok=True)
        description = self.folder / _DESCRIPTION
        content = self.content
        if description.is_file():
            there = _read_description(description)
            if differences := content.differences(there):
                raise ValueError(
                    f"--cache-hidden-states {self.folder} holds hidden states of something else: "
                    f"{'; '.join(differences)}. Give another folder, or remove this one."
                )
            content = CacheContent(**{
                **asdict(content), "layers": {**there.layers, **content.layers},
                "samples": {**there.samples, **content.samples},
            })  # fmt: skip
        missing = sum(self.num_samples - int(self.done(point).sum()) for point in points)
        needed, free = missing * self._sample_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"--cache-hidden-states {self.folder}: {missing:,} hidden states of {self.content.seq_length} tokens "
                f"take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free. Give fewer --cache-samples, or "
                "another folder."
            )
        for point in points:
            self._forget_what_is_cut(point)
            _make_room(self._path(point), self.num_samples * self._sample_bytes)
            _make_room(self._done_path(point), self.num_samples)
        partial = description.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(content), indent=1) + "\n")
        partial.rename(description)

    @property
    def is_there(self) -> bool:
        """Whether this rank sees the folder that was made."""
        return (self.folder / _DESCRIPTION).is_file()

    @property
    def _sample_bytes(self) -> int:
        return self.content.seq_length * self._row_bytes

    def _path(self, point: str) -> Path:
        return self.folder / f"{point}.bin"

    def _done_path(self, point: str) -> Path:
        return self.folder / f"{point}.done"

    def done(self, point: str) -> np.ndarray:
        """[num_samples] bool: which samples are there. Raises ValueError if the file that says so is damaged."""
        flags = np.zeros(self.num_samples, bool)
        marks = self._marks(point)[: self.num_samples]
        flags[: marks.size] = marks
        return flags

    def _marks(self, point: str) -> np.ndarray:
        """A number for each sample of the file: 1 if it is there. One that the file of values does not reach is not."""
        path, values = self._done_path(point), self._path(point)
        marks = np.fromfile(path, np.uint8) if path.is_file() else np.zeros(0, np.uint8)
        if marks.size and marks.max() > 1:
            raise _damaged(path, f"it holds the byte {marks.max()}")
        marks[(values.stat().st_size if values.is_file() else 0) // self._sample_bytes :] = 0
        return marks

    def _forget_what_is_cut(self, point: str) -> None:
        """Before the file of values is filled up with zeros, which are no hidden states."""
        if self._done_path(point).is_file():
            self._done_path(point).write_bytes(self._marks(point).tobytes())

    def num_leading(self, points: Sequence[str]) -> int:
        """Samples from 0 on that all of `points` have."""
        flags = np.logical_and.reduce([self.done(point) for point in points]) if points else np.ones(0, bool)
        return self.num_samples if flags.all() else int(flags.argmin())

    def write(self, point: str, first_sample: int, first_row: int, hidden_states: Tensor) -> None:
        """Keep hidden states of samples `first_sample`, ...; [b, rows, h], tokens from `first_row` on."""
        values = hidden_states.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy()
        with self._path(point).open("r+b", buffering=0) as file:
            for index, sample in enumerate(values):
                file.seek((first_sample + index) * self._sample_bytes + first_row * self._row_bytes)
                _write_all(file, sample.tobytes())

    def mark(self, point: str, samples: Sequence[int]) -> None:
        """Say that these samples are there, when all of their parts are written."""
        with self._done_path(point).open("r+b", buffering=0) as file:
            for sample in samples:
                file.seek(sample)
                _write_all(file, b"\1")

    def read(self, point: str, sample: int, rows: slice) -> Tensor:
        """[rows, h]"""
        first, last, _ = rows.indices(self.content.seq_length)
        with self._path(point).open("rb", buffering=0) as file:
            file.seek(sample * self._sample_bytes + first * self._row_bytes)
            data = bytearray((last - first) * self._row_bytes)
            _read_all(file, data)
        return torch.frombuffer(data, dtype=self._dtype).view(last - first, self.content.hidden_size)


def _read_description(path: Path) -> CacheContent:
    try:
        return CacheContent(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} is damaged ({problem}): remove the folder {path.parent}, and it is made again")


def _make_room(path: Path, size: int) -> None:
    """Zeros up to `size`, which take no disk where the file system has sparse files."""
    if not path.is_file() or path.stat().st_size < size:
        path.touch()
        os.truncate(path, size)


def _read_all(file: io.FileIO, data: bytearray) -> None:
    view = memoryview(data)
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError(f"{file.name} ends early; remove its folder, and it is made again")
        view = view[count:]


def _write_all(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


class CachedSamples(Dataset):
    """The cached samples with their hidden states, again and again, each time in another order.

    The first pass is in the order of the data, as without a cache."""

    def __init__(
        self,
        dataset: Dataset,
        cache: HiddenStateCache,
        *,
        points: Sequence[str],
        rows: slice,
        num_samples: int,
        seed: int,
    ) -> None:
        """rows: this rank's tokens of a sequence, for sequence parallelism. num_samples: to be drawn in all."""
        self.dataset, self.cache, self.points, self.rows = dataset, cache, points, rows
        self.num_samples, self.seed = num_samples, seed
        self._order = functools.lru_cache(maxsize=2)(self._order_of_pass)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Batch:
        number, position = divmod(index, self.cache.num_samples)
        sample = self._order(number)[position]
        hidden_states = {point: self.cache.read(point, sample, self.rows) for point in self.points}
        return self.dataset[sample]._replace(hidden_states=hidden_states)

    def _order_of_pass(self, number: int) -> Sequence[int]:
        if number == 0:
            return range(self.cache.num_samples)
        generator = torch.Generator().manual_seed(self.seed + number)
        return torch.randperm(self.cache.num_samples, generator=generator).tolist()

    def __getstate__(self) -> dict:
        """For workers that load data, which make their orders themselves."""
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._order = functools.lru_cache(maxsize=2)(self._order_of_pass)
