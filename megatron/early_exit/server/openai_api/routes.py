"""All routes of the OpenAI API."""

from __future__ import annotations

from fastapi import APIRouter

from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.openai_api import chat, completions, models


def router(context: ServerContext) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    for module in (models, completions, chat):
        routes.include_router(module.router(context))
    return routes
