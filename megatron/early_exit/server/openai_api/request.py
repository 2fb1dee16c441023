"""What completions and chat completions have in common: fields of the request, and settings of the engine from them."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron.early_exit.inference.certificates import Certificate
from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.params import (
    MAX_SAMPLES,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    GenerationParams,
    SamplingSettings,
)
from megatron.early_exit.inference.sampling_settings import LARGEST_LOGIT_BIAS, MAX_LOGIT_BIASES
from megatron.early_exit.server.config import RequestLimits
from megatron.early_exit.server.early_exit_fields import EarlyExitFields, certified_or_full
from megatron.early_exit.server.errors import BadRequest
from megatron.early_exit.server.request_fields import NEUTRAL, Id, Nothing, RequestBody, first_given, otherwise

MAX_LOG_PROBS = 20
"""Beside each token."""

_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_IdAsText = Annotated[str, Field(pattern="^[0-9]{1,10}$")]
_Bias = Annotated[float, Field(ge=-LARGEST_LOGIT_BIAS, le=LARGEST_LOGIT_BIAS)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(RequestBody):
    """Of a streamed answer."""

    include_usage: bool | None = None
    """Send the usage as the last chunk."""
    include_obfuscation: Annotated[Literal[False] | None, NEUTRAL] = None
    continuous_usage_stats: Annotated[Literal[False] | None, NEUTRAL] = None


class AnswerRequest(EarlyExitFields):
    """Fields of both kinds of requests. Those that nothing is done with accept the values that ask for nothing."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    """Left out: the one that is served."""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """0: the most probable token, whatever top_p and the others are; default 1, or 0 with a certified level."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Choose among the fewest most probable tokens with this probability; default 1: all."""
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """Choose among so many most probable tokens; 0 and -1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Leave out what is below this share of the most probable token's probability."""
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    """Of tokens that the prompt or the answer holds; 1: none."""
    frequency_penalty: _Penalty | None = None
    """Subtracted from a token's logit as often as the answer holds it."""
    presence_penalty: _Penalty | None = None
    """Subtracted from the logits of tokens that the answer holds."""
    logit_bias: Annotated[
        Annotated[dict[_IdAsText, _Bias], Field(max_length=MAX_LOGIT_BIASES)] | None,
        otherwise(f"it must have a number from -100 to 100 for each of at most {MAX_LOGIT_BIASES} token ids"),
    ] = None
    """By token id: added to its logit. -100 all but bans a token, 100 all but forces it."""
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """Nothing ends the answer before it has so many tokens."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """The same seed gives the same answer; left out: another one each time."""
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    """Answers to each prompt; answer i is drawn with seed + i."""
    stop: Annotated[
        _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOP_STRINGS)] | None,
        otherwise(f"it must be 1 to {MAX_STOP_CHARACTERS} characters of text, or a list of {MAX_STOP_STRINGS} at most"),
    ] = None
    """The answer ends before these texts."""
    stop_token_ids: Annotated[list[Id], Field(max_length=MAX_STOP_TOKENS)] | None = None
    """The answer ends with one of these tokens, which leaves no text."""
    ignore_eos: bool | None = None
    """Go on after the model's own end."""
    stream: bool | None = None
    """Send the answer as it grows."""
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    """Send the ids of prompts and answers as well."""
    return_tokens_as_token_ids: bool | None = None
    """In log-probabilities, write tokens as `token_id:N`."""

    user: str | None = None
    request_id: str | None = None
    skip_special_tokens: Annotated[Literal[True] | None, NEUTRAL] = None
    spaces_between_special_tokens: Annotated[Literal[True] | None, NEUTRAL] = None
    include_stop_str_in_output: Annotated[Literal[False] | None, NEUTRAL] = None
    use_beam_search: Annotated[Literal[False] | None, NEUTRAL] = None
    length_penalty: Annotated[Annotated[float, Field(ge=1, le=1)] | None, NEUTRAL] = None
    truncate_prompt_tokens: Annotated[None, NEUTRAL] = None
    prompt_logprobs: Annotated[None, NEUTRAL] = None
    allowed_token_ids: Annotated[Nothing | None, NEUTRAL] = None
    bad_words: Annotated[Nothing | None, NEUTRAL] = None
    priority: Annotated[Literal[0] | None, NEUTRAL] = None
    no_stop_trim: Annotated[Literal[False] | None, NEUTRAL] = None  # this and the next one: vllm-router adds them
    return_hidden_states: Annotated[Literal[False] | None, NEUTRAL] = None
    structured_outputs: Annotated[None, NEUTRAL] = None
    guided_json: Annotated[None, NEUTRAL] = None
    guided_regex: Annotated[None, NEUTRAL] = None
    guided_choice: Annotated[None, NEUTRAL] = None
    guided_grammar: Annotated[None, NEUTRAL] = None

    @property
    def num_samples(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        """In a stream."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check(self, num_prompts: int, limits: RequestLimits) -> None:
        """What depends on several fields, or on the server. Raises BadRequest that names the field."""
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options is given, but stream is not true", param="stream_options")
        if num_prompts > limits.max_prompts:
            message = f"prompt holds {num_prompts} prompts; one request may hold {limits.max_prompts}"
            raise BadRequest(message, param="prompt")
        num_answers = num_prompts * self.num_samples
        if num_answers > limits.max_answers:
            message = f"the request asks for {num_answers} answers (prompts times n); it may for {limits.max_answers}"
            raise BadRequest(message, param="n")

    def params(
        self,
        defaults: GenerationParams,
        checks: RequestChecks,
        max_tokens: int | None,
        default_max_tokens: int,
        *,
        log_probs: bool,
        **settings: Any,
    ) -> GenerationParams:
        """Settings of the engine. max_tokens, log_probs (whether they are reported), settings: what the kinds of
        requests call differently. Raises ValueError."""
        stop = self.stop or []

        def make(exits: GenerationParams, certificate: Certificate | None) -> GenerationParams:
            certified = None if certificate is None else certificate.answers
            return replace(
                exits,
                max_tokens=first_given(max_tokens, certified and certified.max_tokens, default_max_tokens),
                # Who asks for a promise about greedy answers means one; else OpenAI's default holds.
                sampling=self._sampling(0.0 if certified and self.exit_thresholds is not None else 1.0),
                n=self.num_samples,
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
                stop_tokens=tuple(self.stop_token_ids or ()),
                ignore_eod=first_given(self.ignore_eos, certified and certified.ignore_eod, False),
                min_tokens=self.min_tokens or 0,
                log_probs=log_probs or bool(self.return_exit_details),  # they tell confidences
                **settings,
            )

        return certified_or_full(self.with_exits(defaults), self.exit_thresholds is not None, checks, make)

    def seeded(self, params: GenerationParams, num_prompts: int) -> list[GenerationParams]:
        """The settings of each prompt. Without a seed equal prompts have other answers too."""
        if self.seed is not None or params.sampling.is_greedy:
            return [params] * num_prompts
        first = params.sampling
        return [replace(params, sampling=first.of_sample(index * params.n)) for index in range(num_prompts)]

    def _sampling(self, default_temperature: float) -> SamplingSettings:
        top_p, top_k = first_given(self.top_p, 1.0), max(first_given(self.top_k, 0), 0)
        return SamplingSettings(
            temperature=first_given(self.temperature, default_temperature),
            top_p=0.0 if top_p == 1.0 else top_p,
            top_k=1 if top_p == 0.0 else top_k,  # the fewest tokens with a probability of 0: the best one
            min_p=first_given(self.min_p, 0.0),
            repetition_penalty=first_given(self.repetition_penalty, 1.0),
            frequency_penalty=first_given(self.frequency_penalty, 0.0),
            presence_penalty=first_given(self.presence_penalty, 0.0),
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
        )
