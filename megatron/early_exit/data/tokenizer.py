"""Tokenizers: `transformers`, SentencePiece and bytes, behind the few methods that training and generation need.

Token ids are never altered: one that does not fit the model's vocabulary is an error (`check_ids_fit`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from megatron.early_exit.config.checkpoint_files import SENTENCEPIECE_FILE, TOKENIZER_SETTINGS_FILE
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.saved_description import saved_tokenizer

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")

# A Hugging Face folder often holds a model's weights too. These say what model it is, and make up its tokenizer.
MODEL_FILES = ("config.json", "generation_config.json")
HUGGING_FACE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_MORE_TEMPLATES = "additional_chat_templates/*.jinja"


class Library(Protocol):
    """What one kind of tokenizer does with text. Ids are the library's own, never looked up by a token's spelling."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of `text`, with what begins (or ends) every text for a model if `add_special_tokens`."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens leave no text."""

    def spelling(self, token: int) -> str:
        """An id as the vocabulary writes it, special tokens too. Bytes that are no text: `<0xE2>`, or in the alphabet
        of byte-level vocabularies."""


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
            return self.encode_prompt(_render(template, messages, add_generation_prompt), add_special_tokens)
        text = "\n".join(message["content"] for message in messages) + "\n"
        return self.encode_prompt(text, add_special_tokens)

    @property
    def unique_identifiers(self) -> OrderedDict:
        """What core's cached sample indices depend on: the content of the tokenizer, not where it lies."""
        return OrderedDict(fingerprint=self.fingerprint, vocab_size=self.vocab_size, eod=self.eod)


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
        with _refusals_of_template():
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


def _render(template: str, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    with _refusals_of_template():
        rendered, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=add_generation_prompt
        )
        return rendered[0]


@contextmanager
def _refusals_of_template() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template is a program of its own
        raise ValueError(f"the chat template refuses the conversation: {error}") from error


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
        return _build_hugging_face(_existing_model(data))
    if data.tokenizer_type in SENTENCEPIECE_TYPES:
        return _build_sentencepiece(_existing_model(data), data.tokenizer_type == "Llama2Tokenizer")
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


def save_tokenizer(data: TokenizerConfig, folder: str | Path) -> None:
    """Copy the tokenizer of `data` into `folder` (made if missing), so that a checkpoint can be used on its own.

    `load_tokenizer(folder)` reads it back.
    """
    write_tokenizer(read_tokenizer_files(data), folder)


def read_tokenizer_files(data: TokenizerConfig) -> dict[str, bytes]:
    """What `save_tokenizer` writes, by name. A run reads it once: later the files may be others, or be gone with a
    checkpoint that they lay in."""
    files = {}
    if data.tokenizer_model and _needs_model(data):
        source = _existing_model(data)
        if data.tokenizer_type == "HuggingFaceTokenizer":
            files = {str(path.relative_to(source)): path.read_bytes() for path in _hugging_face_files(source)}
        else:
            files = {SENTENCEPIECE_FILE: source.read_bytes()}
    settings = {
        "tokenizer_type": data.tokenizer_type, "vocab_size": data.vocab_size,
        "has_model": bool(data.tokenizer_model) and _needs_model(data),
    }  # fmt: skip
    return {**files, TOKENIZER_SETTINGS_FILE: (json.dumps(settings, indent=2) + "\n").encode()}


def write_tokenizer(files: Mapping[str, bytes], folder: str | Path) -> None:
    """Write what `read_tokenizer_files` read into `folder` (made if missing)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote into `folder`."""
    return build_tokenizer(saved_tokenizer(folder))


def _needs_model(data: TokenizerConfig) -> bool:
    return data.tokenizer_type == "HuggingFaceTokenizer" or data.tokenizer_type in SENTENCEPIECE_TYPES


def _existing_model(data: TokenizerConfig) -> Path:
    wants_folder = data.tokenizer_type == "HuggingFaceTokenizer"
    kind = "a Hugging Face folder" if wants_folder else "a SentencePiece .model file"
    if not data.tokenizer_model:
        raise ValueError(f"--tokenizer-type {data.tokenizer_type} needs --tokenizer-model: {kind}")
    path = Path(data.tokenizer_model)
    if not path.exists():
        raise ValueError(f"--tokenizer-model {path} does not exist; {data.tokenizer_type} reads {kind} from disk")
    if path.is_dir() != wants_folder:
        raise ValueError(
            f"--tokenizer-model {path} is a {'folder' if path.is_dir() else 'file'}; {data.tokenizer_type} needs {kind}"
        )
    return path


def present_files(folder: Path) -> list[Path]:
    """Files in a folder of transformers that make up its tokenizer, or say what model it is."""
    names = [folder / name for name in (*HUGGING_FACE_FILES, *MODEL_FILES)]
    return [path for path in (*names, *sorted(folder.glob(_MORE_TEMPLATES))) if path.is_file()]


def _hugging_face_files(folder: Path) -> list[Path]:
    files = present_files(folder)
    if not any(path.name not in MODEL_FILES for path in files):
        raise ValueError(f"--tokenizer-model {folder} holds no tokenizer (tokenizer.json, vocab.json, tokenizer.model)")
    return files


def _build_hugging_face(folder: Path) -> Tokenizer:
    files = _hugging_face_files(folder)
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
