"""The common base of request bodies: which types fields have, and how what is not supported is refused by name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core.core_schema import ValidatorFunctionWrapHandler


class RequestBody(BaseModel):
    """Fields are what they say: no text in place of a number, no number that is none, none that nobody knows. null is
    as good as leaving a field out."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class NoFields(RequestBody):
    """An empty object."""


def otherwise(words: str) -> WrapValidator:
    """One sentence for whatever is wrong with a field."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(words) from None

    return WrapValidator(check)


def first_given(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


NEUTRAL = otherwise("it is not supported; leave it out")
"""Of a field that is accepted only with the value that changes nothing."""

Nothing = Annotated[list[None], Field(max_length=0)]
"""An empty list."""

Id = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""Of a token; whether the vocabulary has it is checked against the model."""

Ids = Annotated[list[Id], Field(max_length=2**20, fail_fast=True)]
