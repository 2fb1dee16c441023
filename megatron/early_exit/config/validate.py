"""Whether settings fit together and to the number of ranks: all problems at once, before anything is built.

    validate(config, world_size)        # what `pretrain` begins with
    check_outputs(config)               # and, on the rank that writes

Every problem says what is wrong, the values, and what to do. Ranges of single values stand at the fields; rules
between fields are in `checks/`, one file for each subject. What needs the data or the tokenizer's contents is checked
where they are read.
"""

from __future__ import annotations

from megatron.early_exit.config.checks.batches import batch_problems, batch_warnings
from megatron.early_exit.config.checks.checkpoint import checkpoint_problems, checkpoint_warnings
from megatron.early_exit.config.checks.data import data_problems
from megatron.early_exit.config.checks.exits import exit_problems, exit_warnings
from megatron.early_exit.config.checks.files import missing_inputs, output_problems
from megatron.early_exit.config.checks.layout import (
    has_stages,
    layout_problems,
    layout_warnings,
    stage_problems,
)
from megatron.early_exit.config.checks.logging import logging_problems
from megatron.early_exit.config.checks.model import model_problems, model_warnings
from megatron.early_exit.config.checks.optimization import precision_problems, precision_warnings, schedule_problems
from megatron.early_exit.config.checks.plans import plan_problems, plan_warnings
from megatron.early_exit.config.checks.ranges import range_problems
from megatron.early_exit.config.checks.tuning import tuning_problems, tuning_warnings
from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.settings import RunSettings


def validate(cfg: RunSettings, world_size: int) -> None:
    """Raise ConfigError with all problems of `cfg` on `world_size` ranks, and of the files that it reads."""
    _raise_if(problems(cfg, world_size))


def check(cfg: RunSettings) -> None:
    """Raise ConfigError with what contradicts itself in `cfg`, whatever the number of ranks, files and data."""
    found = list(range_problems(cfg))
    if not found:  # what follows divides by sizes
        found += [*model_problems(cfg), *stage_problems(cfg)]
        if has_stages(cfg):
            found += plan_problems(cfg)
    _raise_if([*found, *exit_problems(cfg), *precision_problems(cfg), *logging_problems(cfg)])


def check_outputs(cfg: RunSettings) -> None:
    """Raise ConfigError if files or folders that the run writes cannot be written. For the rank that writes them."""
    _raise_if(list(output_problems(cfg)))


def problems(cfg: RunSettings, world_size: int) -> list[str]:
    """What cannot work, one line each; empty if everything fits."""
    ranges = list(range_problems(cfg))
    found = [
        *ranges,
        *exit_problems(cfg),
        *checkpoint_problems(cfg),
        *data_problems(cfg),
        *missing_inputs(cfg),
        *precision_problems(cfg),
        *logging_problems(cfg),
    ]
    if not ranges:  # what follows divides by sizes
        found += [*model_problems(cfg), *layout_problems(cfg, world_size), *stage_problems(cfg)]
        if has_stages(cfg):
            found += [*plan_problems(cfg), *tuning_problems(cfg, world_size)]
        found += [*batch_problems(cfg, world_size), *schedule_problems(cfg)]
    return found


def warnings(cfg: RunSettings) -> list[str]:
    """Settings that are allowed but do nothing, or do something surprising; one line each."""
    return [
        *model_warnings(cfg),
        *tuning_warnings(cfg),
        *plan_warnings(cfg),
        *exit_warnings(cfg),
        *precision_warnings(cfg),
        *layout_warnings(cfg),
        *batch_warnings(cfg),
        *checkpoint_warnings(cfg),
    ]


def _raise_if(found: list[str]) -> None:
    if found:
        raise ConfigError(found)
