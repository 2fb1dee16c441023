"""Where a run reports to."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.early_exit.config.fields import flag_of
from megatron.early_exit.config.settings import RunSettings


def logging_problems(cfg: RunSettings) -> Iterator[str]:
    """Settings of Weights & Biases without a project."""
    wandb = {name: value for name, value in vars(cfg.logging).items() if name.startswith("wandb_")}
    given = [flag_of(name) for name, value in wandb.items() if value is not None]
    if given and cfg.logging.wandb_project is None:
        yield f"{', '.join(given)} without --wandb-project: give the project, or drop them"
