"""Builds this rank's model chunks from the settings: core's config, chunks, precision wrapper, DDP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron.early_exit.config.layer_split import layout_text
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import Dtype
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.settings import BuildConfig
from megatron.early_exit.model.exit_losses import ExitLosses
from megatron.early_exit.model.gpt_model import EarlyExitGPTModel
from megatron.early_exit.model.layer_specs import block_spec
from megatron.early_exit.model.shared_weights import SharedOutputWeight
from megatron.early_exit.platform.device import device, use_cuda


@dataclass
class Model:
    """This rank's share of the model."""

    config: TransformerConfig
    chunks: list[EarlyExitGPTModel]
    """Bare chunks, in the order of their layers."""
    exit_losses: ExitLosses
    shared_weight: SharedOutputWeight
    wrapped: list[torch.nn.Module]
    """The chunks in their precision and DDP wrappers, as schedules take them."""
    tunes_exits: bool = False
    """Only the exits are trained (EE-Tuning)."""

    def train(self) -> None:
        """Put what is trained into training mode: frozen layers have no dropout."""
        for chunk in self.wrapped:
            chunk.train(not self.tunes_exits)
        for chunk in self.chunks:
            for head in chunk.exit_heads():
                head.train()

    def eval(self) -> None:
        """Put everything into evaluation mode."""
        for chunk in self.wrapped:
            chunk.eval()

    def zero_gradients(self) -> None:
        """Clear the buffers into which DDP adds gradients up."""
        for chunk in self.wrapped:
            assert isinstance(chunk, DistributedDataParallel), "what is trained is wrapped with DDP"
            chunk.zero_grad_buffer()


TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def params_dtype(config: RunConfig) -> torch.dtype:
    return TORCH_DTYPES[config.training.dtype]


def transformer_config(config: BuildConfig) -> TransformerConfig:
    """Core's config for these settings on this machine."""
    model, parallel, dtype = config.model, config.parallel, TORCH_DTYPES[config.dtype]
    num_chunks, cuda = parallel.num_model_chunks(model.num_layers), use_cuda()
    return TransformerConfig(
        num_layers=config.num_built_layers,
        pipeline_model_parallel_layout=_layout([len(layers) for layers in config.stage_layers]),
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_size,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=_activation(model),
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        transformer_impl=model.transformer_impl,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.num_stages,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=parallel.calculate_per_token_loss,
        recompute_granularity=None if config.tunes_exits else parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        bf16=config.dtype == "bf16",
        fp16=config.dtype == "fp16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        deallocate_pipeline_outputs=True,
        use_cpu_initialization=not cuda,
        # Interleaved schedules on NCCL overlap their messages. On gloo messages are sent one by one: batched, those of
        # the previous and the next stage get mixed up when both are the same rank.
        batch_p2p_comm=cuda and num_chunks == 1,
        overlap_p2p_comm=cuda and num_chunks > 1,
        gradient_accumulation_fusion=cuda and _has_fused_weight_gradient(),
        bias_activation_fusion=cuda and model.swiglu,
        bias_dropout_fusion=cuda,
        masked_softmax_fusion=False,
    )


def _layout(layers_per_stage: Sequence[int]) -> str | None:
    """Core's text for stages of different sizes; None where all are alike."""
    return layout_text(layers_per_stage) if len(set(layers_per_stage)) > 1 else None


def _activation(model: ModelConfig) -> Callable[[Tensor], Tensor]:
    if model.swiglu:
        return F.silu
    return functools.partial(F.gelu, approximate="tanh") if model.openai_gelu else F.gelu


def _has_fused_weight_gradient() -> bool:
    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401  (from Apex)
    except ImportError:
        return False
    return True


def build_model(config: RunConfig | BuildConfig, vocab_size: int, *, wrap_with_ddp: bool = True) -> Model:
    """Build, tie and wrap this rank's chunks. vocab_size: rows of the embedding, padded.

    Needs core's process groups and seeded generators (`platform.distributed`). All ranks must call it together."""
    build = config.build if isinstance(config, RunConfig) else config
    parallel, tunes_exits = build.parallel, build.tunes_exits
    core_config = transformer_config(build)
    exit_losses = ExitLosses(
        build.exits, parallel.calculate_per_token_loss, device(), distillation_share=build.distillation_share,
        seed=build.seed,
    )  # fmt: skip
    num_chunks = parallel.num_model_chunks(build.model.num_layers)
    chunks = [
        _build_chunk(build, core_config, exit_losses, vocab_size, vp_stage if num_chunks > 1 else None)
        for vp_stage in range(num_chunks)
    ]
    if tunes_exits:
        _freeze_all_but_exits(chunks)
    # Frozen copies of the output weight stay what the checkpoint says.
    shared_weight = SharedOutputWeight([] if tunes_exits else chunks, parallel.distributed_timeout_minutes)
    wrapped: list[torch.nn.Module] = list(chunks)
    if build.dtype != "fp32":
        wrapped = [Float16Module(core_config, chunk) for chunk in wrapped]
    if wrap_with_ddp:
        wrapped = _wrap_with_ddp(build, core_config, wrapped)
    model = Model(core_config, chunks, exit_losses, shared_weight, wrapped, tunes_exits)
    model.train()
    return model


def _freeze_all_but_exits(chunks: list[EarlyExitGPTModel]) -> None:
    for chunk in chunks:
        chunk.requires_grad_(False)
        for head in chunk.exit_heads():
            head.requires_grad_(True)


def _build_chunk(
    config: BuildConfig,
    core_config: TransformerConfig,
    exit_losses: ExitLosses,
    vocab_size: int,
    vp_stage: int | None,
) -> EarlyExitGPTModel:
    model = config.model
    chunk = EarlyExitGPTModel(
        exits=config.exits,
        exit_losses=exit_losses,
        has_final_head=config.builds_final_head,
        config=core_config,
        transformer_layer_spec=block_spec(core_config, config.exits, exit_losses, vocab_size, model, vp_stage),
        vocab_size=vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        # Under tuning the final head, like the layers behind the last exit, does not exist.
        post_process=config.builds_final_head
        and parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_base=model.rotary_base,
        rotary_percent=model.rotary_percent,
        rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        seq_len_interpolation_factor=model.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
    )
    return chunk.to(device=device(), dtype=core_config.params_dtype)


def _wrap_with_ddp(
    config: BuildConfig, core_config: TransformerConfig, chunks: list[torch.nn.Module]
) -> list[torch.nn.Module]:
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=parallel.accumulate_allreduce_grads_in_fp32 or config.dtype == "bf16",
        # Tuning runs core's forward-only schedule, which starts no reductions.
        overlap_grad_reduce=parallel.overlap_grad_reduce and not config.tunes_exits,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    wrapped = [
        # Buckets of later chunks would be reduced when the pipeline has no idle time left: one bucket for each.
        DistributedDataParallel(core_config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped
