"""Length of a run, learning rate and precision."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.early_exit.config.fields import flag_of
from megatron.early_exit.config.settings import RunSettings


def schedule_problems(cfg: RunSettings) -> Iterator[str]:
    """Lengths that contradict each other, and learning rates that do not fit them."""
    training, optimizer = cfg.training, cfg.optimizer
    if training.train_iters is not None and training.train_samples is not None:
        yield f"--train-iters {training.train_iters} and --train-samples {training.train_samples}: give one"
    elif training.train_iters is not None:
        yield from _mixed_unit_problems("iters", "samples", optimizer.lr_decay_samples, optimizer.lr_warmup_samples)
        yield from _warmup_problems(cfg, "iters", training.train_iters)
    elif training.train_samples is not None:
        yield from _mixed_unit_problems("samples", "iters", optimizer.lr_decay_iters, optimizer.lr_warmup_iters)
        yield from _warmup_problems(cfg, "samples", training.train_samples)
    else:
        yield "how long to train: give --train-iters or --train-samples"
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(optimizer, name) > optimizer.lr:
            yield f"{flag_of(name)} {getattr(optimizer, name)} is greater than --lr {optimizer.lr}"
    if optimizer.override_opt_param_scheduler and optimizer.use_checkpoint_opt_param_scheduler:
        yield "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler contradict each other: give one"


def _mixed_unit_problems(unit: str, other: str, decay: int | None, warmup: int) -> Iterator[str]:
    for name, value in ((f"--lr-decay-{other}", decay), (f"--lr-warmup-{other}", warmup)):
        if value:
            yield f"{name} {value} with --train-{unit}: count all in {unit} ({name.replace(other, unit)})"


def _warmup_problems(cfg: RunSettings, unit: str, length: int) -> Iterator[str]:
    """unit: 'iters' or 'samples', in which `length`, decay and warmup are counted."""
    optimizer = cfg.optimizer
    decay = getattr(optimizer, f"lr_decay_{unit}") or length
    warmup = getattr(optimizer, f"lr_warmup_{unit}")
    if optimizer.lr_warmup_fraction is not None and warmup:
        yield f"--lr-warmup-fraction {optimizer.lr_warmup_fraction} and --lr-warmup-{unit} {warmup}: give one"
    elif warmup >= decay:
        yield (
            f"--lr-warmup-{unit} {warmup} does not end before the decay of {decay} {unit} (--lr-decay-{unit}, or"
            f" --train-{unit}): shorten it"
        )


def precision_problems(cfg: RunSettings) -> Iterator[str]:
    """Precisions and optimizers that exclude each other."""
    if cfg.training.bf16 and cfg.training.fp16:
        yield "--bf16 and --fp16: one run has one precision; give one"
    if cfg.parallel.use_distributed_optimizer and cfg.optimizer.optimizer != "adam":
        yield f"--use-distributed-optimizer with --optimizer {cfg.optimizer.optimizer}: it shares Adam's state only"


def precision_warnings(cfg: RunSettings) -> Iterator[str]:
    """Settings of a precision that is not used."""
    if cfg.training.loss_scale is not None and not cfg.training.fp16:
        yield f"--loss-scale {cfg.training.loss_scale} has no effect without --fp16"
