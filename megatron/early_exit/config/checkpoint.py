"""Where checkpoints go and what is read from them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.early_exit.config.ranges import NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving, loading, and what a load takes over."""

    save: str | None = None
    """Folder for checkpoints."""

    load: str | None = None
    """Folder to resume from (the last finished checkpoint in it). If it is also --save, it may still be empty."""

    pretrained_checkpoint: str | None = None
    """Folder of a model to start from: its weights alone are loaded if --load holds no checkpoint yet."""

    load_iteration: NonNegativeInt | None = None
    """Iteration to load instead of the last one (0: the last one)."""

    exit_on_missing_checkpoint: bool = False
    """Stop if --load holds no checkpoint, also when it is the same folder as --save."""

    save_interval: PositiveInt | None = None
    """Iterations between checkpoints. The end of training always saves."""

    keep_last: PositiveInt | None = None
    """Checkpoints to keep; older ones are removed after a successful save. Default: all."""

    async_save: bool = False
    """Write copies of checkpoints in the background while training goes on."""

    finetune: bool = False
    """Load weights only and start at iteration 0."""

    no_load_optim: bool = False
    """Do not load the optimizer and its schedule."""

    no_load_rng: bool = False
    """Do not load random-number states."""

    no_save_optim: bool = False
    """Do not save the optimizer."""

    no_save_rng: bool = False
    """Do not save random-number states."""

    override_tokenizer: bool = False
    """Train with a tokenizer that gives other ids than the checkpoint's, which the new checkpoints then carry."""

    use_checkpoint_args: bool = False
    """Take the architecture and the exits from the checkpoint's configuration."""
