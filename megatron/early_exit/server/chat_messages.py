"""Conversations in requests, and the prompts that the chat template makes of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron.early_exit.data.tokenizer import Tokenizer
from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.errors import BadRequest
from megatron.early_exit.server.loaded_model import PromptMaker
from megatron.early_exit.server.request_fields import NEUTRAL, Nothing, RequestBody, otherwise


class TextPart(RequestBody):
    """A part of what is said."""

    type: Literal["text"]
    text: str


class Message(RequestBody):
    """What one side says."""

    role: Annotated[str, Field(min_length=1, max_length=256)]
    """The chat template says which there are."""
    content: Annotated[
        str | Annotated[list[TextPart], Field(max_length=1024)] | None,
        otherwise("it must be a text, or a list of parts like {'type': 'text', 'text': ...}"),
    ] = None
    """Parts are joined by line ends."""
    name: str | None = None
    type: Annotated[Literal["text"] | None, NEUTRAL] = None
    refusal: Annotated[None, NEUTRAL] = None
    annotations: Annotated[Nothing | None, NEUTRAL] = None
    audio: Annotated[None, NEUTRAL] = None
    function_call: Annotated[None, NEUTRAL] = None
    tool_calls: Annotated[Nothing | None, NEUTRAL] = None
    tool_call_id: Annotated[None, NEUTRAL] = None
    reasoning_content: Annotated[None, NEUTRAL] = None

    def as_template_sees_it(self) -> dict[str, str]:
        """With the content as one text."""
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


NoTemplate = Annotated[
    None, otherwise("templates are not taken from requests; start the server with --chat-template FILE")
]  # fmt: skip
"""A template is a program."""

Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


def prompt_of(context: ServerContext, messages: list[Message]) -> PromptMaker:
    """What makes the ids that ask for the next answer; it takes a while. Raises BadRequest if there is no template."""
    template = context.config.chat_template or context.ready_model().tokenizer.chat_template
    if template is None:
        raise BadRequest(
            "the model's tokenizer has no chat template, so conversations cannot be written as prompts; start the "
            "server with --chat-template FILE, or use /v1/completions",
            param="messages",
        )
    conversation = [message.as_template_sees_it() for message in messages]

    def make(tokenizer: Tokenizer) -> list[int]:
        return tokenizer.chat(conversation, template=template)

    return make
