"""What operates the server asks of it: whether it lives, whether it can serve, and how it is doing."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.errors import NotReady

LIVE_PATH = "/health/live"
HEALTH_PATHS = frozenset({"/health", "/health/ready", LIVE_PATH})
"""They need no key."""


class Health(BaseModel):
    """The answer of the routes for health."""

    status: str
    """live, ready or not ready"""
    reason: str | None = None
    """Why it is not ready."""


def router(context: ServerContext) -> APIRouter:
    """Routes for health and metrics."""
    routes = APIRouter(tags=["operation"])

    @routes.head(LIVE_PATH, include_in_schema=False)
    @routes.get(LIVE_PATH)
    async def live() -> Health:
        """200 while this process lives: a server that loads its model, or has lost its engine, must not be killed for
        that."""
        return Health(status="live")

    @routes.head("/health", include_in_schema=False)
    @routes.head("/health/ready", include_in_schema=False)
    @routes.get("/health", responses={503: {"model": Health}}, operation_id="health")
    @routes.get("/health/ready", responses={503: {"model": Health}})
    async def ready(response: Response) -> Health:
        """200 only if requests can be served; 503 while the model is loaded, when the engine has ended, and when the
        server is about to."""
        try:
            context.ready_model()
        except NotReady as error:
            response.status_code = error.status
            response.headers.update(error.headers)
            return Health(status="not ready", reason=error.message)
        return Health(status="ready")

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(context.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
