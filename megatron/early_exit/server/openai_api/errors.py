"""Errors as OpenAI writes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from megatron.early_exit.server.errors import ApiError, error_body


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    """The field of the request that is at fault."""
    code: str | None = None


class ErrorDocument(BaseModel):
    """The body of an answer that is no success."""

    error: ErrorBody


def error_document(error: ApiError) -> ErrorDocument:
    """The body for an error."""
    return ErrorDocument.model_validate(error_body("", error))


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorDocument, "description": description}
    for status, description in {
        400: "The request is at fault; the message says how.",
        401: "The key is missing or wrong.",
        404: "There is no such model.",
        408: "The request did not come in time.",
        413: "The body is too large.",
        415: "The body is no JSON.",
        429: "Too many requests wait; try again after `Retry-After` seconds.",
        500: "The engine failed.",
        503: "The model is being loaded, or the server is about to end.",
    }.items()
}
"""For the schema of every route."""
