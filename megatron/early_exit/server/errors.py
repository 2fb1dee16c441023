"""What a request is told when it cannot be served. Each API writes these errors in its own form."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

_MEGATRON_PATHS = ("/api",)


class ApiError(Exception):
    """An answer to a request that is no success."""

    status = 500
    kind = "server_error"
    """OpenAI's `type`."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        """param: the field of the request that is at fault. code: OpenAI's. retry_after: seconds, for the header."""
        super().__init__(message)
        self.message, self.param, self.code, self.retry_after = message, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


class BadRequest(ApiError):
    """The request is at fault, and its message says how."""

    status, kind = 400, "invalid_request_error"


class Unauthorized(ApiError):
    """The key is missing or wrong."""

    status, kind = 401, "authentication_error"


class Forbidden(ApiError):
    """A web page of somebody else sent it."""

    status, kind = 403, "permission_error"


class NotFound(ApiError):
    """There is no such thing, a model of another name for instance."""

    status, kind = 404, "not_found_error"


class TooLate(ApiError):
    """The headers or the body of a request have not come in time."""

    status, kind = 408, "invalid_request_error"


class BodyTooLarge(ApiError):
    """The body of a request is larger than the server takes."""

    status, kind = 413, "invalid_request_error"


class NoJson(ApiError):
    """The body of a request is said to be something else than JSON."""

    status, kind = 415, "invalid_request_error"


class Overloaded(ApiError):
    """Too many requests wait."""

    status, kind = 429, "rate_limit_error"


class NotReady(ApiError):
    """The model is being loaded, the engine has ended, or the server is about to end."""

    status, kind = 503, "service_unavailable_error"


class EngineFailed(ApiError):
    """An answer ended with an error of the engine."""

    status, kind = 500, "server_error"


def error_response(path: str, error: ApiError) -> JSONResponse:
    """An error in the form of the API that a path belongs to."""
    return JSONResponse(error_body(path, error), error.status, error.headers)


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """The JSON of `error_response`."""
    if path.rstrip("/") in _MEGATRON_PATHS:
        return {"message": error.message}
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}
