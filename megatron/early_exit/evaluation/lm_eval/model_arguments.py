"""The arguments of the model `early-exit` of lm-eval: `--model_args pretrained=CHECKPOINTS,mode=early_exit,...`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.early_exit.evaluation.lm_eval.modes import DecodingMode
from megatron.early_exit.inference import checked
from megatron.early_exit.inference.params import MODES, DraftSourceChoice, GenerationParams
from megatron.early_exit.platform.device import device

if TYPE_CHECKING:
    from megatron.early_exit.inference.engine_loading import LoadedEngine

MOST_POSITIONS = 8192
"""Longest sequence by default: of a model that takes longer ones, few slots would fit into memory."""

_OF_LM_EVAL = ("batch_size", "max_batch_size", "device", "trust_remote_code")
"""What users give to other models. The engine batches whatever runs, on the device that is there."""

_DTYPES: dict[str, str | None] = {"float32": "fp32", "bfloat16": "bf16", "auto": None}
"""Names that users of `hf` know."""


@dataclass(frozen=True)
class ModelArguments:
    """What to load and how to decode. Exits are named by their layer numbers, counted from 1."""

    pretrained: str
    """Folder of checkpoints (--save of the training)."""
    iteration: int | None = None
    """Default: the last one."""
    mode: str = "full"
    """How answers are decoded: full, early_exit or self_speculative. Words with a value are those of `DecodingMode`."""
    exit_thresholds: Any = None
    """early_exit: a number, numbers between slashes (0.9/0.8), or certified:0.99."""
    exit_layers: Any = None
    """early_exit: exits that may be evaluated; several between slashes."""
    exit_layer: int | None = None
    """The model ends behind this exit: its head gives all likelihoods and all tokens."""
    draft_source: DraftSourceChoice | None = None
    """exit, ngram or both."""
    draft_exit: int | None = None
    """self_speculative: the exit that drafts; default: the one that promises most."""
    draft_length: int | None = None
    """self_speculative: tokens of a draft; default: adapts."""
    dtype: str | None = None
    """fp32 or bf16, default that of the training."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_requests: int | None = None
    """Requests that run at once."""
    max_length: int | None = None
    """Longest sequence; default what the model takes, at most 8,192."""
    kv_cache_gib: float | None = None
    quantize: str | None = None
    add_bos_token: bool | None = None
    """Whether texts begin with the begin of text; default: as the tokenizer has it."""
    prefix_token_id: int | None = None
    """Stands before a text that has no context; default: the begin of text, else the end of text."""

    def __post_init__(self) -> None:
        for name in ("iteration", "exit_layer", "draft_exit", "draft_length", "max_length", "prefix_token_id"):
            if getattr(self, name) is not None:
                checked.integer(name, getattr(self, name))
        if self.add_bos_token is not None:
            checked.truth("add_bos_token", self.add_bos_token)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> ModelArguments:
        """Raises ValueError that names an argument that is missing, unknown, or says two things at once."""
        known = {one.name for one in fields(cls)}
        values = {name: value for name, value in given.items() if name not in _OF_LM_EVAL}
        for name in values.keys() - known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"the model early-exit has no argument {name!r}{hint} It has {', '.join(sorted(known))}")
        wanted = str(given.get("device") or device().type)
        if wanted.split(":")[0] != device().type:
            raise ValueError(f"device={wanted}, but this program computes on {device().type}; leave device out")
        if not values.get("pretrained"):
            raise ValueError("the model early-exit needs pretrained=DIR, a folder of checkpoints")
        return cls(**values)

    def decoding(self) -> DecodingMode:
        """Raises ValueError for settings that contradict each other or do nothing."""
        of_early_exit = {name: getattr(self, name) for name in ("exit_thresholds", "exit_layers")}
        of_drafts = {name: getattr(self, name) for name in ("draft_source", "draft_exit", "draft_length")}
        given = {name: value for name, value in (of_early_exit | of_drafts).items() if value is not None}
        if self.exit_layer is not None:
            self._refuse(given, f"exit_layer={self.exit_layer} lets that exit give every token")
            if self.mode != "full":
                raise ValueError(f"exit_layer={self.exit_layer} has a mode of its own; leave out mode={self.mode}")
            return DecodingMode.forced(f"exit:{self.exit_layer}", self.exit_layer)
        if self.mode not in MODES:  # words that say all
            self._refuse(given, f"mode={self.mode} has its settings behind the colon")
            return DecodingMode.parse(self.mode)
        useful = {"early_exit": of_early_exit, "self_speculative": of_drafts}.get(self.mode, {})
        self._refuse({name: value for name, value in given.items() if name not in useful}, f"the mode is {self.mode}")
        if self.mode == "early_exit":
            params = GenerationParams(
                mode="early_exit",
                exit_thresholds=_several(0.8 if self.exit_thresholds is None else self.exit_thresholds),
                exit_layers=_several(self.exit_layers or ()),
            )
        elif self.mode == "full":
            params = GenerationParams()
        else:
            params = GenerationParams(
                mode="self_speculative", draft_source=self.draft_source or "exit", draft_exit=self.draft_exit,
                draft_length=self.draft_length,
            )  # fmt: skip
        return DecodingMode(self.mode, params)

    def load(self) -> LoadedEngine:
        """Raises ValueError or OSError if there is no such checkpoint, or it cannot be loaded so."""
        from megatron.early_exit.inference.engine_loading import load_engine

        return load_engine(
            self.pretrained,
            iteration=self.iteration,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            dtype=None if self.dtype is None else _DTYPES.get(self.dtype, self.dtype),
            max_requests=self.max_requests,
            max_length=self.max_length or default_max_length(self.pretrained, self.iteration),
            kv_cache_gib=self.kv_cache_gib,
            quantize=self.quantize,
        )

    @staticmethod
    def _refuse(given: Mapping[str, Any], reason: str) -> None:
        for name, value in given.items():
            raise ValueError(f"{name}={value} has no effect here: {reason}")


def default_max_length(path: str | Path, iteration: int | None) -> int:
    """What the model takes, as in lm-eval's `hf`, but for very long sequences. Raises as `load_engine`."""
    from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
    from megatron.early_exit.config.saved_description import read_description

    longest = read_description(checkpoint_folder(str(path), iteration)).max_position_embeddings
    return min(longest, MOST_POSITIONS)


def _several(value: Any) -> Any:
    """Commas are between the arguments, so several values of one have slashes between them."""
    if isinstance(value, str) and not value.startswith("certified:"):
        try:
            return tuple(float(one) if "." in one else int(one) for one in value.split("/"))
        except ValueError:
            raise ValueError(f"{value!r} is no number, and no numbers between slashes") from None
    return value
