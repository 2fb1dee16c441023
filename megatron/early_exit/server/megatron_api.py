"""Megatron's text-generation API with the fields of EE-LLM's server: PUT, or POST, /api.

The answer is whole, never streamed. Fields that are not known are ignored, as there, and named in the answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from megatron.early_exit.data.token_text import segments
from megatron.early_exit.data.tokenizer import Tokenizer
from megatron.early_exit.inference.certificates import Certificate
from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.params import (
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    CertifiedThresholds,
    GenerationParams,
    SamplingSettings,
)
from megatron.early_exit.inference.results import GeneratedToken, PromptToken, RequestResult
from megatron.early_exit.inference.text import pieces
from megatron.early_exit.inference.text_engine import RequestOutput, TextEngine
from megatron.early_exit.server.answer_fields import computed, finite
from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.early_exit_fields import LevelText, certified_or_full
from megatron.early_exit.server.errors import BadRequest
from megatron.early_exit.server.loaded_model import PromptMaker
from megatron.early_exit.server.request_fields import otherwise
from megatron.early_exit.server.responses import unless_disconnected

_RENAMED = {"max_len": "tokens_to_generate", "sentences": "prompts"}


class ErrorMessage(BaseModel):
    """Why a request was refused or has failed."""

    message: str


class GenerateRequest(BaseModel):
    """What is asked for. Without a temperature, answers are greedy."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    prompts: Annotated[
        list[str],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}),
    ] = Field(min_length=1)
    """One text, or several."""
    tokens_to_generate: int = Field(64, ge=0)
    """At most; 0: score the prompts, which implies logprobs and echo_prompts. With a certified level, left out: as its
    certificate says."""
    logprobs: bool = False
    echo_prompts: bool = False
    """Text, segments and logprobs begin with the prompt."""
    use_early_exit: bool | None = None
    """Not given: as the server's --mode says."""
    early_exit_thres: Annotated[
        float | LevelText | None, otherwise("it must be a number, or a level as certified:0.99")
    ] = None
    """Take an exit from this largest probability on. Above 1: never; 0 and less: always. Or a certified level, as in
    certified:0.99. Not given: the server's."""
    exit_layers: list[int] = []
    """Exits to evaluate; none: all."""
    print_max_prob: bool = False
    """Report what every evaluated head predicts."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    top_p_decay: float = 0.0
    top_p_bound: float = 0.0
    random_seed: int = Field(1234, ge=-(2**63), lt=2**63)
    add_BOS: bool = False
    """Begin prompts with the begin of text (else the end of document) where the tokenizer does not."""
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]] | None = Field(
        None, max_length=MAX_STOP_STRINGS
    )
    """The text ends before the first of these."""
    stop_on_eol: bool = False
    stop_on_double_eol: bool = False
    prevent_newline_after_colon: bool = False
    """Not served: true is refused."""
    beam_width: int | None = Field(None, ge=1)
    """Not served: more than 1 is refused."""
    length_penalty: float = 1.0
    """Of beams."""
    no_log: bool = False
    """Has no effect: the server never logs what prompts say."""

    @model_validator(mode="after")
    def _refuse(self) -> GenerateRequest:
        for old, new in _RENAMED.items():
            if old in (self.model_extra or ()):
                raise ValueError(f"{old} is no longer used; give {new}")
        if self.beam_width is not None and self.beam_width > 1:
            raise ValueError(
                f"beam_width is {self.beam_width}, and beams are not served, as each needs the whole engine; use "
                "beam_search (docs/generation.md) without a server, or leave the field out"
            )
        if self.prevent_newline_after_colon:
            raise ValueError(
                "prevent_newline_after_colon is not served; leave it out, or forbid newlines altogether with "
                "logit_bias at /v1/completions"
            )
        if "" in self.prompts and not self.add_BOS:
            raise ValueError("prompts holds an empty text; that needs add_BOS")
        return self


class Prediction(BaseModel):
    """What a head predicts for a token."""

    exit_layer: int | None
    """Layer that names the exit; null for the final head."""
    token: str
    """The most probable one."""
    prob: float


class GenerateResponse(BaseModel):
    """The answers, in the order of the prompts. Where both are given, lists hold an entry for each token."""

    text: list[str]
    """Of the generated ids alone, so SentencePiece drops a space at its beginning; after the prompt with echo."""
    segments: list[list[str]]
    """Tokens as the vocabulary spells them."""
    logprobs: list[list[float]] | None
    """One for each segment; with echo there is none for the first."""
    exit_layers: list[list[int]]
    """Of each generated token: the layer that names the exit, or the number of layers for the final head."""
    predictions: list[list[list[Prediction]]] | None
    """With print_max_prob: of each generated token, what the heads that were evaluated for it predict; the last one
    gave the token."""
    finish_reasons: list[str]
    """eod, stop or max_tokens."""
    certified: float | None
    """The level that was promised: the share of tokens, averaged over prompts, that are the full model's."""
    ignored_fields: list[str]
    """Of the request, which have no meaning here."""
    request_time: float
    """Seconds."""
    requst_time: float
    """The same, as EE-LLM spells it."""


def router(context: ServerContext) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["Megatron"])
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorMessage} for status in (400, 401, 429, 500, 503)
    }

    @routes.put("/api", responses=responses, operation_id="megatron_put")
    @routes.post("/api", responses=responses, operation_id="megatron_post")
    async def generate(body: GenerateRequest, request: Request) -> GenerateResponse:
        """Continue prompts."""
        return await unless_disconnected(request, _generate(context, body))

    return routes


