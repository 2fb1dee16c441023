"""Core's optimizer and learning-rate schedule from our settings."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.model.build import Model, params_dtype
from megatron.early_exit.platform.device import use_cuda
from megatron.early_exit.platform.optimizer_state import repair_optimizer


def build_optimizer(config: RunConfig, model: Model) -> MegatronOptimizer:
    """Core's optimizer over this rank's chunks."""
    settings, training, parallel = config.optimizer, config.training, config.parallel
    core_config = CoreOptimizerConfig(
        optimizer=settings.optimizer,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        sgd_momentum=settings.sgd_momentum,
        clip_grad=settings.clip_grad,
        bf16=training.bf16,
        fp16=training.fp16,
        params_dtype=params_dtype(config),
        loss_scale=training.loss_scale,
        initial_loss_scale=training.initial_loss_scale,
        min_loss_scale=training.min_loss_scale,
        loss_scale_window=training.loss_scale_window,
        hysteresis=training.hysteresis,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(core_config, model.wrapped, use_gloo_process_groups=use_cuda())
    repair_optimizer(optimizer)
    return optimizer


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer, global_batch_size: int) -> OptimizerParamScheduler:
    """Core's learning-rate schedule. It counts samples, so that it survives a change of the batch size."""
    settings, training = config.optimizer, config.training
    if training.train_samples is not None:
        decay = settings.lr_decay_samples or training.train_samples
        warmup: float = settings.lr_warmup_samples
    else:
        decay = (settings.lr_decay_iters or training.given_iterations) * global_batch_size
        warmup = settings.lr_warmup_iters * global_batch_size
    if settings.lr_warmup_fraction is not None:
        warmup = settings.lr_warmup_fraction * decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=settings.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=settings.override_opt_param_scheduler,
    )
