"""A transformer layer that owns an early exit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron.early_exit.model.cross_entropy import LossSums, Teacher
from megatron.early_exit.model.exit_head import ExitHead, ExitHeadSpec
from megatron.early_exit.model.exit_losses import ExitLosses, is_checkpointed_forward

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

    def tune_exit(self, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor, **arguments: Any) -> None:
        """Tune the exit on its input, which was captured in a forward pass. hidden_states: [s, b, h], or this TP rank's
        part; labels, loss_mask: [b, s]; arguments: what an exit block needs beside them."""
        # As in a forward pass, where core forks so that each TP rank draws other dropout for its part of the sequence.
        fork = tensor_parallel.get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext()
        with fork:
            self._attach_exit(hidden_states, {"context": labels, "context_mask": loss_mask, **arguments})

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
        if labels is None or is_checkpointed_forward():
            return hidden_states
        if self.exit_losses.capture is not None:
            self.exit_losses.capture(self.exit_input, hidden_states)
            return hidden_states
        head_arguments: dict[str, Any] = {}
        if self.exit_head.mlp is not None:
            head_arguments["pre_mlp_norm"] = self.pre_mlp_layernorm
        if self.exit_head.block is not None:
            head_arguments |= {name: kwargs.get(name) for name in _BLOCK_ARGUMENTS}
        exit_index = self.exit_head.spec.exit_index

        def compute(hidden_states: Tensor, gradient_scale: Tensor, teacher: Teacher | None = None) -> LossSums:
            # Validation is over all tokens.
            tokens = self.exit_losses.draw_tokens(exit_index, labels, loss_mask) if self.exit_head.training else None
            return self.exit_head.loss(
                hidden_states, labels, loss_mask, gradient_scale, tokens=tokens, teacher=teacher, **head_arguments
            )

        if self.exit_losses.is_tuning:
            self.exit_losses.tune(hidden_states, exit_index, loss_mask, compute, self.config.sequence_parallel)
            return hidden_states
        if not self.training:
            self.exit_losses.evaluate(hidden_states, exit_index, compute)
            return hidden_states
        hidden_states = self.exit_losses.defer(
            hidden_states, exit_index, loss_mask, compute, self.config.sequence_parallel
        )
        # The schedule frees the data of what a stage sends, which must not be a view of what the exit keeps.
        return make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)
