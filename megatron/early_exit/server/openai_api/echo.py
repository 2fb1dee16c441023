"""The prompt in front of its answer, as `echo` wants it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.early_exit.data.tokenizer import Tokenizer
from megatron.early_exit.inference.text import pieces
from megatron.early_exit.inference.text_engine import Prompt, RequestOutput
from megatron.early_exit.server.openai_api.log_probs import CompletionLogProbs, LogProbWriter


class Echo:
    """The texts of prompts. It decodes every id, so make it in a thread."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[Prompt], prompt_ids: Sequence[Sequence[int]]) -> None:
        """prompts: as they were sent; prompt_ids: what they became."""
        self._pieces = [pieces(tokenizer, [], ids) for ids in prompt_ids]
        self.texts = [
            prompt if isinstance(prompt, str) else "".join(own)
            for prompt, own in zip(prompts, self._pieces, strict=True)
        ]

    def log_probs(self, output: RequestOutput, writer: LogProbWriter) -> CompletionLogProbs:
        """Of the prompt of a finished output."""
        own, length = self._pieces[output.prompt_index], len(self.texts[output.prompt_index])
        written = writer.completion(output.check().prompt, own, 0)
        # Special tokens that are written in the prompt are part of its text, and of no piece.
        return written.model_copy(update={"text_offset": [min(offset, length) for offset in written.text_offset]})
