"""Files with weights in a folder of `transformers`: which are meant, and their tensors, read when asked for."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ORDER = (WEIGHTS, INDEX, _PICKLED, _PICKLED_INDEX)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LFS_POINTER = b"version https://git-lfs"
"""What stands in place of a large file that was cloned without Git LFS."""


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError with the file's name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def read_weight_files(folder: Path) -> tuple[Tensors, list[str]]:
    """(all tensors, notes on files that are not read) of the weights that `transformers` would load.

    Raises OSError for files that are missing or damaged, ValueError for what cannot be read safely."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), which transformers would apply; merge it into the model "
            "and save that (merge_and_unload of peft), or take the file away"
        )
    present = [name for name in _ORDER if (folder / name).is_file()]
    if not present:
        raise FileNotFoundError(f"{folder} holds no weights: none of {', '.join(_ORDER)}")
    chosen, others = present[0], present[1:]
    notes = [f"{folder / chosen} is read, as transformers does, and not {', '.join(others)}"] if others else []
    files = [folder / chosen] if chosen in (WEIGHTS, _PICKLED) else _shards(folder / chosen)
    tensors: Tensors = {}
    for file in files:
        _check_is_no_pointer(file)
        new = read_safetensors(file) if file.suffix == ".safetensors" else _read_pickled(file)
        twice = sorted(set(tensors) & set(new))
        if twice:
            raise ValueError(f"{twice[0]} lies in several of the files that {folder / chosen} names")
        tensors |= new
    if chosen in (INDEX, _PICKLED_INDEX):
        _check_index(folder / chosen, tensors)
    return tensors, notes


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} is damaged: its weight_map names files by other things than text")
    names = sorted(set(weight_map.values()))
    folder = index.parent
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ValueError(f"{index} names files outside of its folder: {outside[0]}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}")
    return [folder / name for name in names]


def _check_is_no_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{file} only points to the weights: run `git lfs pull` in its folder to get them")


def _check_index(index: Path, tensors: Iterable[str]) -> None:
    absent = sorted(set(read_json(index)["weight_map"]) - set(tensors))
    if absent:
        raise ValueError(f"{index} names {absent[0]}, which its files do not hold: they are of different versions")


def read_safetensors(file: Path) -> Tensors:
    """All tensors of one file. Raises OSError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    tensors: Tensors = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                part = opened.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ValueError(f"{file}: {name} has the type {part.get_dtype()}, which is not supported")
                read = lambda name=name: _read_tensor(file, name)
                tensors[name] = LazyTensor(tuple(part.get_shape()), dtype, read)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{file} cannot be read, it may be damaged or not fully copied: {error}") from error
    return tensors


def _read_tensor(file: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


def _read_pickled(file: Path) -> Tensors:
    """Memory-mapped, and by PyTorch's restricted unpickler, which runs no code of the file."""
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than weights, and is not read: {str(error).splitlines()[0]}") from error
    except (OSError, RuntimeError, EOFError) as error:
        words = str(error) or "it is empty"
        raise OSError(f"{file} cannot be read, it may be damaged or not fully copied: {words}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds no weights by their names")
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if len(tensors) < len(state):
        others = sorted(str(name) for name in set(state) - set(tensors))
        raise ValueError(f"{file} holds more than weights by their names: {', '.join(others[:3])}")
    return {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
