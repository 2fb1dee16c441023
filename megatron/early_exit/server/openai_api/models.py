"""`/v1/models`: what is served."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.openai_api.answers import check_model
from megatron.early_exit.server.openai_api.errors import ERROR_RESPONSES


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
    )
