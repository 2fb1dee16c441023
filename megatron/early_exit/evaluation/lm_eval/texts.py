"""Texts as lm-eval's `hf` takes them: how they begin, and where answers end."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval.models.utils import handle_stop_sequences

from megatron.early_exit.data.tokenizer import Tokenizer


class TextRules:
    """Of one model. add_bos_token, prefix_token_id: see `ModelArguments`."""

    def __init__(self, tokenizer: Tokenizer, add_bos_token: bool | None, prefix_token_id: int | None) -> None:
        self._tokenizer, self._add_bos_token = tokenizer, add_bos_token
        default = tokenizer.eod if tokenizer.bos is None else tokenizer.bos
        self.prefix_token_id = default if prefix_token_id is None else prefix_token_id
        """What a text without context is conditioned on."""

    def encode(self, text: str, begins_with: int | None) -> list[int]:
        """Ids of a text that is not begun again where it spells the token `begins_with` already."""
        if begins_with is not None and text.startswith(self.spelling(begins_with)):
            return self._tokenizer.encode_prompt(text, add_special_tokens=False)
        if self._add_bos_token is None:
            return self._tokenizer.encode_prompt(text)
        begin = [self._tokenizer.bos] if self._add_bos_token and self._tokenizer.bos is not None else []
        return begin + self._tokenizer.tokenize(text)

    def spelling(self, token: int) -> str:
        return self._tokenizer.library.spelling(token)

    def detokenize(self, ids: list[int]) -> str:
        return self._tokenizer.detokenize(ids)

    def end_strings(self, until: Sequence[str] | str | None) -> list[str]:
        """Where the text of an answer ends: what the task says, and the spelling of the end of text."""
        strings = list(until) if isinstance(until, list | tuple) else until
        return [text for text in handle_stop_sequences(strings, eos=self.spelling(self._tokenizer.eod)) if text]

    def end_tokens(self, strings: Sequence[str]) -> tuple[int, ...]:
        """Special tokens that these strings spell. They leave no text in which a string could be found."""
        tokens = {self._tokenizer.eod}
        for text in strings:
            ids = self._tokenizer.tokenize(text)
            if len(ids) == 1 and self.spelling(ids[0]) == text and not self._tokenizer.detokenize(ids):
                tokens.add(ids[0])
        return tuple(sorted(tokens))

    def prompt_ids(self, text: str) -> list[int]:
        """Of a prompt; never none."""
        return self.encode(text, begins_with=self._tokenizer.bos) or [self.prefix_token_id]
