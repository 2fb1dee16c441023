"""A transformer layer that owns an early exit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron.early_exit.model.exit_head import ExitHead, ExitHeadSpec
from megatron.early_exit.model.exit_losses import ExitLosses, ReachedExit

# Arguments of a layer that an exit block needs as well.
_BLOCK_ARGUMENTS = ("attention_mask", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin")


class EarlyExitTransformerLayer(TransformerLayer):
    """Core's layer plus an exit on its output, its input (pre-exit), or the residual after attention (MLP branch).

    Labels arrive as `context` and the loss mask as `context_mask`: core hands both to every layer and through
    activation checkpoints, and layers without cross-attention pass them on.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        *,
        exit_head: ExitHeadSpec,
        exit_losses: ExitLosses,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, hidden_dropout, pg_collection, vp_stage, **kwargs)
        self.exit_losses = exit_losses
        self.exit_head = ExitHead(config, exit_head, layer_number, self.pg_collection, vp_stage)

    @property
    def exit_input(self) -> str:
        """Name of the hidden states that the exit reads; exits of several kinds may read the same ones."""
        spec = self.exit_head.spec
        if spec.mlp is not None:
            return f"layer_{self.layer_number}_attention"
        return f"layer_{self.layer_number - spec.pre_exit}_output"

    def reached_exit(self, labels: Tensor, loss_mask: Tensor, arguments: Mapping[str, Any]) -> ReachedExit:
        """The exit with one microbatch. labels, loss_mask: [b, s]; arguments: those of the layer, of which an exit
        block needs some."""
        head_arguments: dict[str, Any] = {}
        if self.exit_head.mlp is not None:
            head_arguments["pre_mlp_norm"] = self.pre_mlp_layernorm
        if self.exit_head.block is not None:
            head_arguments |= {name: arguments.get(name) for name in _BLOCK_ARGUMENTS}
        return ReachedExit(self.exit_head, self.exit_input, labels, loss_mask, head_arguments)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [s, b, h]; kwargs as core's. Returns (hidden states, context)."""
        spec = self.exit_head.spec
        if spec.pre_exit:
            hidden_states = self._attach_exit(hidden_states, kwargs)
        hidden_states, context = super().forward(hidden_states, *args, **kwargs)
        if not spec.pre_exit and spec.mlp is None:
            hidden_states = self._attach_exit(hidden_states, kwargs)
        return hidden_states, context

    def _forward_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        hidden_states, context = super()._forward_attention(*args, **kwargs)
        if self.exit_head.spec.mlp is not None:
            hidden_states = self._attach_exit(hidden_states, kwargs)
        return hidden_states, context

    def _attach_exit(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        labels, loss_mask = kwargs.get("context"), kwargs.get("context_mask")
        if labels is None or _runs_again():
            return hidden_states
        assert loss_mask is not None, "labels come with a loss mask"
        reached = self.reached_exit(labels, loss_mask, kwargs)
        return self.exit_losses.strategy.at_exit(hidden_states, reached)


def _runs_again() -> bool:
    """Whether core is in the first, gradient-free pass of a checkpointed layer."""
    return is_checkpointing() and not torch.is_grad_enabled()
