"""Live and peak bytes of the tensors that a piece of code creates, on any device, exactly and without its allocator.

Sees what PyTorch's operators return, in forward and backward. It does not see scratch space inside one operator (a
matrix product's packing buffers), nor what code in another thread creates.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class TensorMemoryTracker(TorchDispatchMode):
    """Context manager that counts the storages created inside it, each once however many tensors view it.

    A storage is counted with its bytes from the operator that first returns it until it is freed (also after the end
    of the context). Storages of tensors that existed before are not counted. Backward passes must run in the calling
    thread, as they do on CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, int] = {}  # address of the storage object -> bytes
        self._existing: set[int] = set()  # storages that were there before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # `torch.tensor(...)` creates its storage out of sight and shows it here for the first time.
        if func is not torch.ops.aten.lift_fresh.default:
            for tensor in _tensors((args, kwargs)):
                self._note_existing(tensor.untyped_storage())
        result = func(*args, **kwargs)
        # In-place operators and `out=` may have resized the storage of an argument.
        for tensor in _tensors((result, args, kwargs)):
            self._count(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def _note_existing(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live and key not in self._existing:
            self._existing.add(key)
            weakref.finalize(storage, self._existing.discard, key).atexit = False

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._existing:
            return
        if key not in self._live:
            self._live[key] = 0
            weakref.finalize(storage, self._free, key).atexit = False
        self.live_bytes += storage.nbytes() - self._live[key]
        self._live[key] = storage.nbytes()

    def _free(self, key: int) -> None:
        self.live_bytes -= self._live.pop(key)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]
