"""The head of one exit: optional transformer block or MLP branch, optional norm, output projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron.early_exit.model.cross_entropy import (
    LossSums,
    Teacher,
    cross_entropy_of_rows,
    cross_entropy_sums,
    whole_hidden_states,
)
from megatron.early_exit.model.token_sampling import SampledTokens


@dataclass(frozen=True)
class ExitHeadSpec:
    """What to build for the exit with index `exit_index` among the exits."""

    exit_index: int
    pre_exit: bool
    temperature: float
    weigh_by_confidence: bool
    output_vocab_size: int | None
    """Rows (all TP ranks together) of an output projection of its own; None: use the model's output weight."""
    norm: ModuleSpec | type | None = None
    mlp: ModuleSpec | None = None
    mlp_bda: ModuleSpec | type | None = None
    block: ModuleSpec | None = None


class ExitHead(MegatronModule):
    """Turns the hidden states of a layer into what the exit's output projection reads, and into its loss."""

    def __init__(
        self,
        config: TransformerConfig,
        spec: ExitHeadSpec,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None,
    ) -> None:
        """layer_number: number of the owning layer within its stage, from 1, as core passes it to layers."""
        super().__init__(config=config)
        self.spec = spec
        self.tp_group = pg_collection.tp
        self.block: TransformerLayer | None = None
        self.mlp: MegatronModule | None = None
        self.norm: torch.nn.Module | None = None
        self.output_layer: ColumnParallelLinear | None = None
        if spec.block is not None:
            self.block = build_module(
                spec.block, config=config, layer_number=layer_number, pg_collection=pg_collection, vp_stage=vp_stage
            )
        if spec.mlp is not None:
            self.mlp = build_module(spec.mlp, config=config, tp_group=self.tp_group)
            self.mlp_bda = build_module(spec.mlp_bda)
        if spec.norm is not None:
            self.norm = build_module(
                spec.norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
        if spec.output_vocab_size is not None:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                spec.output_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                tp_group=self.tp_group,
            )
            self.output_layer.weight.is_embedding_or_output_parameter = True
        self._model_output_weight: Callable[[], Tensor] | None = None

    @property
    def is_tied(self) -> bool:
        """Whether the exit uses the model's output weight."""
        return self.output_layer is None

    def use_model_output_weight(self, get_weight: Callable[[], Tensor]) -> None:
        """Tell a tied head where this rank's copy of the model's output weight is."""
        self._model_output_weight = get_weight

    @property
    def output_weight(self) -> Tensor:
        """[vocabulary / tp, h]"""
        if self.output_layer is not None:
            return self.output_layer.weight
        assert self._model_output_weight is not None, "a tied head is told where the model's output weight is"
        return self._model_output_weight()

    def forward(
        self, hidden_states: Tensor, pre_mlp_norm: torch.nn.Module | None = None, **layer_arguments: Any
    ) -> Tensor:
        """Hidden states that the output projection reads.

        hidden_states: [s, b, h] (or this TP rank's part of the sequence): the layer's output (its input with
        pre-exit); for an MLP branch the residual after attention. pre_mlp_norm: the owning layer's norm before its MLP
        (MLP branch). layer_arguments: what the owning layer was called with: mask and rotary embedding (block)."""
        return self._normalised(self._branch(hidden_states, pre_mlp_norm, **layer_arguments))

    def _branch(
        self, hidden_states: Tensor, pre_mlp_norm: torch.nn.Module | None = None, **layer_arguments: Any
    ) -> Tensor:
        """Hidden states after the block or the MLP branch, if there is one."""
        if self.block is not None:
            hidden_states, _ = self.block(hidden_states=hidden_states, **layer_arguments)
        if self.mlp is not None:
            assert pre_mlp_norm is not None, "a layer gives an MLP branch its norm"
            branch = self.mlp(pre_mlp_norm(hidden_states))
            add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
            hidden_states = add(branch, hidden_states, self.config.hidden_dropout)
        return hidden_states

    def _normalised(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if self.norm is None else self.norm(hidden_states)

    def loss(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        gradient_scale: Tensor,
        pre_mlp_norm: torch.nn.Module | None = None,
        teacher: Teacher | None = None,
        tokens: SampledTokens | None = None,
        **layer_arguments: Any,
    ) -> LossSums:
        """The exit's cross-entropy over one microbatch; arguments as in `forward` and `cross_entropy_sums`.

        tokens: estimate it from these; a block or MLP branch sees all tokens, norm and output projection these alone.
        Their statistics are then unscaled."""
        hidden_states = self._branch(hidden_states, pre_mlp_norm, **layer_arguments)
        settings = {
            "tp_group": self.tp_group, "temperature": self.spec.temperature,
            "weigh_by_confidence": self.spec.weigh_by_confidence,
        }  # fmt: skip
        if tokens is not None:
            return self._loss_of_tokens(hidden_states, tokens, gradient_scale, teacher, settings)
        return cross_entropy_sums(
            self._normalised(hidden_states),
            self.output_weight,
            labels,
            loss_mask,
            sequence_parallel=self.config.sequence_parallel,
            gradient_scale=gradient_scale,
            teacher=teacher,
            **settings,
        )

    def _loss_of_tokens(
        self,
        hidden_states: Tensor,
        tokens: SampledTokens,
        gradient_scale: Tensor,
        teacher: Teacher | None,
        settings: dict[str, Any],
    ) -> LossSums:
        sequence_parallel = self.config.sequence_parallel
        # With sequence parallelism gradients are summed over TP ranks where sequences were gathered, and those of the
        # norm, whose rows all ranks have here, where core sums those of norms. Without, all ranks need whole ones.
        if sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        hidden_states = self._normalised(tokens.rows_of(hidden_states))
        if not sequence_parallel:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        if teacher is not None:
            whole = whole_hidden_states(teacher, self.tp_group, sequence_parallel)
            teacher = teacher._replace(hidden_states=tokens.rows_of(whole))
        sums = cross_entropy_of_rows(
            hidden_states,
            self.output_weight,
            tokens.labels,
            tokens.loss_mask,
            gradient_scale=gradient_scale * tokens.weight,
            teacher=teacher,
            **settings,
        )
        return sums._replace(objective=sums.objective * tokens.weight)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if not self.is_tied:
            # Like core's output layer: padding of the vocabulary depends on the TP size.
            state[f"{prefix}output_layer.weight"].allow_shape_mismatch = True
            state.pop(f"{prefix}output_layer._extra_state", None)
        return state