async def _generate(context: ServerContext, body: GenerateRequest) -> GenerateResponse:
    start = time.perf_counter()
    model = context.ready_model()
    most = context.config.limits.max_prompts
    if len(body.prompts) > most:
        raise BadRequest(f"prompts has {len(body.prompts)} texts; give at most {most}", param="prompts")
    prompts = [_with_begin(model.text_engine, prompt) if body.add_BOS else prompt for prompt in body.prompts]
    try:
        params = generation_params(body, context.config.defaults, model.client.checks)
        answers = await context.engine.answer(prompts, params, must_fit=True)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    outputs = await answers.whole()
    seconds = time.perf_counter() - start
    return _response(model.tokenizer, body, params, outputs, seconds)


def generation_params(body: GenerateRequest, defaults: GenerationParams, checks: RequestChecks) -> GenerationParams:
    """The engine's settings. Raises ValueError."""
    ends_of_line = ["\n"] * body.stop_on_eol + ["\n\n"] * body.stop_on_double_eol

    def make(exits: GenerationParams, certificate: Certificate | None) -> GenerationParams:
        if certificate is not None:
            exits = checks.as_certified(exits)
        is_length_given = certificate is None or "tokens_to_generate" in body.model_fields_set
        return replace(
            exits,
            max_tokens=body.tokens_to_generate if is_length_given else exits.max_tokens,
            sampling=SamplingSettings(
                temperature=body.temperature, top_k=body.top_k, top_p=body.top_p, top_p_decay=body.top_p_decay,
                top_p_bound=body.top_p_bound, seed=body.random_seed,
            ),
            stop=tuple([*(body.stop_sequences or ()), *ends_of_line]),
            log_probs=_has_log_probs(body) or body.print_max_prob,
            echo=body.echo_prompts or body.tokens_to_generate == 0,
        )  # fmt: skip

    return certified_or_full(_exits(body, defaults), body.early_exit_thres is not None, checks, make)


def _exits(body: GenerateRequest, defaults: GenerationParams) -> GenerationParams:
    """`defaults` with the mode and the exits of the request."""
    mode, thresholds = defaults.mode, defaults.exit_thresholds
    if body.use_early_exit is not None:
        mode = "early_exit" if body.use_early_exit else "full"
    if isinstance(body.early_exit_thres, str):
        thresholds = CertifiedThresholds.parse(body.early_exit_thres)
    elif body.early_exit_thres is not None:
        if body.early_exit_thres > 1 and mode == "early_exit":
            mode = "full"
        thresholds = (min(max(body.early_exit_thres, 0.0), 1.0),)
    exit_layers = tuple(body.exit_layers) or defaults.exit_layers
    return replace(defaults, mode=mode, exit_thresholds=thresholds, exit_layers=exit_layers)


def _with_begin(text_engine: TextEngine, prompt: str) -> PromptMaker:
    """The ids of a prompt behind one begin of text."""

    def make(tokenizer: Tokenizer) -> list[int]:
        ids = text_engine.encode(prompt)
        begin = tokenizer.eod if tokenizer.bos is None else tokenizer.bos
        return ids if ids[:1] == [begin] else [begin, *ids]

    return make


def _response(
    tokenizer: Tokenizer,
    body: GenerateRequest,
    params: GenerationParams,
    outputs: Sequence[RequestOutput],
    seconds: float,
) -> GenerateResponse:
    results = [output.check() for output in outputs]
    prompt_ids = [output.prompt_ids if params.echo else [] for output in outputs]
    return GenerateResponse(
        text=[_text(tokenizer, output, params.echo) for output in outputs],
        segments=[
            segments(tokenizer, [*before, *result.token_ids])
            for before, result in zip(prompt_ids, results, strict=True)
        ],
        logprobs=[_log_probs(result) for result in results] if _has_log_probs(body) else None,
        exit_layers=[[token.exit_layer for token in result.tokens] for result in results],
        predictions=[[_predictions(tokenizer, token) for token in result.tokens] for result in results]
        if body.print_max_prob
        else None,
        finish_reasons=[result.finish_reason for result in results],
        certified=params.certified_level,
        ignored_fields=sorted(body.model_extra or ()),
        request_time=seconds,
        requst_time=seconds,
    )


def _has_log_probs(body: GenerateRequest) -> bool:
    return body.logprobs or not body.tokens_to_generate


def _log_probs(result: RequestResult) -> list[float]:
    """Of all tokens but the first one of the prompt, which has none."""
    tokens: list[PromptToken | GeneratedToken] = [*result.prompt[1:], *result.tokens]
    return [finite(computed(token.log_prob)) for token in tokens]


def _text(tokenizer: Tokenizer, output: RequestOutput, echo: bool) -> str:
    """As EE-LLM makes it: of these ids alone, whatever stands before them."""
    ids = output.check().token_ids
    num_cut = 0
    if output.finish_reason == "eod":
        ids = ids[:-1]
    elif output.finish_reason == "stop":
        num_cut = len("".join(pieces(tokenizer, output.prompt_ids, ids))) - len(output.text)
    text = tokenizer.detokenize([*output.prompt_ids, *ids] if echo else ids)
    return text[: len(text) - num_cut]


def _predictions(tokenizer: Tokenizer, token: GeneratedToken) -> list[Prediction]:
    texts = segments(tokenizer, [one.token for one in token.predictions])
    return [
        Prediction(exit_layer=one.exit_layer, token=text, prob=computed(one.confidence))
        for one, text in zip(token.predictions, texts, strict=True)
    ]
