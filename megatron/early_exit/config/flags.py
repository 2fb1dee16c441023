"""Command line and YAML file -> RunConfig. The flags are the dataclasses' fields; nothing is listed twice.

What Megatron-LM and EE-LLM have beyond that stands in `flag_notes.py`. All problems are reported together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.fields import build_settings, config_fields, flag_of
from megatron.early_exit.config.flag_parser import build_parser, flags_of_parser
from megatron.early_exit.config.flag_words import flag_groups, settings_from_words, without_unused_flags
from megatron.early_exit.config.overlay import checkpoint_source, overlay_architecture, warn_of_replaced
from megatron.early_exit.config.reading_notes import Notes
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.saved_description import checkpoint_description
from megatron.early_exit.config.settings import RunSettings, normalised
from megatron.early_exit.config.validate import problems
from megatron.early_exit.config.validate import warnings as settings_without_effect
from megatron.early_exit.config.yaml_settings import settings_from_yaml

_LOG = logging.getLogger(__name__)


def parse_run_config(argv: Sequence[str], *, world_size: int, warn: Callable[[str], None] = _LOG.warning) -> RunConfig:
    """Settings from the command line `argv` (without the program's name), then `--config FILE`, then defaults.

    world_size: number of ranks (torchrun's WORLD_SIZE). warn: called with one line for each flag that is ignored and
    each setting without effect. `--help` prints and exits. Raises ConfigError with all problems."""
    notes = Notes()
    parser = build_parser()
    words = without_unused_flags(flag_groups(argv), flags_of_parser(parser), notes)
    from_flags, config_path = settings_from_words(words, parser, notes)
    from_file = settings_from_yaml(config_path, notes) if config_path else {}
    settings = {**from_file, **from_flags}
    notes.resolve_conditions(settings)
    for message in notes.warnings:
        warn(message)

    cfg = None if notes.has_bad_values else _build(settings, notes, warn)
    if cfg is not None:
        notes.problems += problems(cfg, world_size)
    if notes.problems:
        raise ConfigError(notes.problems)
    assert cfg is not None, "no configuration and no problem"
    for message in settings_without_effect(cfg):
        warn(message)
    return RunConfig(**vars(cfg))


def _build(settings: dict[str, Any], notes: Notes, warn: Callable[[str], None]) -> RunSettings | None:
    """The configuration, or None if required settings are missing (noted)."""
    present: ModelDescription | None = None
    if settings.get("use_checkpoint_args"):
        source, iteration, named_by = checkpoint_source(settings)
        if source is None:
            notes.problems.append("--use-checkpoint-args without --load: give the checkpoint's folder")
            return None
        try:
            present = checkpoint_description(source, iteration, named_by)
        except ConfigError as error:
            notes.problems += [f"--use-checkpoint-args: {problem}" for problem in error.problems]
            return None
    from_checkpoint = vars(present.model) if present else {}
    missing = [
        flag_of(field.name)
        for field in config_fields()
        if field.is_required and field.name not in settings and field.name not in from_checkpoint
    ]
    if missing:
        notes.problems.append(
            f"missing: {', '.join(missing)} (as flags or in --config; sizes also by --use-checkpoint-args)"
        )
        return None
    cfg = build_settings({**from_checkpoint, **settings})
    if present is not None:
        before, cfg = cfg, overlay_architecture(cfg, present, given=settings.keys())
        warn_of_replaced(before, cfg, settings, warn)
    return normalised(cfg, warn)
