"""Configuration as plain data: dictionaries, the `run_config.yaml` beside a checkpoint, and what a load takes from it.

Values are checked for type and names for existence here, for YAML and flags alike; whether the settings fit together is
`validate.py`'s question.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.validate import LATEST_FILE, ConfigError

RUN_CONFIG_FILE = "run_config.yaml"

# Model fields that a checkpoint's weights do not depend on: they may differ from run to run.
FREE_MODEL_FIELDS = frozenset(
    {
        "hidden_dropout",
        "attention_dropout",
        "init_method_std",
        "apply_query_key_layer_scaling",
        "make_vocab_size_divisible_by",
        "transformer_impl",
    }
)

# Exit fields that decide which parameters exist and what they compute.
EXIT_STRUCTURE_FIELDS = (
    "exit_layer_nums",
    "pre_exit",
    "untie_exit_output_weights",
    "use_exit_norm",
    "use_exit_mlp",
    "use_exit_block",
)

ROTARY_FIELDS = (
    "rotary_base",
    "rotary_percent",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
)

TOKENIZER_FIELDS = ("tokenizer_type", "tokenizer_model", "vocab_size")


@dataclass(frozen=True)
class FieldInfo:
    """One field of one section of RunConfig."""

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
    """RunConfig's sections by name, in order."""
    return dict(typing.get_type_hints(RunConfig))


@functools.cache
def config_fields() -> tuple[FieldInfo, ...]:
    """All fields of all sections, in order. Field names are unique over sections."""
    return tuple(
        FieldInfo(section, field.name, hints[field.name], field.default)
        for section, section_class in section_classes().items()
        for hints in [typing.get_type_hints(section_class)]
        for field in dataclasses.fields(section_class)
    )


def build_run_config(settings: Mapping[str, Any]) -> RunConfig:
    """RunConfig from values by field name; what is not in `settings` takes its default."""
    names = {
        section: [field.name for field in dataclasses.fields(section_class)]
        for section, section_class in section_classes().items()
    }
    sections = {
        section: section_class(**{name: settings[name] for name in names[section] if name in settings})
        for section, section_class in section_classes().items()
    }
    return RunConfig(**sections)


# Types


def optional_type(annotation: Any) -> tuple[Any, bool]:
    """(X, True) for `X | None`, (annotation, False) for anything else."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        inner = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
        return inner[0], True
    return annotation, False


def convert_value(value: Any, annotation: Any) -> Any:
    """`value`, as YAML gives it, as a value of type `annotation`.

    Integers pass as floats and lists become tuples; nothing else is converted. Raises ValueError with the reason."""
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


def to_dict(cfg: RunConfig) -> dict[str, dict[str, Any]]:
    """Sections of field values in YAML's types (tuples become lists)."""
    return {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        for section, values in dataclasses.asdict(cfg).items()
    }


def from_dict(data: Mapping[str, Any]) -> RunConfig:
    """The inverse of `to_dict`. Fields that are absent take their defaults.

    Raises ConfigError with all unknown names, wrong types and missing required fields."""
    fields = {(field.section, field.name): field for field in config_fields()}
    sections = list(section_classes())
    issues: list[str] = []
    settings: dict[str, Any] = {}
    seen: set[str] = set()
    for section, values in data.items():
        if section not in sections:
            issues.append(f"unknown section {section}{nearest(section, sections)}")
        elif not isinstance(values, Mapping):
            issues.append(f"section {section}: expected names and values, got {values!r}")
        else:
            for name, value in values.items():
                seen.add(name)
                field = fields.get((section, name))
                if field is None:
                    known = [other for owner, other in fields if owner == section]
                    issues.append(f"{section}.{name}: unknown name{nearest(name, known)}")
                    continue
                try:
                    settings[name] = convert_value(value, field.annotation)
                except ValueError as error:
                    issues.append(f"{section}.{name}: {error}")
    issues += [
        f"{section}.{name} is missing"
        for (section, name), field in fields.items()
        if field.is_required and name not in seen
    ]
    if issues:
        raise ConfigError(issues)
    return build_run_config(settings)


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
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError([f"{path} is not valid YAML: {' '.join(str(error).split())}"]) from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError([f"{path}: expected names and values at the top level (NAME: VALUE)"])
    return data


def save_run_config(cfg: RunConfig, path: str | Path) -> None:
    """Write all settings to the YAML file `path`; `load_run_config` gives an equal object back."""
    text = yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def load_run_config(path: str | Path) -> RunConfig:
    """Settings that `save_run_config` wrote. Raises ConfigError that names the path and every problem."""
    data = read_yaml(path)
    try:
        return from_dict(data)
    except ConfigError as error:
        raise ConfigError([f"{path}: {issue}" for issue in error.problems]) from None


# Checkpoints


