"""The application: routes of all APIs, and how errors are written."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from megatron.early_exit import __version__
from megatron.early_exit.server import megatron_api, operation, page, tokenizer_api
from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.errors import ApiError, BadRequest, error_body, error_response
from megatron.early_exit.server.openai_api import routes as openai_api
from megatron.early_exit.server.responses import ClientGone


def build_app(context: ServerContext) -> FastAPI:
    """The application over an engine, which may still be loading."""
    app = _Application(title="Megatron Early Exit", version=__version__)
    app.exception_handler(ApiError)(_api_error)
    app.exception_handler(RequestValidationError)(_invalid_fields)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(ClientGone)(_client_gone)
    for api in (operation, openai_api, tokenizer_api, megatron_api, page):
        app.include_router(api.router(context))
    return app


class _Application(FastAPI):
    """FastAPI, with a schema without the status of invalid fields that it adds: they give 400 here."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = get_openapi(title=self.title, version=self.version, routes=self.routes)
            for operation_schema in (one for path in schema["paths"].values() for one in path.values()):
                operation_schema["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            self.openapi_schema = schema
        return self.openapi_schema


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return error_response(request.url.path, error)


async def _invalid_fields(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first field that is wrong, in words."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or None
    is_unknown = first["type"] == "extra_forbidden"
    message = "there is no such field" if is_unknown else first["msg"].removeprefix("Value error, ")
    return await _api_error(request, BadRequest(f"{field}: {message}" if field else message, param=field))


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Unknown paths and methods."""
    wrapped = ApiError(f"{error.detail}: {request.method} {request.url.path}")
    wrapped.kind = "invalid_request_error"
    return JSONResponse(error_body(request.url.path, wrapped), error.status_code, error.headers)


async def _client_gone(request: Request, error: ClientGone) -> Response:
    return Response(status_code=499)  # nobody reads it but the access log
