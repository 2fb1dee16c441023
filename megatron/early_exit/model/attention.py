"""Core attention over `torch.nn.functional.scaled_dot_product_attention`.

Flash kernels on GPUs, a fused kernel on CPUs, grouped queries without copies. Core's own `DotProductAttention` builds
the full [b, heads, s, s] score matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


class SdpaAttention(MegatronModule):
    """Causal attention for core's `SelfAttention`; has no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query: [sq, b, heads, d]; key, value: [sk, b, kv heads, d]; attention_mask: [b or 1, 1, sq, sk], True where
        attention is forbidden, or None for causal attention in which the last query sees the last key.

        Returns [sq, b, heads * d]."""
        if attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("SdpaAttention knows neither attention bias nor packed sequences.")
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        num_queries, num_keys = query.size(2), key.size(2)
        allowed = None
        if attention_mask is not None:
            allowed = ~attention_mask
        elif num_queries != num_keys and num_queries > 1:
            # Decoding several rows against a longer cache: align the causal triangle with the last key.
            allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            allowed = allowed.tril(num_keys - num_queries)
        dropout = self.dropout if self.training else 0.0
        attend = lambda: F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            dropout_p=dropout,
            is_causal=allowed is None and num_queries == num_keys,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        if dropout and not self.config.sequence_parallel:
            # Heads are split over TP ranks: each needs its own random stream. (Under sequence parallelism the whole
            # block runs inside this fork already.)
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = attend()
        else:
            context = attend()
        # [b, heads, sq, d] -> [sq, b, heads * d]
        return context.permute(2, 0, 1, 3).reshape(num_queries, query.size(0), -1)
