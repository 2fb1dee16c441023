"""What completions and chat completions write alike."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Generic, TypedDict, TypeVar

from pydantic import BaseModel

from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.text_engine import OutputDelta, RequestOutput
from megatron.early_exit.server.answer_fields import OPENAI_FINISH_REASONS, OpenAIFinishReason
from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.early_exit_fields import EarlyExitUsage, TokenExit, early_exit_usage, exit_details
from megatron.early_exit.server.mailbox import Answers
from megatron.early_exit.server.openai_api.log_probs import LogProbWriter
from megatron.early_exit.server.openai_api.request import AnswerRequest

Body = TypeVar("Body", bound=AnswerRequest)


class Usage(BaseModel):
    """Numbers of tokens: each prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    early_exit: EarlyExitUsage


class Choice(BaseModel):
    """An answer, or what is new of it."""

    index: int
    """n times the number of the prompt, plus that of the answer to it."""
    finish_reason: OpenAIFinishReason | None
    stop_reason: int | str | None
    """The stop token or string that ended the answer."""
    exit_layers: list[int]
    """Of each token, the layer of the exit that gave it; the number of layers for the final head."""
    exit_details: list[TokenExit] | None = None
    token_ids: list[int] | None = None


class DocumentHead(TypedDict):
    """How every document about one request begins."""

    id: str
    created: int
    model: str


class UsageOfChunk(TypedDict, total=False):
    """The field `usage` of a chunk, which may be left out."""

    usage: Usage | None


class AnswerWriter(Generic[Body]):
    """Writes the answers to one request."""

    def __init__(
        self, context: ServerContext, body: Body, params: GenerationParams, answers: Answers, kind: str
    ) -> None:
        """params: of any of the answers. kind: how ids begin."""
        self._body, self._params, self._prompt_ids = body, params, answers.prompt_ids
        self._log_probs = LogProbWriter(context.ready_model().token_texts, bool(body.return_tokens_as_token_ids))
        self._head = DocumentHead(id=f"{kind}-{uuid.uuid4().hex}", created=int(time.time()), model=context.model_name)
        self._is_begun: set[int] = set()
        """Choices of which something has been written."""

    def _begins(self, index: int) -> bool:
        """Whether this is the first time that something is written of a choice."""
        is_first = index not in self._is_begun
        self._is_begun.add(index)
        return is_first

    def _choice(self, delta: OutputDelta) -> dict[str, Any]:
        """The fields of `Choice`."""
        output, body, tokens = delta.output, self._body, delta.tokens
        finish_reason, stop_reason = self._ending(output) if delta.is_finished else (None, None)
        fields: dict[str, Any] = {
            "index": output.prompt_index * body.num_samples + output.sample_index,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
            "exit_layers": [token.exit_layer for token in tokens],
        }
        if body.return_exit_details:
            fields["exit_details"] = exit_details(delta.pieces, tokens)
        if body.return_token_ids:
            fields["token_ids"] = [token.token for token in tokens]
        return fields

    def _ending(self, output: RequestOutput) -> tuple[OpenAIFinishReason, int | str | None]:
        """Why it has ended, and what stopped it."""
        result = output.check()
        reason = OPENAI_FINISH_REASONS[result.finish_reason]
        if result.finish_reason != "stop":
            return reason, None
        last = result.tokens[-1].token
        return reason, last if last in (self._body.stop_token_ids or ()) else output.stop_string

    @property
    def _no_usage(self) -> UsageOfChunk:
        """Of chunks: with `include_usage` all but the last have none."""
        return {"usage": None} if self._body.wants_usage else {}

    def _usage(self, outputs: Sequence[RequestOutput]) -> Usage:
        """Of all prompts and all their answers."""
        num_prompt = sum(map(len, self._prompt_ids))
        results = [output.check() for output in outputs]
        num_generated = sum(len(result.tokens) for result in results)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_generated,
            total_tokens=num_prompt + num_generated,
            early_exit=early_exit_usage(self._params, results),
        )


def all_of(output: RequestOutput) -> OutputDelta:
    """All of a finished output."""
    return OutputDelta(output, tuple(output.pieces), tuple(output.tokens), is_finished=True)
