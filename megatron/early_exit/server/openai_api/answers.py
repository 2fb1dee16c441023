"""From a request to its answers: the checks in front of the engine, whose words become those of the API, and answers
as a whole or as a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel

from megatron.early_exit.inference.params import GenerationParams, PromptTooLong
from megatron.early_exit.inference.text_engine import OutputDelta, Prompt, RequestOutput
from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.errors import ApiError, BadRequest, EngineFailed, NotFound
from megatron.early_exit.server.loaded_model import PromptMaker
from megatron.early_exit.server.mailbox import Answers, finished
from megatron.early_exit.server.openai_api.errors import error_document
from megatron.early_exit.server.responses import EventStream, unless_disconnected

log = logging.getLogger(__name__)

_DONE = b"data: [DONE]\n\n"

_FIELDS = {
    "stop_tokens": "stop_token_ids", "a stop string": "stop", "the stop string": "stop",
    "an exit threshold": "exit_thresholds", "certified:": "exit_thresholds", "a certified level": "exit_thresholds",
    "exit_thresholds": "exit_thresholds", "exit_layers": "exit_layers",
    "early exit": "mode", "mode": "mode", "draft_exit": "draft_exit",
    "draft_source": "draft_source", "draft_min_confidence": "draft_min_confidence", "plan_exits": "plan_exits",
    "exit_score": "exit_score",
    "speculation": "speculation", "n is": "n", "the request asks": "n", "logit_bias": "logit_bias",
    "an id of logit_bias": "logit_bias", "min_tokens": "min_tokens", "max_tokens": "max_tokens",
    "temperature": "temperature",
}  # fmt: skip
"""How messages of the engine begin, and the field that they are about; all others are about the prompt."""


def check_model(context: ServerContext, name: str | None) -> None:
    """Raises NotFound unless this model is served; a request that names none means it."""
    if name and name != context.model_name:
        # The name is the client's: whatever it is, the message can be written.
        raise NotFound(
            f"the model {name!a} does not exist; this server has {context.model_name!r}",
            param="model", code="model_not_found",
        )  # fmt: skip


@contextmanager
def refusals(prompt_field: str) -> Iterator[None]:
    """Make what the engine refuses a BadRequest that names the field."""
    try:
        yield
    except PromptTooLong as error:
        raise BadRequest(str(error), param=prompt_field, code="context_length_exceeded") from error
    except ValueError as error:
        message = str(error)
        beginning = next((words for words in _FIELDS if message.startswith(words)), None)
        field = prompt_field if beginning is None else _FIELDS[beginning]
        if beginning == "stop_tokens":
            message = message.replace(beginning, field, 1)
        raise BadRequest(message, param=field) from error


async def start_answers(
    context: ServerContext,
    prompts: Sequence[Prompt | PromptMaker],
    params: Sequence[GenerationParams],
    prompt_field: str,
    must_fit: bool,
) -> Answers:
    """Queue the answers. Raises ApiError, BadRequest for what the engine refuses."""
    context.ready_model()
    with refusals(prompt_field):
        return await context.engine.answer(prompts, params, must_fit=must_fit)


@contextmanager
def closing_on_error(answers: Answers) -> Iterator[None]:
    """Cancel the answers if what is to be done with them fails, or its client has gone."""
    try:
        yield
    except BaseException:
        answers.close()
        raise


def success(document: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For the schema of a route whose answer may be streamed. chunk: what the data of an event are."""
    events = {"schema": {"type": "string", "description": f"Events whose data are `{chunk.__name__}`, then `[DONE]`."}}
    return {200: {"model": document, "content": {"text/event-stream": events}}}


async def respond(
    context: ServerContext, request: Request, answers: Answers, writer: ChunkWriter, is_streamed: bool | None
) -> Response:
    """The answers as a whole or as they grow. Raises ClientGone if nobody waits for the whole."""
    if is_streamed:
        return EventStream(_AnswerEvents(answers, writer))
    outputs = await unless_disconnected(request, answers.whole())
    document = await asyncio.to_thread(writer.whole, outputs)
    return Response(document.model_dump_json(exclude_unset=True), media_type="application/json")


class ChunkWriter(Protocol):
    """Writes answers in one of the API's forms."""

    def whole(self, outputs: Sequence[RequestOutput]) -> BaseModel:
        """All answers, when they have ended."""

    def first(self) -> Sequence[BaseModel]:
        """Before there are tokens."""

    def chunks(self, delta: OutputDelta) -> Sequence[BaseModel]:
        """What is new of one answer."""

    def last(self, outputs: Sequence[RequestOutput]) -> Sequence[BaseModel]:
        """When all answers have ended."""


class _AnswerEvents:
    """Events of answers. The answers are closed with it, also if nobody has asked for the first event."""

    def __init__(self, answers: Answers, writer: ChunkWriter) -> None:
        self._answers, self._events = answers, _events(answers, writer)

    def __aiter__(self) -> _AnswerEvents:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._events)

    async def aclose(self) -> None:
        await self._events.aclose()
        self._answers.close()


async def _events(answers: Answers, writer: ChunkWriter) -> AsyncGenerator[bytes, None]:
    """One for each step, with the chunks of all answers that have grown."""
    outputs: list[RequestOutput] = []
    try:
        if first := writer.first():
            yield _written(first)
        async for deltas in answers:
            outputs += finished(deltas)
            if chunks := [chunk for delta in deltas for chunk in writer.chunks(delta)]:
                yield _written(chunks)
        yield _written(writer.last(outputs)) + _DONE
    except ApiError as error:
        yield _written([error_document(error)])
    except Exception as error:
        log.exception("a stream failed")
        yield _written([error_document(EngineFailed(f"the answer could not be written ({type(error).__name__})"))])


def _written(documents: Sequence[BaseModel]) -> bytes:
    return b"".join(b"data: %b\n\n" % one.model_dump_json(exclude_unset=True).encode() for one in documents)
