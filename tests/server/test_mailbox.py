"""What has come for a request and has not been taken."""

from __future__ import annotations

import asyncio

from megatron.early_exit.inference.results import GeneratedToken
from megatron.early_exit.inference.text_engine import OutputDelta, RequestOutput
from megatron.early_exit.server.mailbox import Answers, Mailbox


def delta(output: RequestOutput, *words: str, is_finished: bool = False) -> OutputDelta:
    tokens = tuple(GeneratedToken(len(word), 4, True, 0.5, -1.0) for word in words)
    return OutputDelta(output, words, tokens, is_finished)


def test_deltas_of_an_answer_are_merged_until_they_are_taken() -> None:
    async def run() -> None:
        mailbox, outputs = Mailbox(), [RequestOutput(9, [1], prompt_index=0), RequestOutput(7, [1], prompt_index=1)]
        mailbox.put(delta(outputs[0], "a", "bc"))
        mailbox.put(delta(outputs[1], "x"))
        mailbox.put(delta(outputs[0], "def", is_finished=True))
        first, second = await mailbox.take()
        assert (first.pieces, [one.token for one in first.tokens], first.is_finished) == (
            ("a", "bc", "def"),
            [1, 2, 3],
            True,
        )
        assert (first.output, second.output) == tuple(outputs)
        assert (second.text, second.is_finished) == ("x", False)
        waiting = asyncio.ensure_future(mailbox.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        mailbox.put(delta(outputs[1], "y"))
        assert [one.text for one in await waiting] == ["y"]

    asyncio.run(run())


def test_answers_end_when_all_have_ended() -> None:
    async def run() -> None:
        closed = []
        answers = Answers(2, [[1], [2]], closed.append)
        outputs = [RequestOutput(9, [1], sample_index=0), RequestOutput(7, [1], sample_index=1)]
        answers.put(delta(outputs[0], "a", is_finished=True))
        seen = []
        async with answers:
            async for deltas in answers:
                seen += [one.text for one in deltas]
                if len(seen) == 1:
                    answers.put(delta(outputs[1], "b", is_finished=True))
        assert seen == ["a", "b"]
        assert closed == [answers]

    asyncio.run(run())
