"""The common base of request bodies: which types fields have, and how what is not supported is refused by name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, WrapValidator
from pydantic_core.core_schema import ValidatorFunctionWrapHandler


class RequestBody(BaseModel):
    """Fields are what they say: no text in place of a number, no number that is none, none that nobody knows. null is
    as good as leaving a field out."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def in_words(words: str) -> WrapValidator:
    """One sentence for whatever is wrong with a field of several types."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"it must be {words}") from None

    return WrapValidator(check)


def _refuse(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(f"{info.field_name} is not supported; leave it out") from None


NEUTRAL = WrapValidator(_refuse)
"""Of a field that is accepted only with the value that changes nothing."""

Nothing = Annotated[list[None], Field(max_length=0)]
"""An empty list."""

Id = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""Of a token; whether the vocabulary has it is checked against the model."""

Ids = Annotated[list[Id], Field(max_length=2**20)]
