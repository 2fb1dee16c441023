"""The engine of trees in which it schedules steps that an executor's workers run."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron.early_exit.config.serialize import checkpoint_folder
from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings  # noqa: F401


def load(
    folder: str, num_slots: int, num_positions: int, costs: dict[str, Any] | None
) -> tuple[Engine, Any, dict[str, Any]]:
    """(engine, tokenizer, its costs); costs: to plan with, default: measured"""
    llm = LLM.load(folder, max_requests=num_slots, max_length=num_positions)
    executor = llm.engine.executor
    used = executor.measure_costs() if costs is None else StepCosts(**costs)
    engine = Engine(executor, llm.exits, costs=used, **_calibration(checkpoint_folder(folder, None)))
    return engine, llm.tokenizer, asdict(used)


def _calibration(folder: Path) -> dict[str, Any]:
    """What planned exits need, as the tree takes it."""
    try:
        from megatron.early_exit.inference.calibration import ExitCalibration
    except ImportError:  # later trees take the scores alone
        with np.load(folder / "exit_calibration.npz") as arrays:
            scores = arrays["confidences"]
        takes_kinds = "Mapping" in str(inspect.signature(Engine.__init__).parameters["exit_scores"].annotation)
        return {"exit_scores": {"head": scores} if takes_kinds else scores}
    return {"calibration": ExitCalibration.load(folder)}
