"""`/v1/chat/completions`: conversations continued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypedDict

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.text_engine import OutputDelta, RequestOutput
from megatron.early_exit.server.chat_messages import Messages, NoTemplate, prompt_of
from megatron.early_exit.server.config import RequestLimits
from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.errors import BadRequest
from megatron.early_exit.server.mailbox import Answers
from megatron.early_exit.server.openai_api.answers import (
    check_model,
    closing_on_error,
    refusals,
    respond,
    start_answers,
    success,
)
from megatron.early_exit.server.openai_api.errors import ERROR_RESPONSES
from megatron.early_exit.server.openai_api.log_probs import ChatLogProbs
from megatron.early_exit.server.openai_api.request import MAX_LOG_PROBS, AnswerRequest
from megatron.early_exit.server.openai_api.writer import AnswerWriter, Choice, Usage, all_of
from megatron.early_exit.server.request_fields import NEUTRAL, NoFields, Nothing, RequestBody

_MOST_TOKENS = 2**31 - 1


class TextFormat(RequestBody):
    """The only form of an answer."""

    type: Literal["text"]


class ChatRequest(AnswerRequest):
    """A conversation to continue."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Default: what fits."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """The same by its old name."""
    logprobs: bool | None = None
    """Log-probability of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOG_PROBS)] | None = None
    """With logprobs: of so many of the most probable tokens as well."""

    metadata: dict[str, str] | None = None
    store: Annotated[Literal[False] | None, NEUTRAL] = None
    service_tier: Annotated[Literal["auto", "default"] | None, NEUTRAL] = None
    response_format: Annotated[TextFormat | None, NEUTRAL] = None
    modalities: Annotated[list[Literal["text"]] | None, NEUTRAL] = None
    audio: Annotated[None, NEUTRAL] = None
    prediction: Annotated[None, NEUTRAL] = None
    reasoning_effort: Annotated[None, NEUTRAL] = None
    verbosity: Annotated[None, NEUTRAL] = None
    web_search_options: Annotated[None, NEUTRAL] = None
    tools: Annotated[Nothing | None, NEUTRAL] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, NEUTRAL] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Nothing | None, NEUTRAL] = None
    function_call: Annotated[Literal["none", "auto"] | None, NEUTRAL] = None
    best_of: Annotated[Literal[1] | None, NEUTRAL] = None
    echo: Annotated[Literal[False] | None, NEUTRAL] = None
    add_special_tokens: Annotated[Literal[False] | None, NEUTRAL] = None
    add_generation_prompt: Annotated[Literal[True] | None, NEUTRAL] = None
    continue_final_message: Annotated[Literal[False] | None, NEUTRAL] = None
    separate_reasoning: bool | None = None  # vllm-router adds these three; no answer has a part for reasoning
    stream_reasoning: bool | None = None
    include_reasoning: bool | None = None
    documents: Annotated[Nothing | None, NEUTRAL] = None
    chat_template: NoTemplate = None
    chat_template_kwargs: Annotated[NoFields | None, NEUTRAL] = None

    @property
    def max_new_tokens(self) -> int | None:
        """By its new name or its old one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check_fields(self, limits: RequestLimits) -> None:
        """Raises BadRequest that names the field."""
        self.check(1, limits)
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs is given, but logprobs is not true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise BadRequest(
                f"max_tokens is {self.max_tokens} and max_completion_tokens is {self.max_completion_tokens}; they mean "
                "the same, give one",
                param="max_tokens",
            )

    def generation_params(self, defaults: GenerationParams, checks: RequestChecks) -> GenerationParams:
        """Of the one prompt. Raises ValueError."""
        top_log_probs = self.top_logprobs or 0
        return self.params(
            defaults, checks, self.max_new_tokens, _MOST_TOKENS,
            log_probs=bool(self.logprobs), top_log_probs=top_log_probs,
        )  # fmt: skip


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Choice):
    """An answer."""

    message: AnswerMessage
    logprobs: ChatLogProbs | None


class ChatCompletion(BaseModel):
    """Answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class MessageDelta(BaseModel):
    """What is new of what the model says."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Choice):
    """What is new of an answer."""

    delta: MessageDelta
    logprobs: ChatLogProbs | None


class ChatCompletionChunk(BaseModel):
    """What is new of the answers."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class _PromptField(TypedDict, total=False):
    """The field of documents that is there only if it is asked for."""

    prompt_token_ids: list[int]


class ChatWriter(AnswerWriter[ChatRequest]):
    """Writes the answers to one request, as a whole or in chunks."""

    def __init__(self, context: ServerContext, body: ChatRequest, params: GenerationParams, answers: Answers) -> None:
        super().__init__(context, body, params, answers, kind="chatcmpl")

    def whole(self, outputs: Sequence[RequestOutput]) -> ChatCompletion:
        """All answers."""
        choices = [
            ChatChoice(
                **self._choice(delta),
                message=AnswerMessage(role="assistant", content=delta.text, refusal=None),
                logprobs=self._written_log_probs(delta),
            )
            for delta in map(all_of, outputs)
        ]
        return ChatCompletion(
            **self._head, object="chat.completion", choices=choices, usage=self._usage(outputs), **self._prompt
        )

    def first(self) -> list[ChatCompletionChunk]:
        """Who speaks, in every answer."""
        choices = [
            ChatChunkChoice(
                index=index, delta=MessageDelta(role="assistant", content=""), logprobs=None, finish_reason=None,
                stop_reason=None, exit_layers=[],
            )
            for index in range(self._body.num_samples)
        ]  # fmt: skip
        return [self._chunk(choices, **self._no_usage, **self._prompt)]

    def chunks(self, delta: OutputDelta) -> list[ChatCompletionChunk]:
        """What is new."""
        choice = ChatChunkChoice(
            **self._choice(delta),
            delta=MessageDelta(content=delta.text) if delta.tokens else MessageDelta(),
            logprobs=self._written_log_probs(delta),
        )
        return [self._chunk([choice], **self._no_usage)]

    def last(self, outputs: Sequence[RequestOutput]) -> list[ChatCompletionChunk]:
        """The usage, if it is wanted."""
        return [self._chunk([], usage=self._usage(outputs))] if self._body.wants_usage else []

    def _chunk(self, choices: list[ChatChunkChoice], **more: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=choices, **more)

    @property
    def _prompt(self) -> _PromptField:
        return {"prompt_token_ids": self._prompt_ids[0]} if self._body.return_token_ids else {}

    def _written_log_probs(self, delta: OutputDelta) -> ChatLogProbs | None:
        if not self._body.logprobs:
            return None
        return self._log_probs.chat(delta.tokens, self._body.top_logprobs or 0)


def router(context: ServerContext) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)

    @routes.post("/v1/chat/completions", response_model=None, responses=success(ChatCompletion, ChatCompletionChunk))
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Continue a conversation."""
        check_model(context, body.model)
        body.check_fields(context.config.limits)
        with refusals("messages"):
            params = body.generation_params(context.config.defaults, context.ready_model().client.checks)
        prompt = prompt_of(context, body.messages)
        must_fit = body.max_new_tokens is not None
        answers = await start_answers(context, [prompt], [params], "messages", must_fit=must_fit)
        with closing_on_error(answers):
            return await respond(context, request, answers, ChatWriter(context, body, params, answers), body.stream)

    return routes
