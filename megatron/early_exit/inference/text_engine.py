"""Text in front of an engine: prompts to ids, ids to text as they come, stop strings.

One thread, no waiting: whoever calls `step` in a loop (`LLM`), or hands on the engine's events (a server), gets what is
new. It uses the engine's public
methods alone and holds no tensors, so it may run in another process than the model's.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron.early_exit.data.tokenizer import Tokenizer
from megatron.early_exit.inference import checked
from megatron.early_exit.inference.engine.engine import Engine, Event, QueueFull
from megatron.early_exit.inference.engine.request import Result
from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.params import GenerationParams, PromptTooLong, ScoreParams, check_length
from megatron.early_exit.inference.protocol import WorkerDescription
from megatron.early_exit.inference.results import FinishReason, GeneratedToken, RequestResult, ScoreResult
from megatron.early_exit.inference.text import StopStrings, TextStream

log = logging.getLogger(__name__)

Prompt = str | Sequence[int]
"""Text, or token ids."""

_MAX_CHARACTERS_PER_TOKEN = 256
"""Of a prompt that is worth tokenizing: some tokens are long words, or many spaces."""


@dataclass
class RequestOutput:
    """The output of one request, as it grows."""

    request_id: int | None
    """None if the prompt was refused."""
    prompt_ids: list[int]
    sample_index: int = 0
    """0 to n - 1"""
    prompt_index: int = 0
    """Among the prompts that came together."""
    pieces: list[str] = field(default_factory=list)
    """The text of each of `tokens`. A character of several tokens is the last one's; a stop string is nobody's, nor is
    the text of a token that ends the answer."""
    tokens: list[GeneratedToken] = field(default_factory=list)
    """Those whose text is whole and can no longer be taken back; in the end those of the result."""
    result: RequestResult | None = None
    """Set when the request has ended; None also for a prompt that was refused."""
    stop_string: str | None = None
    """The one that ended the answer, if one did."""
    error: str | None = None
    """Why the prompt was refused or the request failed."""

    @property
    def text(self) -> str:
        """The text of all tokens."""
        return "".join(self.pieces)

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it grows."""
        if self.error is not None:
            return "error"
        return None if self.result is None else self.result.finish_reason

    def check(self) -> RequestResult:
        """The result of a request that was answered. Raises ValueError if the prompt was refused, or the request failed
        or has not ended."""
        if self.error is not None:
            raise ValueError(f"the prompt was not answered: {self.error}")
        if self.result is None:
            raise ValueError("the request has not ended")
        return self.result


@dataclass(frozen=True)
class OutputDelta:
    """What is new of one output. Its text is that of its tokens, neither more nor less: tokens are held while their
    text may become part of a stop string or of a character, and the last delta brings what is still held."""

    output: RequestOutput
    """As it is now, this delta included."""
    pieces: tuple[str, ...]
    """The text of each of `tokens`, as in `RequestOutput`."""
    tokens: tuple[GeneratedToken, ...]
    is_finished: bool

    @property
    def request_id(self) -> int | None:
        return self.output.request_id

    @property
    def text(self) -> str:
        """New text, which no stop string can take back."""
        return "".join(self.pieces)


class AnswerEngine(Protocol):
    """What text needs of an engine, wherever that runs."""

    @property
    def description(self) -> WorkerDescription: ...

    @property
    def checks(self) -> RequestChecks: ...

    def add(self, prompt_ids: Sequence[int], params: GenerationParams, *, seed_offset: int = 0) -> int:
        """As `Engine.add`."""

    def cancel(self, request_id: int) -> Result | None:
        """As `Engine.cancel`; None also if the result is of no interest any more."""

    def stop(self, request_id: int, num_tokens: int) -> Result | None:
        """As `Engine.stop`; None also if the result comes later, with an event."""


