"""What has come for one HTTP request and has not been taken: a slow reader finds larger pieces, never more of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from megatron.early_exit.inference.text_engine import OutputDelta, RequestOutput
from megatron.early_exit.server.errors import EngineFailed


class Mailbox:
    """The news of all answers to one HTTP request. Deltas of one answer are merged until they are taken, so it holds
    at most what the answers hold."""

    def __init__(self) -> None:
        self._deltas: dict[tuple[int, int], OutputDelta] = {}
        """By prompt and sample."""
        self._has_news = asyncio.Event()

    def put(self, delta: OutputDelta) -> None:
        """Add what is new of an answer."""
        key = delta.output.prompt_index, delta.output.sample_index
        before = self._deltas.get(key)
        if before is not None:
            pieces, tokens = before.pieces + delta.pieces, before.tokens + delta.tokens
            delta = OutputDelta(delta.output, pieces, tokens, delta.is_finished)
        self._deltas[key] = delta
        self._has_news.set()

    async def take(self) -> list[OutputDelta]:
        """All that is new, one delta for each answer that has any; waits until there is something."""
        await self._has_news.wait()
        deltas = list(self._deltas.values())
        self._deltas.clear()
        self._has_news.clear()
        return deltas


class Answers:
    """The answers to one HTTP request, as they grow: an asynchronous iterator of lists of deltas, one a list for each
    answer that has grown. It ends when all answers have. `close` ends those that have not.

        async with await engine.answer(prompts, params) as answers:
            async for deltas in answers:
                ...
    """

    def __init__(self, num_answers: int, prompt_ids: list[list[int]], close: Callable[[Answers], None]) -> None:
        self.prompt_ids = prompt_ids
        """Of each prompt."""
        self.num_generated = 0
        """Tokens of all answers so far."""
        self._mailbox = Mailbox()
        self.request_ids: set[int] = set()
        """In the engine, of answers that have not ended."""
        self.num_unfinished = num_answers
        """Of those that the reader has seen."""
        self._close = close

    def put(self, delta: OutputDelta) -> None:
        """Add what is new of one of them."""
        self.num_generated += len(delta.tokens)
        self._mailbox.put(delta)

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> list[OutputDelta]:
        if self.num_unfinished == 0:
            raise StopAsyncIteration
        deltas = await self._mailbox.take()
        self.num_unfinished -= sum(delta.is_finished for delta in deltas)
        return deltas

    async def whole(self) -> list[RequestOutput]:
        """All answers when they have ended, by prompt and sample; the rest is cancelled if that fails. Raises
        EngineFailed if one ends with an error."""
        outputs = []
        async with self:
            async for deltas in self:
                outputs += finished(deltas)
        return sorted(outputs, key=lambda output: (output.prompt_index, output.sample_index))

    def close(self) -> None:
        """Cancel what has not ended. May be called twice."""
        self._close(self)

    async def __aenter__(self) -> Answers:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def finished(deltas: Sequence[OutputDelta]) -> list[RequestOutput]:
    """Outputs that end with these deltas. Raises EngineFailed if one does so with an error."""
    outputs = [delta.output for delta in deltas if delta.is_finished]
    for output in outputs:
        if output.error is not None:
            raise EngineFailed(output.error)
    return outputs
