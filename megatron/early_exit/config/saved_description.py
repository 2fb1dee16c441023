"""Which model a checkpoint holds: its description and its tokenizer, written into its folder and read from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.checkpoint_files import (
    DESCRIPTION_FILE,
    RUN_CONFIG_FILE,
    SENTENCEPIECE_FILE,
    TOKENIZER_FOLDER,
    TOKENIZER_SETTINGS_FILE,
)
from megatron.early_exit.config.data import DataConfig, TokenizerConfig
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.exits import ExitConfig, exit_kind_problems
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import Dtype
from megatron.early_exit.config.serialize import build_sections, load_run_config, plain_values
from megatron.early_exit.config.values import convert_value
from megatron.early_exit.config.yaml_files import naming, read_yaml, write_yaml

_DESCRIPTION_SECTIONS = {"model": ModelConfig, "exits": ExitConfig}


def checkpoint_description(
    load: str | Path, load_iteration: int | None = None, flag: str = "--load"
) -> ModelDescription:
    """The model that a checkpoint below the folder `load`, which `flag` gave, holds.

    Raises ConfigError that names the missing path."""
    return read_description(checkpoint_folder(load, load_iteration, flag))


def read_description(folder: Path) -> ModelDescription:
    """The model that the checkpoint in `folder` holds, with the tokenizer that lies there.

    Raises ConfigError that names the file and every problem."""
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        return _description_of_run(folder)
    data, tokenizer = read_yaml(path), saved_tokenizer(folder / TOKENIZER_FOLDER)
    with naming(path):
        dtype = _convert_dtype(data.pop("dtype", None))
        sections = build_sections(data, _DESCRIPTION_SECTIONS)
        return _describe(**sections, tokenizer=tokenizer, dtype=dtype)


def _convert_dtype(value: Any) -> Dtype:
    try:
        dtype: Dtype = convert_value(value, Dtype)
    except ValueError as error:
        raise ConfigError([f"dtype: {error}"]) from None
    return dtype


def _describe(model: ModelConfig, exits: ExitConfig, tokenizer: TokenizerConfig, dtype: Dtype) -> ModelDescription:
    if issues := list(exit_kind_problems(exits)):
        raise ConfigError(issues)
    try:
        return ModelDescription(model, exits, tokenizer, dtype)
    except ValueError as error:
        raise ConfigError([f"model.{error}"]) from None


def _description_of_run(folder: Path) -> ModelDescription:
    """The description of a checkpoint that has none, as earlier versions wrote them: from the run's settings."""
    path = folder / RUN_CONFIG_FILE
    run, own = load_run_config(path), folder / TOKENIZER_FOLDER
    tokenizer = saved_tokenizer(own) if own.is_dir() else run.data.tokenizer
    with naming(path):
        return _describe(run.build.model, run.exits, tokenizer, run.training.dtype)


def save_description(description: ModelDescription, folder: Path) -> None:
    """Write what `read_description` reads from `folder`, but for the tokenizer."""
    sections = {section: plain_values(getattr(description, section)) for section in _DESCRIPTION_SECTIONS}
    write_yaml({**sections, "dtype": description.dtype}, folder / DESCRIPTION_FILE)


def saved_tokenizer(folder: str | Path) -> TokenizerConfig:
    """Settings of the tokenizer that `data.tokenizer_files.save_tokenizer` wrote into `folder`.

    Raises ConfigError if there is none, or it is damaged."""
    folder = Path(folder)
    path = folder / TOKENIZER_SETTINGS_FILE
    if not path.is_file():
        raise ConfigError(
            [f"no tokenizer was saved in {folder}: {path.name} is missing; copy it from a checkpoint of the same run"]
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind, size, has_model = (settings[name] for name in ("tokenizer_type", "vocab_size", "has_model"))
        mock_data = settings.get("mock_data", False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            [f"{path} is damaged ({type(error).__name__}: {error}); copy it from a checkpoint of the same run"]
        ) from None
    model = None
    if has_model:
        is_folder = kind == "HuggingFaceTokenizer"
        model = str((folder if is_folder else folder / SENTENCEPIECE_FILE).absolute())
    return DataConfig(tokenizer_type=kind, tokenizer_model=model, vocab_size=size, mock_data=mock_data).tokenizer
