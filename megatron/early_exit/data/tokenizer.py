"""Tokenizers: `transformers`, SentencePiece and bytes, behind the few methods that training and generation need.

Token ids are never altered: one that does not fit the model's vocabulary is an error (`check_ids_fit`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.saved_description import saved_tokenizer
from megatron.early_exit.data.tokenizer_files import (
    MODEL_FILES,
    SENTENCEPIECE_TYPES,
    existing_model,
    hugging_face_files,
)
from megatron.early_exit.data.tokenizer_libraries import (
    ByteLibrary,
    HuggingFaceLibrary,
    Library,
    NumberLibrary,
    SentencePieceLibrary,
    render_chat,
)


class Tokenizer:
    """One tokenizer with what core's datasets ask of it.

    vocab_size: number of ids, special ones included; eod (also eos): id that ends a document; bos: id or None.
    ends: ids that end an answer, by default the end of a document alone.
    """

    pad = -1
    """Core's datasets replace this id by 0 and give it no loss, so it must be none that text can have."""

    def __init__(
        self,
        library: Library,
        *,
        vocab_size: int,
        eod: int,
        bos: int | None,
        fingerprint: str,
        ends: Iterable[int] = (),
    ) -> None:
        self.library = library
        self.vocab_size = vocab_size
        self.eod = self.eos = eod
        self.bos = bos
        self.fingerprint = fingerprint
        self.ends = frozenset(token for token in ends if 0 <= token < vocab_size) or frozenset({eod})

    def tokenize(self, text: str) -> list[int]:
        """Ids of the document `text`, with no begin or end added. Raises ValueError if it cannot be tokenized."""
        return self._encode(text, add_special_tokens=False)

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt: those of `tokenizer(text)` in transformers, so with the begin of text if the tokenizer adds
        one. Raises ValueError if it cannot be tokenized."""
        return self._encode(text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        check_unicode(text)
        return self.library.encode(text, add_special_tokens)

    def detokenize(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens leave no text."""
        return self.library.decode(ids)

    @property
    def cleans_up_spaces(self) -> bool:
        """Whether decoding removes a space again when what comes after it is known ("a ." becomes "a.")."""
        return getattr(self.library, "cleans_up_spaces", False)

    @property
    def chat_template(self) -> str | None:
        """How conversations are written, in Jinja; None if the tokenizer does not say."""
        return self.library.chat_template if isinstance(self.library, HuggingFaceLibrary) else None

    def chat(
        self,
        messages: list[dict[str, str]],
        add_special_tokens: bool = True,
        template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The ids that ask for an answer to a conversation of {"role": ..., "content": ...}: by the tokenizer's chat
        template, or one in Jinja in its place, which writes all special tokens itself, or the contents one after the
        other if there is none. A template in front of a tokenizer that is not of transformers writes text alone.
        Without `add_generation_prompt`, a template writes the conversation alone.

        Raises ValueError if the template refuses the conversation."""
        for message in messages:
            check_unicode(message["content"])
        template = template or self.chat_template
        if template and isinstance(self.library, HuggingFaceLibrary):
            return self.library.chat(messages, template, add_generation_prompt)
        if template:
            return self.encode_prompt(render_chat(template, messages, add_generation_prompt), add_special_tokens)
        text = "\n".join(message["content"] for message in messages) + "\n"
        return self.encode_prompt(text, add_special_tokens)

    @property
    def unique_identifiers(self) -> OrderedDict:
        """What core's cached sample indices depend on: the content of the tokenizer, not where it lies."""
        return OrderedDict(fingerprint=self.fingerprint, vocab_size=self.vocab_size, eod=self.eod)


def build_tokenizer(data: TokenizerConfig) -> Tokenizer:
    """The tokenizer that --tokenizer-type and --tokenizer-model name.

    Raises ValueError if the files are missing or unreadable, the library is not installed, or the tokenizer has no
    end-of-document id.
    """
    if data.tokenizer_type == "NullTokenizer":
        return _build_null(data)
    if data.tokenizer_type == "ByteLevelTokenizer":
        return Tokenizer(ByteLibrary(), vocab_size=257, eod=256, bos=None, fingerprint="utf-8 bytes, eod 256")
    if data.tokenizer_type == "HuggingFaceTokenizer":
        return _build_hugging_face(existing_model(data))
    if data.tokenizer_type in SENTENCEPIECE_TYPES:
        return _build_sentencepiece(existing_model(data), data.tokenizer_type == "Llama2Tokenizer")
    raise ValueError(
        f"--tokenizer-type {data.tokenizer_type} is not known; use HuggingFaceTokenizer, ByteLevelTokenizer, "
        f"NullTokenizer or one of {', '.join(SENTENCEPIECE_TYPES)}"
    )


def check_unicode(text: str) -> None:
    """Raise ValueError if `text` cannot be written as UTF-8: half of a surrogate pair, as in cut JSON strings, or what
    Python makes of a byte that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: {text[error.start]!r} at character {error.start + 1} is half of a "
            "surrogate pair, or a byte that is not UTF-8"
        ) from None


def check_ids_fit(vocab_size: int, padded_vocab_size: int) -> None:
    """Raise ValueError unless every id of a tokenizer with `vocab_size` ids has a row in the embedding."""
    if vocab_size > padded_vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} ids but the model's embedding has {padded_vocab_size} rows; "
            f"raise --padded-vocab-size or use the tokenizer that the checkpoint was trained with"
        )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote into `folder`."""
    return build_tokenizer(saved_tokenizer(folder))


def _build_hugging_face(folder: Path) -> Tokenizer:
    files = hugging_face_files(folder)
    _require("transformers")
    try:
        library = HuggingFaceLibrary(folder)
    except Exception as error:
        raise ValueError(f"--tokenizer-model {folder} cannot be read as a Hugging Face tokenizer: {error}") from error
    theirs = library.tokenizer
    # Tokenizers of the BERT family have a separator and a class in these places.
    eod = theirs.eos_token_id if theirs.eos_token_id is not None else theirs.sep_token_id
    bos = theirs.bos_token_id if theirs.bos_token_id is not None else theirs.cls_token_id
    if eod is None:
        raise ValueError(
            f"the tokenizer in {folder} has no eos_token, which ends documents; set it in its tokenizer_config.json"
        )
    return Tokenizer(
        library,
        # Ids may have holes, so the largest id counts, not how many there are.
        vocab_size=max(len(theirs), max(theirs.get_vocab().values()) + 1),
        eod=eod,
        bos=bos,
        fingerprint=_fingerprint([path for path in files if path.name not in MODEL_FILES]),
        ends=_ends_of_model(folder),
    )


def _ends_of_model(folder: Path) -> list[int]:
    """Ids that end an answer by the model's own files, as transformers reads them: generation_config.json, else
    config.json. Empty if neither says. Raises ValueError if one is damaged."""
    for file in (folder / "generation_config.json", folder / "config.json"):
        if not file.is_file():
            continue
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{file} holds no JSON object")
        of_text = settings.get("text_config") or {}
        if not isinstance(of_text, dict):
            raise ValueError(f"text_config in {file} is {of_text!r}, and no JSON object")
        for ends in (settings.get("eos_token_id"), of_text.get("eos_token_id")):
            if ends is None:
                continue
            ids = ends if isinstance(ends, list) else [ends]
            if not all(isinstance(token, int) for token in ids):
                raise ValueError(f"eos_token_id in {file} is {ends!r}, and no id or list of ids")
            return ids
    return []


def _build_sentencepiece(path: Path, adds_bos: bool) -> Tokenizer:
    _require("sentencepiece")
    try:
        library = SentencePieceLibrary(path, adds_bos)
    except Exception as error:
        raise ValueError(f"--tokenizer-model {path} cannot be read as a SentencePiece model: {error}") from error
    model = library.model
    if model.eos_id() < 0:
        raise ValueError(f"the SentencePiece model {path} has no eos piece, which ends documents; train it with one")
    return Tokenizer(
        library,
        vocab_size=model.get_piece_size(),
        eod=model.eos_id(),
        bos=model.bos_id() if model.bos_id() >= 0 else None,
        fingerprint=_fingerprint([path]),
    )


def _build_null(data: TokenizerConfig) -> Tokenizer:
    if not data.vocab_size or data.vocab_size < 1:
        raise ValueError(
            f"NullTokenizer (also of --mock-data without --tokenizer-model) needs --vocab-size of at least 1, "
            f"not {data.vocab_size}"
        )
    size = data.vocab_size
    return Tokenizer(NumberLibrary(), vocab_size=size + 1, eod=size, bos=None, fingerprint="numbers")


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"this tokenizer needs the package `{package}`: pip install {package}")


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda file: file.suffix):
        digest.update(path.read_bytes())
    return digest.hexdigest()
