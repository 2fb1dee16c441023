"""Conversations as token ids, and which of these are answers: what the model would have had to write itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron.early_exit.data.loss_masks import BEGINS, HAS_LOSS
from megatron.early_exit.data.tokenizer import Tokenizer


class MarkedTokens(NamedTuple):
    """A text that stands by itself."""

    ids: list[int]
    marks: list[int]
    """Of each id, the bits of `loss_masks`."""


def prompt_and_answer(prompt: Sequence[int], answer: Sequence[int]) -> MarkedTokens:
    """A prompt without a loss, and its answer with one."""
    marks = [0] * len(prompt) + [HAS_LOSS] * len(answer)
    marks[0] |= BEGINS
    return MarkedTokens([*prompt, *answer], marks)


def marked_conversation(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], template: str) -> MarkedTokens:
    """A conversation as the template writes it, with a loss on the answers of the assistant, the token that ends each
    included.

    An answer is what comes behind the prompt that asks for it. This is exact only if the conversation begins with
    the ids of that prompt: raises ValueError where it does not, and where no message is the assistant's."""
    write = lambda count, asks: tokenizer.chat(
        list(messages[:count]), template=template, add_generation_prompt=asks
    )  # fmt: skip
    whole = write(len(messages), False)
    marks = [0] * len(whole)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[0] == 0:
        raise ValueError('the conversation needs a message of the role "assistant" behind one of another role')
    for number in answers:
        prompt, so_far = write(number, True), write(number + 1, False)
        if so_far[: len(prompt)] != prompt or whole[: len(so_far)] != so_far or len(so_far) == len(prompt):
            raise ValueError(
                f"with this chat template the answer in message {number + 1} cannot be told from its prompt: "
                "the ids of the conversation up to there do not begin with those of the prompt that asks for it, or "
                "the template writes earlier messages in another way when more follow. Give another --chat-template"
            )
        end = _end_of_answer(so_far, len(prompt), tokenizer)
        marks[len(prompt) : end] = [HAS_LOSS] * (end - len(prompt))
    marks[0] |= BEGINS
    return MarkedTokens(whole, marks)


def _end_of_answer(ids: Sequence[int], start: int, tokenizer: Tokenizer) -> int:
    """Behind the token that ends it. What the template writes behind that (a line break) no model has to write."""
    return next((place + 1 for place in reversed(range(start, len(ids))) if ids[place] in tokenizer.ends), len(ids))


def messages_problem(value: Any) -> str | None:
    """What is wrong with the value of "messages" in a file."""
    is_message = lambda one: isinstance(one, Mapping) and all(isinstance(one.get(k), str) for k in ("role", "content"))
    if isinstance(value, list) and value and all(map(is_message, value)):
        return None
    return 'messages must be a list of {"role": text, "content": text}'
