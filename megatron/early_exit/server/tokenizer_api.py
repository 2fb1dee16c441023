"""The tokenizer over HTTP, in vLLM's form: `/tokenize`, `/detokenize`, `/tokenizer_info`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from megatron.early_exit.inference.params import check_ids
from megatron.early_exit.inference.text_engine import TextEngine
from megatron.early_exit.server.chat_messages import Messages, NoTemplate, prompt_of
from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.errors import BadRequest
from megatron.early_exit.server.loaded_model import PromptMaker
from megatron.early_exit.server.openai_api.answers import check_model, refusals
from megatron.early_exit.server.openai_api.errors import ERROR_RESPONSES
from megatron.early_exit.server.request_fields import NEUTRAL, Ids, NoFields, RequestBody


class TokenizeRequest(RequestBody):
    """A text, or a conversation: one of them."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Of a text: whether it begins as the tokenizer lets every text do; default true. The chat template writes all
    special tokens itself."""
    return_token_strs: bool | None = None
    """Say what each token is."""
    add_generation_prompt: Annotated[Literal[True] | None, NEUTRAL] = None
    continue_final_message: Annotated[Literal[False] | None, NEUTRAL] = None
    chat_template: NoTemplate = None
    chat_template_kwargs: Annotated[NoFields | None, NEUTRAL] = None


class Tokens(BaseModel):
    """Ids of a text."""

    count: int
    max_model_len: int
    """Longest prompt, in tokens."""
    tokens: list[int]
    token_strs: list[str] | None = None
    """Special tokens by their names; bytes that are no whole characters as `bytes:\\xe2`."""


class DetokenizeRequest(RequestBody):
    """Ids."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    tokens: Ids


class DetokenizedText(BaseModel):
    """The text of ids; special tokens leave none."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What clients that tokenize themselves need to know."""

    vocab_size: int
    """Number of ids, special ones included."""
    model_max_length: int
    """Longest prompt, in tokens."""
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str
    eos_token_id: int
    end_token_ids: list[int]
    """Ids that end an answer."""
    chat_template: str | None
    """Of conversations: the server's, else the tokenizer's."""


def router(context: ServerContext) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["tokenizer"], responses=ERROR_RESPONSES)

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """Ids of a text, or of the prompt that a conversation becomes."""
        check_model(context, body.model)
        model = context.ready_model()
        make = _prompt_maker(context, body, model.text_engine)
        with refusals("prompt" if body.messages is None else "messages"):
            ids = await asyncio.to_thread(make, model.tokenizer)
        texts = model.token_texts
        return Tokens(
            count=len(ids),
            max_model_len=model.ready.description.num_positions,
            tokens=ids,
            token_strs=[texts[token].text for token in ids] if body.return_token_strs else None,
        )

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizedText:
        """The text of ids."""
        check_model(context, body.model)
        tokenizer = context.ready_model().tokenizer
        with refusals("tokens"):
            check_ids("tokens", body.tokens, tokenizer.vocab_size)
        return DetokenizedText(prompt=await asyncio.to_thread(tokenizer.detokenize, body.tokens))

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """What tokenizer it is."""
        model = context.ready_model()
        tokenizer = model.tokenizer
        spelling = tokenizer.library.spelling
        return TokenizerInfo(
            vocab_size=tokenizer.vocab_size,
            model_max_length=model.ready.description.num_positions,
            bos_token=None if tokenizer.bos is None else spelling(tokenizer.bos),
            bos_token_id=tokenizer.bos,
            eos_token=spelling(tokenizer.eod),
            eos_token_id=tokenizer.eod,
            end_token_ids=sorted(tokenizer.ends),
            chat_template=context.config.chat_template or tokenizer.chat_template,
        )

    return routes


def _prompt_maker(context: ServerContext, body: TokenizeRequest, text_engine: TextEngine) -> PromptMaker:
    """What makes the ids. Raises BadRequest unless there is one thing to make them of."""
    prompt, messages = body.prompt, body.messages
    if prompt is not None and messages is None:
        return lambda _: text_engine.encode(prompt, body.add_special_tokens is not False)
    if messages is None or prompt is not None:
        raise BadRequest("give prompt or messages, one of them", param="prompt")
    if body.add_special_tokens:
        message = "add_special_tokens has no effect on messages: the chat template writes special tokens itself"
        raise BadRequest(message, param="add_special_tokens")
    return prompt_of(context, messages)
