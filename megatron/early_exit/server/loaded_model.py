"""The model as the HTTP process has it: what it can do, its tokenizer, and a client of the engine that runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron.early_exit.data.token_text import TokenTexts
from megatron.early_exit.data.tokenizer import Tokenizer
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.text_engine import Prompt, TextEngine
from megatron.early_exit.server.engine_client import EngineClient
from megatron.early_exit.server.engine_messages import Ready

PromptMaker = Callable[[Tokenizer], list[int]]
"""Makes the ids of a prompt, by a chat template for instance. It is called in a thread, and raises ValueError."""


@dataclass(frozen=True)
class LoadedModel:
    """What is there while the engine is ready."""

    ready: Ready
    tokenizer: Tokenizer
    client: EngineClient
    text_engine: TextEngine

    @cached_property
    def token_texts(self) -> TokenTexts:
        """The text of each id by itself."""
        return TokenTexts(self.tokenizer)

    def prompt_ids(
        self, prompts: Sequence[Prompt | PromptMaker], params: Sequence[GenerationParams], must_fit: bool
    ) -> list[list[int]]:
        """Ids of each prompt; long ones take a while. must_fit: refuse answers that cannot have `max_tokens`. Raises
        ValueError unless the model can answer all of them."""
        all_ids = []
        for prompt, one in zip(prompts, params, strict=True):
            made = prompt(self.tokenizer) if callable(prompt) else prompt
            ids = self.text_engine.encode(made, one.add_special_tokens)
            self.client.checks.check_generation(ids, one)
            if must_fit:
                self.client.checks.check_room(ids, one)
            all_ids.append(ids)
        return all_ids
