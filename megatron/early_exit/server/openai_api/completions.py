"""`/v1/completions`: prompts continued."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Literal, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.text_engine import OutputDelta, Prompt, RequestOutput
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
from megatron.early_exit.server.openai_api.echo import Echo
from megatron.early_exit.server.openai_api.errors import ERROR_RESPONSES
from megatron.early_exit.server.openai_api.log_probs import CompletionLogProbs
from megatron.early_exit.server.openai_api.request import MAX_LOG_PROBS, AnswerRequest
from megatron.early_exit.server.openai_api.writer import AnswerWriter, Choice, Usage, UsageOfChunk, all_of
from megatron.early_exit.server.request_fields import NEUTRAL, Ids, Nothing, otherwise

_MAX_PROMPTS = 2048
_DEFAULT_MAX_TOKENS = 16

_Texts = Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True)]
_ManyIds = Annotated[list[Ids], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True)]


class CompletionRequest(AnswerRequest):
    """Prompts to continue."""

    prompt: Annotated[
        str | _Texts | Annotated[Ids, Field(min_length=1)] | _ManyIds,
        otherwise("it must be a text, a list of texts, a list of token ids, or a list of such lists, and not empty"),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Default 16, or what fits; 0 with echo alone. With a certified level: as its certificate says."""
    echo: bool | None = None
    """Begin the text with the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOG_PROBS)] | None = None
    """Log-probability of each token, and of so many of the most probable ones."""
    add_special_tokens: bool | None = None
    """Whether a prompt that is text begins as the tokenizer lets every text do; default true."""

    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: Annotated[Literal[""] | None, NEUTRAL] = None
    response_format: Annotated[None, NEUTRAL] = None
    prompt_embeds: Annotated[None, NEUTRAL] = None
    logits_processors: Annotated[Nothing | None, NEUTRAL] = None

    @property
    def prompts(self) -> list[Prompt]:
        """One or several."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts = [self.prompt] if is_one else self.prompt
        return cast("list[Prompt]", prompts)  # all in a list are of the type of the first

    def check_fields(self, limits: RequestLimits) -> None:
        """Raises BadRequest that names the field."""
        self.check(len(self.prompts), limits)
        if not all(self.prompts):
            raise BadRequest("prompt is empty; give at least one token (for instance an end of text)", param="prompt")
        if self.max_tokens == 0 and not self.echo:
            raise BadRequest("max_tokens is 0; without echo it must be at least 1", param="max_tokens")
        if self.best_of is not None and self.best_of != self.num_samples:
            raise BadRequest(
                f"best_of is {self.best_of} and n is {self.num_samples}; all answers are returned: best_of must "
                "be n or be left out",
                param="best_of",
            )

    def generation_params(self, defaults: GenerationParams, checks: RequestChecks) -> list[GenerationParams]:
        """Of each prompt. Raises ValueError."""
        params = self.params(
            defaults,
            checks,
            self.max_tokens,
            _DEFAULT_MAX_TOKENS,
            add_special_tokens=self.add_special_tokens is not False,
            log_probs=self.logprobs is not None,
            top_log_probs=self.logprobs or 0,
            echo=bool(self.echo) and (self.logprobs is not None or self.max_tokens == 0),
        )
        return self.seeded(params, len(self.prompts))


class CompletionChoice(Choice):
    """An answer, or what is new of it."""

    text: str
    logprobs: CompletionLogProbs | None
    prompt_token_ids: list[int] | None = None


class Completion(BaseModel):
    """Answers, or what is new of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CompletionWriter(AnswerWriter[CompletionRequest]):
    """Writes the answers to one request, as a whole or in chunks."""

    def __init__(
        self,
        context: ServerContext,
        body: CompletionRequest,
        params: GenerationParams,
        answers: Answers,
        echo: Echo | None,
    ) -> None:
        super().__init__(context, body, params, answers, kind="cmpl")
        self._echo = echo
        self._log_prob_echo = None if body.logprobs is None else echo
        self._num_characters: dict[int, int] = {}
        """Of each choice, in what has been written."""

    def whole(self, outputs: Sequence[RequestOutput]) -> Completion:
        """All answers."""
        return self._document(
            [self._completion_choice(all_of(one)) for one in outputs], {"usage": self._usage(outputs)}
        )

    def first(self) -> list[Completion]:
        return []

    def chunks(self, delta: OutputDelta) -> list[Completion]:
        """What is new. The prompt's log-probabilities come with the end, and all that stands behind them."""
        if self._log_prob_echo is not None:
            if not delta.is_finished:
                return []
            delta = all_of(delta.output)
        return [self._document([self._completion_choice(delta)], self._no_usage)]

    def last(self, outputs: Sequence[RequestOutput]) -> list[Completion]:
        """The usage, if it is wanted."""
        return [self._document([], {"usage": self._usage(outputs)})] if self._body.wants_usage else []

    def _document(self, choices: list[CompletionChoice], usage: UsageOfChunk) -> Completion:
        return Completion(**self._head, object="text_completion", choices=choices, **usage)

    def _completion_choice(self, delta: OutputDelta) -> CompletionChoice:
        output, fields = delta.output, self._choice(delta)
        index = fields["index"]
        echoed = ""
        if self._begins(index):
            echoed = "" if self._echo is None else self._echo.texts[output.prompt_index]
            if self._body.return_token_ids:
                fields["prompt_token_ids"] = self._prompt_ids[output.prompt_index]
        offset = self._num_characters.get(index, 0) + len(echoed)
        self._num_characters[index] = offset + len(delta.text)
        log_probs = None if self._body.logprobs is None else self._written_log_probs(delta, offset)
        return CompletionChoice(**fields, text=echoed + delta.text, logprobs=log_probs)

    def _written_log_probs(self, delta: OutputDelta, offset: int) -> CompletionLogProbs:
        generated = self._log_probs.completion(delta.tokens, delta.pieces, offset)
        if self._log_prob_echo is None:
            return generated
        prompt = self._log_prob_echo.log_probs(delta.output, self._log_probs)
        names = CompletionLogProbs.model_fields
        return CompletionLogProbs(**{name: getattr(prompt, name) + getattr(generated, name) for name in names})


def router(context: ServerContext) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)

    @routes.post("/v1/completions", response_model=None, responses=success(Completion, Completion))
    async def complete(request: Request, body: CompletionRequest) -> Response:
        """Continue prompts."""
        check_model(context, body.model)
        body.check_fields(context.config.limits)
        with refusals("prompt"):
            params = body.generation_params(context.config.defaults, context.ready_model().client.checks)
        answers = await start_answers(context, body.prompts, params, "prompt", must_fit=body.max_tokens is not None)
        with closing_on_error(answers):
            echo = None
            if body.echo:
                tokenizer = context.ready_model().tokenizer
                echo = await asyncio.to_thread(Echo, tokenizer, body.prompts, answers.prompt_ids)
            writer = CompletionWriter(context, body, params[0], answers, echo)
            return await respond(context, request, answers, writer, body.stream)

    return routes
