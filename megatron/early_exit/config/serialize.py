"""Configuration as plain data: dictionaries, the YAML files in a checkpoint, and what a load takes from them.

Values are checked for type and names for existence here, for YAML and flags alike; whether the settings fit together is
`validate.py`'s question.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.checkpoint_files import (
    DESCRIPTION_FILE,
    RUN_CONFIG_FILE,
    SENTENCEPIECE_FILE,
    TOKENIZER_FOLDER,
    TOKENIZER_SETTINGS_FILE,
)
from megatron.early_exit.config.data import DataConfig, TokenizerConfig
from megatron.early_exit.config.description import EXIT_STRUCTURE_FIELDS, FREE_MODEL_FIELDS, ModelDescription
from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.exits import ExitConfig, exit_kind_problems
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import Dtype
from megatron.early_exit.config.settings import RunSettings


@dataclass(frozen=True)
class FieldInfo:
    """One field of one section of a run's settings."""

    section: str
    name: str
    annotation: Any
    """The resolved type: a class, `X | None`, `tuple[X, ...]` or `Literal[...]`."""

    default: Any
    """dataclasses.MISSING if the field is required."""

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING


def section_classes() -> dict[str, type]:
    """Sections of a run's settings by name, in order."""
    return dict(typing.get_type_hints(RunSettings))


@functools.cache
def config_fields() -> tuple[FieldInfo, ...]:
    """All fields of all sections, in order. Field names are unique over sections."""
    return tuple(
        FieldInfo(section, field.name, hints[field.name], field.default)
        for section, section_class in section_classes().items()
        for hints in [typing.get_type_hints(section_class)]
        for field in dataclasses.fields(section_class)
    )


def build_settings(settings: Mapping[str, Any]) -> RunSettings:
    """Settings from values by field name; what is not in `settings` takes its default."""
    names = {
        section: [field.name for field in dataclasses.fields(section_class)]
        for section, section_class in section_classes().items()
    }
    sections = {
        section: section_class(**{name: settings[name] for name in names[section] if name in settings})
        for section, section_class in section_classes().items()
    }
    return RunSettings(**sections)


# Types


def is_one_or_each(annotation: Any) -> bool:
    """Whether the type is `X | tuple[X, ...]`: one value for all, or a list with one for each."""
    return any(typing.get_origin(argument) is tuple for argument in typing.get_args(annotation))


def is_truth(annotation: Any) -> bool:
    """Whether the type is `bool`, or true or false for each of several."""
    return annotation is bool or (is_one_or_each(annotation) and typing.get_args(annotation)[0] is bool)


def optional_type(annotation: Any) -> tuple[Any, bool]:
    """(X, True) for `X | None`, (X, False) for `X | tuple[X, ...]`, (annotation, False) for anything else."""
    if is_one_or_each(annotation):
        return typing.get_args(annotation)[0], False
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        inner = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
        return inner[0], True
    return annotation, False


def convert_value(value: Any, annotation: Any) -> Any:
    """`value`, as YAML gives it, as a value of type `annotation`.

    Integers pass as floats and lists become tuples; nothing else is converted. Raises ValueError with the reason."""
    if is_one_or_each(annotation) and isinstance(value, (list, tuple)):
        annotation = typing.get_args(annotation)[1]
    inner, is_optional = optional_type(annotation)
    if value is None:
        if is_optional:
            return None
        raise ValueError(f"expected {type_name(annotation)}, got nothing")
    if typing.get_origin(inner) is tuple:
        element = typing.get_args(inner)[0]
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert_element(item, element) for item in values)
    return _convert_scalar(value, inner)


def _convert_element(value: Any, element: Any) -> Any:
    if element is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # the weights of a data blend stand among its paths
    return _convert_scalar(value, element)


def _convert_scalar(value: Any, scalar: Any) -> Any:
    if typing.get_origin(scalar) is Literal:
        if value not in typing.get_args(scalar):
            raise ValueError(f"expected {type_name(scalar)}, got {value!r}")
        return value
    if scalar is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not scalar:
        raise ValueError(f"expected {type_name(scalar)}, got {value!r} ({type(value).__name__})")
    if scalar is float and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    if scalar is str and not value:
        raise ValueError("the text is empty: is a shell variable not set?")
    return value


def parse_text(text: str, annotation: Any) -> Any:
    """A command-line word as a value of type `annotation` (of its elements, for a tuple).

    Raises ValueError with the reason."""
    inner, _ = optional_type(annotation)
    if typing.get_origin(inner) is tuple:
        inner = typing.get_args(inner)[0]
    if inner is bool:
        if text not in ("true", "false"):
            raise ValueError(f"expected true or false, got {text!r}")
        return text == "true"
    if inner in (int, float):
        try:
            return _convert_scalar(inner(text), inner)
        except ValueError:
            raise ValueError(f"expected {type_name(inner)}, got {text!r}") from None
    return _convert_scalar(text, inner)


def type_name(annotation: Any) -> str:
    """A type in words, for messages and documentation."""
    if is_one_or_each(annotation):
        one, _ = typing.get_args(annotation)
        return f"{type_name(one)}, or a list of them"
    inner, _ = optional_type(annotation)
    if typing.get_origin(inner) is tuple:
        return f"a list ({type_name(typing.get_args(inner)[0])} each)"
    if typing.get_origin(inner) is Literal:
        return "one of " + ", ".join(typing.get_args(inner))
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[inner]


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean NAME?' with the nearest known name, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


