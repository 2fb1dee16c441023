"""Batch sizes, duration, precision, optimizer and learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.early_exit.config.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ProperFraction,
)

Dtype = Literal["fp32", "bf16", "fp16"]
"""Precision of weights."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, on how much, in which precision, and when to stop."""

    seq_length: PositiveInt
    """Tokens of one sequence."""

    dry_run: bool = False
    """Check all settings, print what the run would be (layout, parameters and memory of every stage, tokens), and end.
    One process is enough: WORLD_SIZE says for how many ranks."""

    tune_exit: bool = False
    """Train the exits alone (EE-Tuning): the layers are frozen, and those behind the last exit are not built."""

    tune_exit_distillation: float = 0.0
    """With --tune-exit: share of the loss that is the divergence from the final head's distribution instead of the
    cross-entropy of the text. All layers are then built, and all pipeline stages run."""

    cache_hidden_states: str | None = None
    """With --tune-exit: folder in which the frozen layers' hidden states are cached. They are computed first, once, and
    then serve every pass over the samples, and other exits of the same model."""

    cache_samples: int | None = None
    """Samples that --cache-hidden-states holds; training draws them again and again. Default: all that it draws."""

    micro_batch_size: PositiveInt = 1
    """Sequences of one microbatch."""

    global_batch_size: PositiveInt | None = None
    """Sequences of one iteration over all ranks. Default: micro batch size x data-parallel size."""

    rampup_batch_size: tuple[int, ...] = ()
    """START INCREMENT SAMPLES: grow the global batch size from START by INCREMENT over SAMPLES samples."""

    train_iters: PositiveInt | None = None
    """Iterations to train."""

    train_samples: PositiveInt | None = None
    """Samples to train, instead of iterations."""

    eval_interval: PositiveInt = 1000
    """Iterations between validations."""

    eval_iters: NonNegativeInt = 100
    """Batches of one validation; 0 turns validation off."""

    seed: NonNegativeInt = 1234
    """Seed of initial weights, dropout and data order."""

    bf16: bool = False
    """Train in bfloat16 with fp32 main weights."""

    fp16: bool = False
    """Train in float16 with loss scaling and fp32 main weights."""

    loss_scale: PositiveFloat | None = None
    """Fixed loss scale for fp16. Default: dynamic."""

    initial_loss_scale: PositiveFloat = 2.0**32
    """First dynamic loss scale."""

    min_loss_scale: PositiveFloat = 1.0
    """Smallest dynamic loss scale."""

    loss_scale_window: PositiveFloat = 1000
    """Good iterations before the dynamic loss scale doubles."""

    hysteresis: PositiveInt = 2
    """Overflows before the dynamic loss scale halves."""

    exit_interval: PositiveInt | None = None
    """Save and stop after an iteration that this divides."""

    exit_duration_in_mins: PositiveFloat | None = None
    """Save and stop after this many minutes."""

    exit_signal_handler: bool = False
    """Save and stop on SIGTERM."""

    @property
    def given_iterations(self) -> int:
        """--train-iters of a run without --train-samples: one of both is given."""
        assert self.train_iters is not None, "the length of this run is given in samples"
        return self.train_iters

    @property
    def dtype(self) -> Dtype:
        """Precision of the weights that compute."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam and the learning-rate schedule."""

    lr: PositiveFloat
    """Largest learning rate."""

    min_lr: NonNegativeFloat = 0.0
    """Learning rate after decay."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "linear"
    """Shape of the decay."""

    lr_decay_iters: PositiveInt | None = None
    """Iterations over which the rate decays. Default: --train-iters."""

    lr_decay_samples: PositiveInt | None = None
    """The same in samples. Default: --train-samples."""

    lr_warmup_iters: NonNegativeInt = 0
    """Iterations of linear learning-rate warmup."""

    lr_warmup_samples: NonNegativeInt = 0
    """The same in samples."""

    lr_warmup_fraction: ProperFraction | None = None
    """Warmup as a share of the decay length."""

    lr_warmup_init: NonNegativeFloat = 0.0
    """Learning rate at the start of warmup."""

    override_opt_param_scheduler: bool = False
    """On resume, take the learning-rate schedule from the flags, not from the checkpoint."""

    use_checkpoint_opt_param_scheduler: bool = False
    """On resume, take the learning-rate schedule from the checkpoint, ignoring the flags."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; biases and norms have none."""

    adam_beta1: ProperFraction = 0.9
    """Decay of the first moment."""

    adam_beta2: ProperFraction = 0.999
    """Decay of the second moment."""

    adam_eps: PositiveFloat = 1e-8
    """Added to the denominator."""

    sgd_momentum: ProperFraction = 0.9
    """Momentum of SGD."""

    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
