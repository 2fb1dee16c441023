"""LayerNorm and RMSNorm of PyTorch, usable under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class TorchNorm:
    """Builds the norm that `config.normalization` names, for core's layer specs.

    Core's own torch norm refuses sequence parallelism. All that it takes is a mark on the weights: each tensor-parallel
    rank sees a part of the sequence, so core sums the gradients of marked weights over the TP group.
    """

    def __new__(  # type: ignore[misc]  # core builds what is a class in a spec; a function it would not call
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> torch.nn.Module:
        norm_class = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}.get(config.normalization)
        if norm_class is None:
            raise ValueError(f"normalization is {config.normalization!r}; choose LayerNorm or RMSNorm.")
        norm = norm_class(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
