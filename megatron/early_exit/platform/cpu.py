"""Makes megatron-core run where no CUDA is present.

Core calls `torch.cuda` functions, creates tensors with `device="cuda"` and compares tensor type names, whatever the
backend. Here each of these gets its CPU meaning. On a machine with CUDA nothing is touched.

Can go when core creates its tensors on the device of its parameters.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from typing import Any

import torch

# Modules of core that call a tensor factory with device="cuda".
_MODULES_WITH_CUDA_FACTORIES = (
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")

_adapted = False


def adapt_core_to_cpu() -> None:
    """Give core's CUDA calls their CPU meaning in this process. Call once, before building anything; again is a no-op.

    Raises RuntimeError on a machine with a visible GPU: there core must stay as it is.
    """
    global _adapted
    if _adapted:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "adapt_core_to_cpu() was called on a machine with a visible GPU; hide it with CUDA_VISIBLE_DEVICES= "
            "if the CPU is what you want."
        )
    _adapted = True
    # GPUs flush them in matrix products. On a CPU a softmax that is sure fills its gradients, and then Adam's moments,
    # with denormal numbers: seven times slower for the gradients of one head (docs/decisions.md).
    torch.set_flush_denormal(True)
    # Core's fused kernels are for GPUs; compiling them for the CPU costs minutes.
    importlib.import_module("megatron.core.jit").disable_jit_fuser()
    _replace_cuda_functions()
    _replace_cuda_factories()
    _replace_tensor_methods()
    _use_cpu_generator_for_cuda_states()


class _NullStream:
    """Stands for a CUDA stream; CPU work is always in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *args: Any) -> None: ...


def _replace(owner: object, **replacements: Any) -> None:
    """Set attributes of a module or a class of PyTorch or core."""
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)


def _replace_cuda_functions() -> None:
    _replace(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        Stream=_NullStream,
        current_stream=_NullStream,
        default_stream=_NullStream,
        stream=lambda stream: contextlib.nullcontext(),
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
    )


class _TorchOnCpu(types.ModuleType):
    """`torch` as seen by one module of core: factories put on the CPU what is asked for on "cuda"."""

    def __init__(self, **overrides: Any) -> None:
        super().__init__("torch")
        self.__dict__.update(overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Any) -> Any:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _replace_cuda_factories() -> None:
    torch_on_cpu = _TorchOnCpu(**{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
    for name in _MODULES_WITH_CUDA_FACTORIES:
        _replace(importlib.import_module(name), torch=torch_on_cpu)


def _replace_tensor_methods() -> None:
    stay_here = lambda self, *args, **kwargs: self
    original_type = torch.Tensor.type

    def type_for_caller(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Core's optimizers accept only 'torch.cuda.FloatTensor' and its like; everybody else gets the truth.
        name = original_type(self, *args, **kwargs)
        if isinstance(name, str) and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core.optim"):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    _replace(torch.Tensor, cuda=stay_here, type=type_for_caller)
    _replace(torch.nn.Module, cuda=stay_here)


def _use_cpu_generator_for_cuda_states() -> None:
    """Core keeps a CPU and a CUDA random state apart. Without CUDA there is one generator: it plays the CUDA one, and
    the CPU state that core checks and restores beside it is a constant."""
    from megatron.core.tensor_parallel import random

    constant = torch.zeros(1, dtype=torch.uint8)
    _replace(
        random,
        torch=_TorchOnCpu(get_rng_state=lambda: constant, set_rng_state=lambda state: None),
        _get_cuda_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        _set_cuda_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
    )