def checkpoint_iteration(load: str | Path, load_iteration: int | None = None) -> int:
    """Iteration of the checkpoint to load from the folder `load`: the last finished one, or `load_iteration`.

    Raises ConfigError that names the missing or unreadable path."""
    if not Path(load).is_dir():
        raise ConfigError([f"--load {load}: no such folder"])
    if load_iteration:
        folder = iteration_folder(load, load_iteration)
        if not folder.is_dir():
            raise ConfigError([f"--load-iteration {load_iteration}: {folder} does not exist"])
        return load_iteration
    latest = Path(load) / LATEST_FILE
    try:
        text = latest.read_text(encoding="utf-8").strip()
    except OSError:
        raise ConfigError([f"--load {load}: no finished checkpoint in it ({latest} is missing)"]) from None
    if not text.isdecimal():
        raise ConfigError([f"--load {load}: {latest} should hold an iteration, it holds {text[:40]!r}"])
    return int(text)


def iteration_folder(load: str | Path, iteration: int) -> Path:
    """Folder of one checkpoint: `LOAD/iter_0000123`."""
    return Path(load) / f"iter_{iteration:07d}"


def checkpoint_run_config(load: str | Path, load_iteration: int | None = None) -> RunConfig:
    """The configuration that was saved with a checkpoint. Raises ConfigError that names the missing path."""
    path = iteration_folder(load, checkpoint_iteration(load, load_iteration)) / RUN_CONFIG_FILE
    if not path.is_file():
        raise ConfigError([f"--load {load}: the checkpoint has no configuration ({path} is missing)"])
    return load_run_config(path)


def max_positions(cfg: RunConfig) -> int:
    """Longest sequence that the model accepts, after defaults."""
    return cfg.model.max_position_embeddings or cfg.training.seq_length


def overlay_architecture(cfg: RunConfig, checkpoint_cfg: RunConfig, given: Collection[str] = ()) -> RunConfig:
    """`cfg` with the checkpoint's model and exits (--use-checkpoint-args).

    given: names of the fields that the user set. These win only where the checkpoint's weights do not depend on them:
    dropout and the like (FREE_MODEL_FIELDS), loss weights and their schedule, and the tokenizer."""
    free = FREE_MODEL_FIELDS | ({"max_position_embeddings"} if _is_rope(checkpoint_cfg) else set())
    model = dataclasses.replace(checkpoint_cfg.model, max_position_embeddings=max_positions(checkpoint_cfg))
    model = dataclasses.replace(model, **{name: getattr(cfg.model, name) for name in free if name in given})

    weight_fields = [field.name for field in dataclasses.fields(cfg.exits) if field.name not in EXIT_STRUCTURE_FIELDS]
    own = [name for name in weight_fields if name in given and name != "exit_layer_temperature"]
    exits = dataclasses.replace(checkpoint_cfg.exits, **{name: getattr(cfg.exits, name) for name in own})

    tokenizer = {name: getattr(checkpoint_cfg.data, name) for name in TOKENIZER_FIELDS if name not in given}
    return dataclasses.replace(cfg, model=model, exits=exits, data=dataclasses.replace(cfg.data, **tokenizer))


def architecture_differences(
    cfg: RunConfig, checkpoint_cfg: RunConfig, names: tuple[str, str] = ("flags", "checkpoint")
) -> list[str]:
    """Lines such as 'hidden_size: checkpoint 64, flags 128' for all that changes parameters or what they compute.

    names: what the lines call the two sides. Defaults are worked out first. The padded vocabulary is compared only if
    both sides state it."""
    flags, checkpoint = _architecture(cfg), _architecture(checkpoint_cfg)
    if flags["position_embedding_type"] == checkpoint["position_embedding_type"] == "rope":
        del flags["max_position_embeddings"]
    elif flags["position_embedding_type"] == checkpoint["position_embedding_type"]:
        for name in ROTARY_FIELDS:
            del flags[name]
    if flags["exit_layer_nums"] == checkpoint["exit_layer_nums"] == ():
        for name in EXIT_STRUCTURE_FIELDS:
            del flags[name]
    if flags["padded_vocab_size"] is None or checkpoint["padded_vocab_size"] is None:
        del flags["padded_vocab_size"]
    return [
        f"{name}: {names[1]} {_shown(checkpoint[name])}, {names[0]} {_shown(value)}"
        for name, value in flags.items()
        if value != checkpoint[name]
    ]


def _is_rope(cfg: RunConfig) -> bool:
    return cfg.model.position_embedding_type == "rope"


def _architecture(cfg: RunConfig) -> dict[str, Any]:
    """Structure of model and exits by field name, after defaults."""
    model = cfg.model
    values = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in FREE_MODEL_FIELDS | {"group_query_attention"}
    }
    values["ffn_hidden_size"] = model.ffn_size
    values["kv_channels"] = model.head_size
    values["num_query_groups"] = model.num_kv_heads
    values["max_position_embeddings"] = max_positions(cfg)
    values["add_qkv_bias"] = model.add_qkv_bias or model.add_bias_linear
    return values | {name: getattr(cfg.exits, name) for name in EXIT_STRUCTURE_FIELDS}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)
