"""Which modules the layers of one model chunk are made of. The seam towards core: a move from `GPTModel` to another
decoder of core touches this file and `gpt_model.py`."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.model.attention import SdpaAttention
from megatron.early_exit.model.exit_head import ExitHeadSpec
from megatron.early_exit.model.exit_losses import ExitLosses
from megatron.early_exit.model.key_names import KEYS_OF_NORMS
from megatron.early_exit.model.layer import EarlyExitTransformerLayer
from megatron.early_exit.model.norms import TorchNorm


def local_layer_spec(qk_layernorm: bool = False) -> ModuleSpec:
    """A layer of core's tensor-parallel linear layers, with PyTorch's SDPA and norms."""
    head_norm = TorchNorm if qk_layernorm else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SdpaAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TorchNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(KEYS_OF_NORMS),
        ),
    )


def layer_spec(model: ModelConfig, has_mlp_branch: bool = False) -> tuple[ModuleSpec, type]:
    """(spec of a layer, norm class) for `--transformer-impl local` or `transformer_engine`.

    has_mlp_branch: of a layer whose exit has one. Raises ImportError if Transformer Engine is asked for and not
    installed."""
    if model.transformer_impl == "local":
        return local_layer_spec(model.qk_layernorm), TorchNorm
    try:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        if TENorm is None:
            raise ImportError("TENorm is missing")
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_layernorm)
        return (with_mlp_norm(spec, TENorm, TEColumnParallelLinear) if has_mlp_branch else spec), TENorm
    except ImportError as error:
        raise ImportError(
            "--transformer-impl is transformer_engine, but Transformer Engine is not installed "
            f"({error}). Install the extra `te` on a CUDA machine, or use --transformer-impl local."
        ) from error


def with_mlp_norm(spec: ModuleSpec, norm: type, linear_fc1: type) -> ModuleSpec:
    """A layer whose norm before the MLP is fused with `linear_fc1`, with the two apart: the same function, with the
    same keys in checkpoints, and an MLP branch can read what the norm gives."""
    submodules, mlp = spec.submodules, spec.submodules.mlp
    return replace(
        spec,
        submodules=replace(
            submodules,
            pre_mlp_layernorm=norm,
            mlp=replace(mlp, submodules=replace(mlp.submodules, linear_fc1=linear_fc1)),
            sharded_state_dict_keys_map={**submodules.sharded_state_dict_keys_map, **KEYS_OF_NORMS},
        ),
    )


def block_spec(
    config: TransformerConfig,
    exits: ExitConfig,
    exit_losses: ExitLosses,
    vocab_size: int,
    model: ModelConfig,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """One spec per layer of this rank's chunk `vp_stage`; layers that own an exit get `EarlyExitTransformerLayer`.

    vocab_size: rows of the output projections, padded. Needs core's process groups."""
    plain, norm = layer_spec(model)
    first = get_transformer_layer_offset(config, vp_stage) + 1
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage))
    layer_specs = [plain] * len(numbers)
    for index, layer_number in enumerate(numbers):
        exit_index = exits.index_of(layer_number)
        if exit_index is not None:
            with_exit, _ = layer_spec(model, has_mlp_branch=exits.head_of(exit_index).mlp)
            head = exit_head_spec(exits, exit_index, with_exit, norm, vocab_size)
            layer_specs[index] = replace_module(with_exit, exit_head=head, exit_losses=exit_losses)
    return TransformerBlockSubmodules(layer_specs=layer_specs, layer_norm=norm)


def exit_head_spec(exits: ExitConfig, exit_index: int, plain: ModuleSpec, norm: type, vocab_size: int) -> ExitHeadSpec:
    """The head of the exit with index `exit_index`, made of the same modules as a plain layer."""
    head = exits.head_of(exit_index)
    return ExitHeadSpec(
        exit_index=exit_index,
        pre_exit=exits.pre_exit,
        temperature=exits.temperature_of(exit_index),
        weigh_by_confidence=exits.use_dynamic_exit_layer_weight,
        output_vocab_size=vocab_size if head.untied_output else None,
        norm=norm if head.norm else None,
        mlp=plain.submodules.mlp if head.mlp else None,
        mlp_bda=plain.submodules.mlp_bda if head.mlp else None,
        block=plain if head.block else None,
    )


def replace_module(plain: ModuleSpec, **params: object) -> ModuleSpec:
    """The same submodules in a layer that owns an exit."""
    return replace(plain, module=EarlyExitTransformerLayer, params={**plain.params, **params})
