"""The probe of one exit as the decoder runs it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.early_exit.inference.exit_probes import RMS_EPSILON, ProbeNetwork


class ExitProbe:
    """A `ProbeNetwork` on a device; whole on every tensor-parallel rank.

    In fp32 whatever the model's type: it is small, and its output decides."""

    def __init__(self, network: ProbeNetwork, device: torch.device) -> None:
        tensor = lambda values: torch.tensor(values, dtype=torch.float32, device=device)
        # fc1 (x / (|x| / sqrt(h) + epsilon)) = (sqrt(h) fc1 x) / (|x| + sqrt(h) epsilon)
        scale = math.sqrt(network.fc1.shape[1])
        self._fc1, self._bias, self._epsilon = (
            tensor(network.fc1) * scale,
            tensor(network.fc1_bias),
            RMS_EPSILON * scale,
        )
        self._fc2, self._fc2_bias = tensor(network.fc2), tensor(network.fc2_bias)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[rows] fp64 from 0 to 1. hidden: [rows, h], what the exit's head reads.

        fp64 since the sigmoid of fp32 rounds to 1 early, and thresholds could not tell sure rows apart."""
        hidden = hidden.float()
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).add_(self._epsilon)
        wide = F.linear(hidden, self._fc1).div_(norm).add_(self._bias).relu_()
        return F.linear(wide, self._fc2, self._fc2_bias).squeeze(-1).double().sigmoid_()
