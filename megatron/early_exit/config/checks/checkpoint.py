"""Saving and loading, whatever is in the folders."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.early_exit.config.fields import flag_of
from megatron.early_exit.config.settings import RunSettings


def checkpoint_problems(cfg: RunSettings) -> Iterator[str]:
    """Flags about checkpoints without the folder that they need."""
    checkpoint = cfg.checkpoint
    if checkpoint.save_interval is not None and checkpoint.save is None:
        yield f"--save-interval {checkpoint.save_interval} without --save: give the folder, or nothing is saved"
    if checkpoint.load is None:
        names = ["load_iteration", "finetune", "exit_on_missing_checkpoint"]
        if checkpoint.pretrained_checkpoint is None:
            names.insert(2, "use_checkpoint_args")
        needing = [flag_of(name) for name in names if getattr(checkpoint, name)]
        if needing:
            yield f"{', '.join(needing)} without --load: give the checkpoint's folder"


def checkpoint_warnings(cfg: RunSettings) -> Iterator[str]:
    """Flags without effect in a run that does not save, or does not load."""
    checkpoint, training = cfg.checkpoint, cfg.training
    if checkpoint.save is None:
        kept = ("keep_last", "async_save", "no_save_optim", "no_save_rng")
        unused = [flag_of(name) for name in kept if getattr(checkpoint, name)]
        if unused:
            yield f"{', '.join(unused)}: no effect without --save"
        stops = ("exit_interval", "exit_duration_in_mins", "exit_signal_handler")
        stopping = [flag_of(name) for name in stops if getattr(training, name)]
        if stopping:
            yield f"{', '.join(stopping)} will stop the run without saving: --save is not given"
    if checkpoint.load is None:
        unused = [flag_of(name) for name in ("no_load_optim", "no_load_rng") if getattr(checkpoint, name)]
        if unused:
            yield f"{', '.join(unused)}: no effect without --load"
