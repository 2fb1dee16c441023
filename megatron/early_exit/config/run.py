"""Settings of one run that fit together."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.settings import RunSettings
from megatron.early_exit.config.validate import check


@dataclass(frozen=True)
class RunConfig(RunSettings):
    """Settings without contradictions, wherever they come from. Raises ConfigError with all of them.

    Whether they fit the number of ranks, and files, is checked when the run starts (`validate.validate`)."""

    def __post_init__(self) -> None:
        check(self)

    def resolved(self, vocab_size: int, present: ModelDescription | None = None) -> ResolvedConfig:
        """These settings with nothing left open. Arguments and errors as of `describe`."""
        sections = {section.name: getattr(self, section.name) for section in fields(self)}
        return ResolvedConfig(**{**sections, "model": self.describe(vocab_size, present).model})


@dataclass(frozen=True)
class ResolvedConfig(RunConfig):
    """Settings of a run whose model is known to the last number, as at its start-up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.description is not None  # raises ValueError for what is missing

    @property
    def description(self) -> ModelDescription:
        """The model of this run."""
        return ModelDescription(self.model, self.exits, self.data.tokenizer, self.training.dtype)