# Dictionaries and files


def to_dict(cfg: RunSettings) -> dict[str, dict[str, Any]]:
    """Sections of field values in YAML's types (tuples become lists)."""
    return {section: _plain(getattr(cfg, section)) for section in section_classes()}


def _plain(section: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(section).items()}


def from_dict(data: Mapping[str, Any]) -> RunSettings:
    """The inverse of `to_dict`. Fields that are absent take their defaults.

    Raises ConfigError with all unknown names, wrong types and missing required fields."""
    return RunSettings(**_build_sections(data, section_classes()))


def _build_sections(data: Mapping[str, Any], classes: Mapping[str, type]) -> dict[str, Any]:
    """An object of each section's class from its values by name. Raises ConfigError with all problems."""
    issues: list[str] = []
    settings: dict[str, dict[str, Any]] = {section: {} for section in classes}
    seen: set[tuple[str, str]] = set()
    for section, values in data.items():
        if section not in classes:
            issues.append(f"unknown section {section}{nearest(section, classes)}")
        elif not isinstance(values, Mapping):
            issues.append(f"section {section}: expected names and values, got {values!r}")
        else:
            hints = typing.get_type_hints(classes[section])
            for name, value in values.items():
                seen.add((section, name))
                if name not in hints:
                    issues.append(f"{section}.{name}: unknown name{nearest(name, hints)}")
                    continue
                try:
                    settings[section][name] = convert_value(value, hints[name])
                except ValueError as error:
                    issues.append(f"{section}.{name}: {error}")
    issues += [
        f"{section}.{field.name} is missing"
        for section, section_class in classes.items()
        for field in dataclasses.fields(section_class)
        if field.default is dataclasses.MISSING and (section, field.name) not in seen
    ]
    if issues:
        raise ConfigError(issues)
    return {section: section_class(**settings[section]) for section, section_class in classes.items()}


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader that also reads 1e-5 as a number and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"the key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file (empty file: no settings). Raises ConfigError that names the path."""
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, RecursionError) as error:
        raise ConfigError([f"{path} is not valid YAML: {' '.join(str(error).split())}"]) from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError([f"{path}: expected names and values at the top level (NAME: VALUE)"])
    return data


def save_run_config(cfg: RunSettings, path: str | Path) -> None:
    """Write all settings to the YAML file `path`; `load_run_config` gives an equal object back."""
    _write_yaml(to_dict(cfg), Path(path))


def load_run_config(path: str | Path) -> RunSettings:
    """Settings that `save_run_config` wrote. Raises ConfigError that names the path and every problem."""
    with _naming(path):
        return from_dict(read_yaml(path))


def _write_yaml(data: Mapping[str, Any], path: Path) -> None:
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Name the file `path` in every problem with what it holds."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([f"{path}: {issue}" for issue in error.problems]) from None


# Checkpoints


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
    with _naming(path):
        dtype = _convert_dtype(data.pop("dtype", None))
        sections = _build_sections(data, _DESCRIPTION_SECTIONS)
        return _describe(**sections, tokenizer=tokenizer, dtype=dtype)


_DESCRIPTION_SECTIONS = {"model": ModelConfig, "exits": ExitConfig}


def _convert_dtype(value: Any) -> Dtype:
    try:
        return convert_value(value, Dtype)
    except ValueError as error:
        raise ConfigError([f"dtype: {error}"]) from None


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
    with _naming(path):
        return _describe(run.build.model, run.exits, tokenizer, run.training.dtype)


def save_description(description: ModelDescription, folder: Path) -> None:
    """Write what `read_description` reads from `folder`, but for the tokenizer."""
    sections = {section: _plain(getattr(description, section)) for section in _DESCRIPTION_SECTIONS}
    _write_yaml({**sections, "dtype": description.dtype}, folder / DESCRIPTION_FILE)


def saved_tokenizer(folder: str | Path) -> TokenizerConfig:
    """Settings of the tokenizer that `data.tokenizer.save_tokenizer` wrote into `folder`.

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


def overlay_architecture(cfg: RunSettings, present: ModelDescription, given: Collection[str] = ()) -> RunSettings:
    """`cfg` with the checkpoint's model and exits (--use-checkpoint-args).

    given: names of the fields that the user set. These win only where the checkpoint's weights do not depend on them:
    dropout and the like (FREE_MODEL_FIELDS), loss weights and their schedule, and the tokenizer."""
    is_rope = present.model.position_embedding_type == "rope"
    free = FREE_MODEL_FIELDS | ({"max_position_embeddings"} if is_rope else set())
    model = dataclasses.replace(present.model, **{name: getattr(cfg.model, name) for name in free if name in given})

    weight_fields = [field.name for field in dataclasses.fields(cfg.exits) if field.name not in EXIT_STRUCTURE_FIELDS]
    own = [name for name in weight_fields if name in given and name != "exit_layer_temperature"]
    exits = dataclasses.replace(present.exits, **{name: getattr(cfg.exits, name) for name in own})

    tokenizer = {name: value for name, value in vars(present.tokenizer).items() if name not in given}
    return dataclasses.replace(cfg, model=model, exits=exits, data=dataclasses.replace(cfg.data, **tokenizer))