class TextEngine:
    """Prompts in, text out. Requests of others in the same engine are left alone; their events are dropped."""

    def __init__(self, engine: AnswerEngine, tokenizer: Tokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._num_positions = engine.description.num_positions
        self._growing: dict[int, _GrowingOutput] = {}

    def encode(self, prompt: Prompt, add_special_tokens: bool = True, num_targets: int = 0) -> list[int]:
        """Ids of a prompt. num_targets: those at its end that take no position.

        Raises ValueError if it is none; PromptTooLong, before any work, if it cannot fit."""
        num_positions = self._num_positions + num_targets
        if isinstance(prompt, str):
            if len(prompt) > num_positions * _MAX_CHARACTERS_PER_TOKEN:
                raise PromptTooLong(f"the prompt has {len(prompt)} characters; at most {num_positions} tokens fit")
            return self._tokenizer.encode_prompt(prompt, add_special_tokens)
        ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if not isinstance(ids, Sequence) or isinstance(ids, (bytes, bytearray)):
            raise ValueError(f"a prompt is of the type {type(prompt).__name__}; give text or a list of ids")
        check_length(len(ids), num_positions)
        return [checked.integer("an id of the prompt", token) for token in ids]

    def add(self, prompt: Prompt, params: GenerationParams, sample_index: int = 0, prompt_index: int = 0) -> int:
        """Queue a request for answer `sample_index` of `params.n`; returns its id. The indices are repeated in its
        output.

        Raises ValueError if the prompt cannot be answered with these settings, QueueFull if too many requests wait."""
        self._engine.checks.check(params)
        ids = self.encode(prompt, params.add_special_tokens)
        return self.add_checked(ids, params, sample_index, prompt_index)

    def add_checked(
        self, ids: list[int], params: GenerationParams, sample_index: int = 0, prompt_index: int = 0
    ) -> int:
        """`add` for ids that `encode` has made, and settings that have been checked."""
        output = RequestOutput(None, ids, sample_index, prompt_index)
        growing = _GrowingOutput(output, self._tokenizer, params)
        output.request_id = self._engine.add(ids, params, seed_offset=sample_index)
        self._growing[output.request_id] = growing
        return output.request_id

    def cancel(self, request_id: int) -> OutputDelta | None:
        """End a request now, with what was held of its output. None if it has ended already, and for scores."""
        result = self._engine.cancel(request_id)
        if request_id in self._growing and isinstance(result, RequestResult):
            return self._delta(Event(request_id, [], result))
        self._growing.pop(request_id, None)
        return None

    def take(self, events: Sequence[Event]) -> list[OutputDelta]:
        """What is new of outputs, by events of the engine."""
        deltas = [self._delta(event) for event in events if event.request_id in self._growing]
        return [delta for delta in deltas if delta.tokens or delta.is_finished]

    def _delta(self, event: Event) -> OutputDelta:
        growing = self._growing[event.request_id]
        try:
            delta = self._grow(growing, event)
        except Exception as error:  # of the tokenizer, for instance: this request's alone
            log.info("request %d failed", event.request_id, exc_info=error)
            if event.result is None:
                self._engine.cancel(event.request_id)
            delta = growing.fail(f"its text could not be made ({request_error(error)})")
        if delta.is_finished:
            del self._growing[event.request_id]
        return delta

    def _grow(self, growing: _GrowingOutput, event: Event) -> OutputDelta:
        result: Result | None = event.result
        ends = isinstance(result, RequestResult) and result.finish_reason in ("eod", "stop")
        is_stopped = growing.add(event.tokens, ends)
        if is_stopped and result is None:
            # An engine in another process gives the result later, as that of an event.
            result = self._engine.stop(event.request_id, growing.num_tokens)
        return growing.finish(result) if isinstance(result, RequestResult) else growing.take()


class LocalTextEngine(TextEngine):
    """The same over an engine in this process, whose steps are run here, and scores as well."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        super().__init__(engine, tokenizer)
        self._local_engine = engine
        self._scoring: set[int] = set()

    @property
    def has_work(self) -> bool:
        return self._local_engine.has_work

    def add_scoring(self, prompt: Prompt, params: ScoreParams) -> int:
        """Queue a request for what heads predict over a prompt; returns its id. Raises as `add`."""
        request_id = self._local_engine.add_scoring(self.encode(prompt, num_targets=params.num_targets), params)
        self._scoring.add(request_id)
        return request_id

    def cancel(self, request_id: int) -> OutputDelta | None:
        self._scoring.discard(request_id)
        return super().cancel(request_id)

    def step(self) -> list[OutputDelta | ScoreResult]:
        """Run a step of the engine. Returns what is new of outputs, and the scores that are complete."""
        return self._news(self._local_engine.step())

    def fail_all(self, error: str) -> list[OutputDelta | ScoreResult]:
        """End every request of the engine with an error."""
        return self._news(self._local_engine.fail_all(error))

    def _news(self, events: Sequence[Event]) -> list[OutputDelta | ScoreResult]:
        news: list[OutputDelta | ScoreResult] = []
        for event in events:
            if event.request_id in self._scoring and isinstance(event.result, ScoreResult):
                self._scoring.remove(event.request_id)
                news.append(event.result)
            else:
                news += self.take([event])
        return news


class _GrowingOutput:
    """An output, with the tokens that are held."""

    def __init__(self, output: RequestOutput, tokenizer: Tokenizer, params: GenerationParams) -> None:
        self._output = output
        self._stream = TextStream(tokenizer, output.prompt_ids)
        self._stops, self._min_tokens = StopStrings(params.stop), params.min_tokens
        self._held: deque[tuple[GeneratedToken, str]] = deque()
        """With their pieces of text."""
        self._num_taken = 0
        """Characters of the tokens before these."""

    @property
    def num_tokens(self) -> int:
        """Up to the one that completed a stop string."""
        return len(self._output.tokens) + len(self._held)

    def add(self, tokens: Sequence[GeneratedToken], ends: bool) -> bool:
        """Hold new tokens, up to one that completes a stop string. Returns whether one does. ends: the answer ends with
        the last one, whose text is not part of it."""
        was_stopped = self._is_stopped
        for index, token in enumerate(tokens, start=1):
            is_end = ends and index == len(tokens)
            if is_end:
                self._flush()
            if self._is_stopped:
                break
            self._held.append((token, ""))
            if not is_end:
                self._extend(self._stream.add(token.token))
        return self._is_stopped and not was_stopped

    def take(self) -> OutputDelta:
        """What need not be held any more."""
        count, stop = 0, self._num_taken
        for _, piece in self._held:
            stop += len(piece)
            if stop > self._stops.num_settled or count + self._stream.num_held == len(self._held):
                break
            count += 1
        return self._take(count)

    def finish(self, result: RequestResult) -> OutputDelta:
        """All that is held, but for a stop string."""
        self._flush()
        found = self._stops.found
        if found is not None:
            self._cut(found.at - self._num_taken)
            result = result.stopped_after(self.num_tokens)
            self._output.stop_string = found.text
        self._output.result, self._output.error = result, result.error
        return self._take(len(self._held), is_finished=True)

    def fail(self, error: str) -> OutputDelta:
        """Nothing more; the output ends with an error."""
        self._output.error = error
        return self._take(0, is_finished=True)

    @property
    def _is_stopped(self) -> bool:
        return self._stops.found is not None

    def _flush(self) -> None:
        """Let held ids have what text they have."""
        if not self._is_stopped:
            self._extend(self._stream.finish())

    def _extend(self, text: str) -> None:
        """Add to the text of the last token."""
        if text:
            token, piece = self._held.pop()
            self._held.append((token, piece + text))
            self._stops.add(text, may_end=self.num_tokens > self._min_tokens)

    def _cut(self, num_characters: int) -> None:
        """Keep so much of the text of held tokens."""
        for index, (token, piece) in enumerate(self._held):
            self._held[index] = token, piece[:num_characters]
            num_characters = max(num_characters - len(piece), 0)

    def _take(self, count: int, is_finished: bool = False) -> OutputDelta:
        taken = [self._held.popleft() for _ in range(count)]
        tokens, pieces = tuple(token for token, _ in taken), tuple(piece for _, piece in taken)
        self._output.tokens += tokens
        self._output.pieces += pieces
        self._num_taken += sum(map(len, pieces))
        return OutputDelta(self._output, pieces, tokens, is_finished)


def request_error(error: Exception) -> str:
    """The words for an error that is one request's."""
    says_enough = isinstance(error, ValueError | QueueFull | ExecutorError)
    return str(error) if says_enough else f"{type(error).__name__}: {error}"
