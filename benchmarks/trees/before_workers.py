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


def load(
    folder: str, num_slots: int, num_positions: int, costs: dict[str, Any] | None
) -> tuple[Engine, Any, dict[str, Any]]:
    """(engine, tokenizer, its costs); costs: to plan with, default: measured"""
    llm = LLM.load(folder, max_requests=num_slots, max_length=num_positions)
    engine = Engine(
        llm.engine.decoder, llm.exits, costs=None if costs is None else StepCosts(**costs),
        calibration=ExitCalibration.load(checkpoint_folder(folder, None)),
    )  # fmt: skip
    return engine, llm.tokenizer, asdict(engine._get_costs())
