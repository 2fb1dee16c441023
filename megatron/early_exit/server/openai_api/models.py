"""`/v1/models`: what is served."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from megatron.early_exit.config.exits import ExitUse
from megatron.early_exit.inference.certificates import Certificate
from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.engine_messages import Ready
from megatron.early_exit.server.openai_api.answers import check_model
from megatron.early_exit.server.openai_api.errors import ERROR_RESPONSES

_Share = Literal["tokens", "answers", "ROUGE-L"]

_SHARES_OF_RISKS: dict[str, _Share] = {"A-max": "tokens", "B": "answers", "C": "ROUGE-L"}


class CertifiedLevel(BaseModel):
    """A promise, and the thresholds for which it holds."""

    level: float
    """At least this share is the full model's, averaged over prompts."""
    of: _Share
    """What the share is of: of the tokens along the full model's answer, of answers as a whole, or how much of the full
    model's words is there."""
    delta: float
    """The probability that so much is certified though it does not hold."""
    thresholds: dict[int, float]
    """By exit, by the number of its layer; the others are not taken."""
    max_tokens: int
    """Of the answers that were certified; requests must ask for that, or leave it out."""
    ignore_eos: bool
    """The same of their ends."""
    prompts: dict[str, int]
    """How many there were, by split."""
    calibration_risk: float | None
    """What was lost on the calibration's own prompts; 1 - level is what is promised."""
    is_certified_free_running: bool
    """Whether it also holds for what early exit itself has generated, as the audits of `/metrics` see it."""
    date: str


class Model(BaseModel):
    """The model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """When the server was started; seconds since 1970."""
    owned_by: str = "megatron-early-exit"
    root: str
    """Folder of the checkpoint."""
    max_model_len: int
    """Longest prompt, in tokens."""
    num_layers: int
    exit_layers: list[int]
    """Exits, by the numbers of their layers."""
    exit_uses: list[ExitUse]
    """What each of them is for: to give tokens (leave), to draft, or both."""
    certified: list[CertifiedLevel]
    """What `exit_thresholds` may name as certified:LEVEL."""


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[Model]


def router(context: ServerContext) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)

    @routes.get("/v1/models")
    async def list_models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[_model(context)])

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        """The model, if that is its name."""
        check_model(context, name)
        return _model(context)

    return routes


def _model(context: ServerContext) -> Model:
    ready = context.ready_model().ready
    return Model(
        id=context.model_name,
        created=int(context.started),
        root=ready.checkpoint,
        max_model_len=ready.description.num_positions,
        num_layers=ready.description.num_layers,
        exit_layers=[one.layer_number for one in ready.description.exits],
        exit_uses=[one.use for one in ready.description.exits],
        certified=certified_levels(ready),
    )


def certified_levels(ready: Ready) -> list[CertifiedLevel]:
    """What requests may ask for, ascending."""
    return [_level(one) for one in ready.certificates.certified]


def _level(certificate: Certificate) -> CertifiedLevel:
    free_running = certificate.free_running
    return CertifiedLevel(
        level=certificate.level,
        of=_SHARES_OF_RISKS[certificate.risk],
        delta=certificate.delta,
        thresholds=certificate.thresholds,
        max_tokens=certificate.answers.max_tokens,
        ignore_eos=certificate.answers.ignore_eod,
        prompts=certificate.num_prompts,
        calibration_risk=certificate.calibration_risk,
        is_certified_free_running=free_running is not None and free_running.is_certified,
        date=certificate.date,
    )
