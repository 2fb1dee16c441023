"""Core's `GPTModel` with early exits and a chunked final head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.model.cross_entropy import LossSums, Teacher, cross_entropy_sums
from megatron.early_exit.model.exit_head import ExitHead
from megatron.early_exit.model.exit_losses import FINAL, ExitLosses
from megatron.early_exit.model.exit_strategies import Tuning
from megatron.early_exit.model.layer import EarlyExitTransformerLayer


class EarlyExitGPTModel(GPTModel):
    """One model chunk. With no exits it has the parameters and the function of core's `GPTModel`.

    Its layers carry the exits (`layer_specs.block_spec`); this class owns the copy of the model's output weight that
    exits need on a stage which would not hold one (tied ones, and those that follow the final head), and computes the
    final loss with the code of the exits.
    """

    def __init__(self, *, exits: ExitConfig, exit_losses: ExitLosses, has_final_head: bool, **kwargs: Any) -> None:
        """has_final_head: whether some chunk of the pipeline has the final head; tuning may do without."""
        super().__init__(**kwargs)
        self.exits = exits
        self.has_final_head = has_final_head
        self.exit_losses = exit_losses
        self.exit_output_layer: ColumnParallelLinear | None = None
        tied_heads = [head for head in self.exit_heads() if head.is_tied]
        distils = exit_losses.distils and bool(self.exit_heads())
        if (tied_heads or distils) and self._own_output_weight() is None:
            self.exit_output_layer = ColumnParallelLinear(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=torch.nn.init.zeros_,  # shared_weights.py copies the model's output weight into it
                bias=False,
                tp_group=self.pg_collection.tp,
            )
            self.exit_output_layer.weight.is_embedding_or_output_parameter = True
        for head in tied_heads:
            head.use_model_output_weight(lambda: self._output_weight_of_exits)

    def exit_heads(self) -> list[ExitHead]:
        """Heads of the exits that this chunk owns, in the order of layers."""
        return [layer.exit_head for layer in self._layers_with_exits()]

    def capture_points(self) -> list[str]:
        """Names of the hidden states that tuning needs and that are made on this chunk."""
        return [*self._exit_inputs(), *([FINAL] if self.post_process and self.exit_losses.distils else [])]

    def tuning_points(self) -> list[str]:
        """Names of the hidden states that exits of this chunk are tuned on: their inputs, and what they follow."""
        names = self._exit_inputs()
        return [*names, FINAL] if names and self.exit_losses.distils else names

    def _exit_inputs(self) -> list[str]:
        return [layer.exit_input for layer in self._layers_with_exits()]

    def teacher(self, final_hidden_states: Tensor) -> Teacher:
        """What exits that are distilled follow: the final head on `final_hidden_states` of their microbatch, [s, b, h]
        or this TP rank's part."""
        weight = self._output_weight_of_exits.detach()
        return Teacher(final_hidden_states.detach(), weight, self.exit_losses.distillation_share)

    def tune_exits(
        self, hidden_states: Mapping[str, Tensor], labels: Tensor, loss_mask: Tensor, attention_mask: Tensor | None
    ) -> None:
        """Tune this chunk's exits on hidden states that were captured in a forward pass over the same microbatch.

        hidden_states: [s, b, h] by the names in `tuning_points`; the rest as in `forward`."""
        is_rotary = self.position_embedding_type == "rope"
        rotary_pos_emb = self.rotary_pos_emb(labels.size(1)) if is_rotary else None
        arguments = {"attention_mask": attention_mask, "rotary_pos_emb": rotary_pos_emb}
        teacher = self.teacher(hidden_states[FINAL]) if FINAL in hidden_states else None
        tuning = Tuning(self.exit_losses)
        for layer in self._layers_with_exits():
            reached = layer.reached_exit(labels, loss_mask, arguments)
            _, pending = tuning.prepare(hidden_states[layer.exit_input], reached)
            pending.run(teacher)

    def _layers_with_exits(self) -> list[EarlyExitTransformerLayer]:
        return [layer for layer in self.decoder.layers if hasattr(layer, "exit_head")]

    def _own_output_weight(self) -> Tensor | None:
        """The model's output weight where plain GPT keeps it on this chunk, else None."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight if self.post_process else None

    @property
    def model_output_weight(self) -> Tensor | None:
        """This chunk's copy of the model's output weight, [vocabulary / tp, h], or None if it needs none."""
        if self.exit_output_layer is not None:
            return self.exit_output_layer.weight
        return self._own_output_weight()

    @property
    def _output_weight_of_exits(self) -> Tensor:
        """That copy, on a chunk whose exits use it."""
        weight = self.model_output_weight
        assert weight is not None, "a chunk with exits that use the output weight has a copy"
        return weight

    @property
    def owns_output_weight(self) -> bool:
        """Whether the copy on this chunk is the one that the others follow: the embedding, the output layer, or where
        no chunk has the final head the copy of the first exit that needs one."""
        if self.share_embeddings_and_output_weights:
            return self.pre_process
        if self.has_final_head:
            return self.post_process
        needing = [
            number for number, head in zip(self.exits.exit_layer_nums, self.exits.heads, strict=True)
            if self.exit_losses.distils or not head.untied_output
        ]  # fmt: skip
        return any(layer.layer_number == needing[0] for layer in self._layers_with_exits())

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """input_ids, position_ids, labels: [b, s]; loss_mask: [b, s]; attention_mask: [b, 1, s, s] or None.

        Returns hidden states [s, b, h], or on the last stage the sum of the masked final losses (a scalar) with labels,
        and logits [b, s, vocabulary] without. Where exit losses are computed, and what else the last stage may return,
        is the strategy's (`exit_strategies.py`)."""
        if labels is not None and self.exits.num_exits:
            # Core hands `context` and `context_mask` to every layer and through activation checkpoints.
            kwargs["extra_block_kwargs"] = {"context": labels, "context_mask": loss_mask}
        return super().forward(input_ids, position_ids, attention_mask, labels=labels, loss_mask=loss_mask, **kwargs)

    def _postprocess(self, **kwargs: Any) -> Tensor:
        labels, loss_mask = kwargs["labels"], kwargs["loss_mask"]
        if labels is None or not self.post_process:
            return super()._postprocess(**kwargs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        weight = self.output_layer.weight if weight is None else weight
        hidden_states = kwargs["hidden_states"]

        def loss() -> LossSums:
            return cross_entropy_sums(
                hidden_states,
                weight,
                labels,
                loss_mask,
                tp_group=self.tp_group,
                sequence_parallel=self.config.sequence_parallel,
                gradient_scale=self.exit_losses.gradient_scale(loss_mask),
            )

        return self.exit_losses.strategy.at_final_head(hidden_states, loss)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.exit_output_layer is not None:
            # A copy: it is saved and loaded under the key of the weight that it follows. Core wants each key to have an
            # owner (replica 0) among all ranks, when it loads too.
            key = "embedding.word_embeddings" if self.share_embeddings_and_output_weights else "output_layer"
            replica = 0 if self.owns_output_weight else 1
            state.pop(f"{prefix}exit_output_layer._extra_state", None)
            state[f"{prefix}exit_output_layer.weight"] = make_tp_sharded_tensor_for_checkpoint(
                tensor=self.exit_output_layer.weight,
                key=f"{prefix}{key}.weight",
                replica_id=(replica, 0, metadata["dp_cp_group"].rank()),
                allow_shape_mismatch=True,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        return state
