"""The flags of `tools/plan_pipeline.py`, beside those of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron.early_exit.platform.program_flags import Parser, Spelling, parser_of
from megatron.early_exit.schedules.cases import CASES
from megatron.early_exit.schedules.cost_model import GPUS, Assumptions


@dataclass(frozen=True, kw_only=True)
class SubjectFlags:
    """what"""

    case: Annotated[str, "NAME", Spelling(help=f"{', '.join(CASES)}; flags of training win over it")] | None = None
    gpu: Annotated[str, "NAME", Spelling(help=f"{', '.join(GPUS)}; default: the case's, or H100-80GB")] | None = None

    world_size: Annotated[int, "N"] | None = None
    """GPUs; default: the case's, or one replica"""

    layers_per_stage: Annotated[tuple[int, ...], "N"] | None = None
    """default: as the flags of training split them"""

    costs: Annotated[Path, "FILE"] | None = None
    """costs of all stages instead of a model, as --costs-output has them"""

    num_microbatches: Annotated[int, "N"] | None = None
    """of an iteration; default: from the batch"""

    num_fill_warmup_microbatches: Annotated[int, "N"] | None = None
    """further microbatches in the bubbles of the warmup; default: as many as cost no time"""

    num_fill_cooldown_microbatches: Annotated[int, "N"] | None = None
    """further microbatches in the bubbles of the cooldown; default: as many as cost no time"""

    choose: bool = False
    """choose exits' side, layers per stage and fill, and say why"""

    matmul_efficiency: Annotated[float, "F"] = Assumptions.matmul_efficiency
    """share of the data sheet that is reached; default 0.6"""

    memory_efficiency: Annotated[float, "F"] = Assumptions.memory_efficiency
    """share of the data sheet that is reached; default 0.8"""

    link_efficiency: Annotated[float, "F"] = Assumptions.link_efficiency
    """share of the data sheet that is reached; default 0.8"""


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """output"""

    output: Annotated[tuple[Path, ...], "FILE"] = ()
    """picture: .png, .svg, .pdf"""

    draw_microbatches: Annotated[int, "N"] = 8
    """of the batch, in the picture; default 8"""

    plan_output: Annotated[Path, "FILE"] | None = None
    """text of the plan that --plan says"""

    plan: Literal["plain", "backward", "idle", "filled"] | None = None
    """default: the last of the table"""

    costs_output: Annotated[Path, "FILE"] | None = None
    """costs of all stages as JSON"""


@dataclass(frozen=True, kw_only=True)
class PlanFlags(SubjectFlags, OutputFlags):
    """Simulate one training iteration of a pipeline with early exits: with the exits in the backward, in idle time, and
    with bubbles filled, against plain GPT. The model is a named case, flags of training (docs/flags.md; those for data
    and learning rate can be left out), or measured costs. No GPU is needed."""


def build_parser() -> Parser:
    return parser_of(
        PlanFlags,
        "plan_pipeline.py",
        usage="plan_pipeline.py [--case NAME] [FLAGS OF TRAINING] [--gpu NAME] [--world-size N] [--output FILE ...]",
        allow_abbrev=False,
    )
