"""What libraries of tokenizers do with text, behind one protocol: `transformers`, SentencePiece, bytes, numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol


class Library(Protocol):
    """What one kind of tokenizer does with text. Ids are the library's own, never looked up by a token's spelling."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of `text`, with what begins (or ends) every text for a model if `add_special_tokens`."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens leave no text."""

    def spelling(self, token: int) -> str:
        """An id as the vocabulary writes it, special tokens too. Bytes that are no text: `<0xE2>`, or in the alphabet
        of byte-level vocabularies."""


class ByteLibrary:
    """UTF-8 bytes as ids 0..255, and 256 for the end of a document.

    Not core's byte-level class: there, bytes 0 and 1 also mean end of document and padding, and decoding drops final
    white space.
    """

    eod = 256
    vocab_size = 257

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token < self.eod).decode("utf-8", errors="replace")

    def spelling(self, token: int) -> str:
        return f"<0x{token:02X}>" if token < self.eod else "<eod>"


class NumberLibrary:
    """Text that is numbers between spaces."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def spelling(self, token: int) -> str:
        return str(token)


class SentencePieceLibrary:
    """A SentencePiece model. The begin of text is added to prompts with `Llama2Tokenizer` alone, as Megatron and
    transformers do for Llama; the file itself does not say."""

    def __init__(self, path: Path, adds_bos: bool) -> None:
        import sentencepiece

        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self._adds_bos = adds_bos and self.model.bos_id() >= 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.model.encode(text, add_bos=self._adds_bos and add_special_tokens)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def spelling(self, token: int) -> str:
        return self.model.id_to_piece(token)


class HuggingFaceLibrary:
    """A tokenizer of `transformers`.

    Not core's wrapper of it: that looks ids up by the spelling of tokens, which added tokens with lstrip, rstrip or
    normalized do not have in a text, and empties the list of special tokens."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
        self.cleans_up_spaces = self._cleans_up_spaces()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def spelling(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token) or f"<{token}>"  # ids may have holes

    @property
    def chat_template(self) -> str | None:
        templates = self.tokenizer.chat_template
        return templates.get("default") if isinstance(templates, dict) else templates

    def chat(self, messages: list[dict[str, str]], template: str, add_generation_prompt: bool) -> list[int]:
        """Ids of a conversation. Raises ValueError if the template refuses it."""
        with refusals_of_template():
            return list(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=template, add_generation_prompt=add_generation_prompt, return_dict=False
                )
            )

    def _cleans_up_spaces(self) -> bool:
        # Asked by example: the setting alone does not say, since transformers ignores it for some models.
        ids = self.tokenizer.encode("a . a , a", add_special_tokens=False)
        kept = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return self.tokenizer.decode(ids) != kept


def render_chat(template: str, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    with refusals_of_template():
        rendered, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=add_generation_prompt
        )
        return rendered[0]


@contextmanager
def refusals_of_template() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template is a program of its own
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
