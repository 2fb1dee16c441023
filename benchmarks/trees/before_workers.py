"""The engine of trees in which it drives a whole-model decoder itself (up to commit a3850f7)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron.early_exit.config.serialize import checkpoint_folder
from megatron.early_exit.inference.calibration import ExitCalibration
from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.engine import Engine
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams  # noqa: F401
from megatron.early_exit.inference.sampling import SamplingSettings  # noqa: F401

_NEW_NAMES = {"ask_seconds": "approximate_seconds", "is_asking_cheap": "has_approximate_heads"}
"""Of costs."""


def load(
    folder: str, num_slots: int, num_positions: int, costs: dict[str, Any] | None
) -> tuple[Engine, Any, dict[str, Any]]:
    """(engine, tokenizer, its costs); costs: to plan with, default: measured"""
    llm = LLM.load(folder, max_requests=num_slots, max_length=num_positions)
    if costs is not None:
        costs = StepCosts(**{old: costs[_NEW_NAMES.get(old, old)] for old in StepCosts.__dataclass_fields__})
    engine = Engine(
        llm.engine.decoder, llm.exits, costs=costs, calibration=ExitCalibration.load(checkpoint_folder(folder, None))
    )  # fmt: skip
    used = asdict(engine._get_costs())
    return engine, llm.tokenizer, {_NEW_NAMES.get(old, old): value for old, value in used.items()}
