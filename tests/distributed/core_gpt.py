"""Runs on workers: core's own GPT, with core's spec of a layer, as Megatron-LM builds it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import Tensor

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.model.build import transformer_config
from tests.configs import VOCAB_SIZE


def core_gpt(cfg: RunConfig, **changes: Any) -> GPTModel:
    """This rank's stage, with core's random parameters. Needs core's process groups."""
    model = cfg.model
    return GPTModel(
        config=transformer_config(cfg.build),
        transformer_layer_spec=get_gpt_layer_local_spec(
            qk_layernorm=model.qk_layernorm, normalization=model.normalization
        ),
        **{
            "vocab_size": VOCAB_SIZE,
            "max_sequence_length": model.max_position_embeddings or cfg.training.seq_length,
            "pre_process": parallel_state.is_pipeline_first_stage(),
            "post_process": parallel_state.is_pipeline_last_stage(),
            "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
            "position_embedding_type": model.position_embedding_type,
            "rotary_base": model.rotary_base,
            "rotary_percent": model.rotary_percent,
            "rope_scaling": model.use_rope_scaling,
            "rope_scaling_factor": model.rope_scaling_factor,
            "seq_len_interpolation_factor": model.rotary_seq_len_interpolation_factor,
            **changes,
        },
    )  # fmt: skip


@torch.no_grad()
def core_logits(model: GPTModel, tokens: list[list[int]]) -> Tensor:
    """[sequences, positions, vocabulary] of a model on one pipeline stage, with all of its tensor-parallel parts."""
    ids = torch.tensor(tokens)
    positions = torch.arange(ids.size(1)).expand_as(ids)
    # Core's attention wants to be told what no position sees.
    mask = torch.ones(1, 1, ids.size(1), ids.size(1), dtype=torch.bool).triu(1)
    part = model.eval()(ids, positions, mask)
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, -1)
