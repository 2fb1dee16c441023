"""Frequencies of rotary positions, and how Llama 3.1 scales them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.config.model import ModelConfig

# What core's scaling has built in.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_factors(rope: Mapping[str, Any], head_size: int) -> torch.Tensor:
    """[head size / 2]: what each rotary frequency is divided by, as Llama 3.1 scales them."""
    frequencies = rope["rope_theta"] ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    factors: Tensor = 1.0 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()


def rotary_frequencies(model: ModelConfig) -> torch.Tensor:
    """[rotated channels of a head / 2], fp32: the angle (radians) between one position and the next."""
    size = int(model.head_size * model.rotary_percent)
    frequencies = 1.0 / model.rotary_base ** (torch.arange(0, size, 2).float() / size)
    if model.use_rope_scaling:
        rope = {**LLAMA3_ROPE, "rope_theta": model.rotary_base, "factor": model.rope_scaling_factor}
        frequencies = frequencies / llama3_factors(rope, size)
    return frequencies / (model.rotary_seq_len_interpolation_factor or 1.0)
