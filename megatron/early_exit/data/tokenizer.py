"""Tokenizers: core's own, behind the few methods and ids that training and generation need.

Token ids are never altered: one that does not fit the model's vocabulary is an error (`check_ids_fit`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

from megatron.early_exit.config.data import DataConfig

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")

# A Hugging Face folder often holds a model's weights too. These say what model it is, and make up its tokenizer.
MODEL_FILES = ("config.json", "generation_config.json")
HUGGING_FACE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip

SETTINGS_FILE = "tokenizer_settings.json"
SENTENCEPIECE_FILE = "tokenizer.model"


class Tokenizer:
    """One tokenizer with what core's datasets ask of it.

    vocab_size: number of ids, special ones included; eod (also eos): id that ends a document; bos: id or None.
    library: core's tokenizer object, for what is special to one library (chat templates, pieces).
    """

    pad = -1
    """Core's datasets replace this id by 0 and give it no loss, so it must be none that text can have."""

    def __init__(self, library: Any, *, vocab_size: int, eod: int, bos: int | None, fingerprint: str) -> None:
        self.library = library
        self.vocab_size = vocab_size
        self.eod = self.eos = eod
        self.bos = bos
        self.fingerprint = fingerprint

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, with no begin or end of document added."""
        return self.library.text_to_ids(text)

    def detokenize(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens leave no text."""
        return self.library.ids_to_text(ids)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids that ask for an answer to a conversation of {"role": ..., "content": ...}: by the tokenizer's chat
        template, or the contents one after the other if it has none."""
        library = getattr(self.library, "tokenizer", None)
        if getattr(library, "chat_template", None):
            return list(library.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        return self.tokenize("\n".join(message["content"] for message in messages) + "\n")

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

    def text_to_ids(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def ids_to_text(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token < self.eod).decode("utf-8", errors="replace")


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that --tokenizer-type and --tokenizer-model name.

    With --mock-data and no --tokenizer-model it is the NullTokenizer. Raises ValueError if the files are missing or
    unreadable, the library is not installed, or the tokenizer has no end-of-document id.
    """
    if data.tokenizer_type == "NullTokenizer" or (data.mock_data and _needs_model(data) and not data.tokenizer_model):
        return _build_null(data)
    if data.tokenizer_type == "ByteLevelTokenizer":
        return Tokenizer(ByteLibrary(), vocab_size=257, eod=256, bos=None, fingerprint="utf-8 bytes, eod 256")
    if data.tokenizer_type == "HuggingFaceTokenizer":
        return _build_hugging_face(_existing_model(data))
    if data.tokenizer_type in SENTENCEPIECE_TYPES:
        return _build_sentencepiece(_existing_model(data))
    raise ValueError(
        f"--tokenizer-type {data.tokenizer_type} is not known; use HuggingFaceTokenizer, ByteLevelTokenizer, "
        f"NullTokenizer or one of {', '.join(SENTENCEPIECE_TYPES)}"
    )


def check_ids_fit(vocab_size: int, padded_vocab_size: int) -> None:
    """Raise ValueError unless every id of a tokenizer with `vocab_size` ids has a row in the embedding."""
    if vocab_size > padded_vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} ids but the model's embedding has {padded_vocab_size} rows; "
            f"raise --padded-vocab-size or use the tokenizer that the checkpoint was trained with"
        )


def save_tokenizer(data: DataConfig, folder: str | Path) -> None:
    """Copy the tokenizer of `data` into `folder` (made if missing), so that a checkpoint can be used on its own.

    `load_tokenizer(folder)` reads it back.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if data.tokenizer_model and _needs_model(data):
        source = _existing_model(data)
        if data.tokenizer_type == "HuggingFaceTokenizer":
            for path in _hugging_face_files(source):
                shutil.copyfile(path, target / path.name)
        else:
            shutil.copyfile(source, target / SENTENCEPIECE_FILE)
    settings = {
        "tokenizer_type": data.tokenizer_type, "vocab_size": data.vocab_size, "mock_data": data.mock_data,
        "has_model": bool(data.tokenizer_model) and _needs_model(data),
    }  # fmt: skip
    (target / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def saved_tokenizer_config(folder: str | Path) -> DataConfig:
    """Settings for the tokenizer that `save_tokenizer` wrote into `folder`. Raises ValueError if there is none."""
    folder = Path(folder)
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(f"no tokenizer was saved in {folder}: {SETTINGS_FILE} is missing; give --tokenizer-model")
    settings = json.loads(path.read_text(encoding="utf-8"))
    model = None
    if settings["has_model"]:
        is_folder = settings["tokenizer_type"] == "HuggingFaceTokenizer"
        model = str(folder if is_folder else folder / SENTENCEPIECE_FILE)
    return DataConfig(
        tokenizer_type=settings["tokenizer_type"],
        tokenizer_model=model,
        vocab_size=settings["vocab_size"],
        mock_data=settings["mock_data"],
    )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote into `folder`."""
    return build_tokenizer(saved_tokenizer_config(folder))


def _needs_model(data: DataConfig) -> bool:
    return data.tokenizer_type == "HuggingFaceTokenizer" or data.tokenizer_type in SENTENCEPIECE_TYPES


def _existing_model(data: DataConfig) -> Path:
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


def _hugging_face_files(folder: Path) -> list[Path]:
    files = [folder / name for name in (*HUGGING_FACE_FILES, *MODEL_FILES) if (folder / name).is_file()]
    if not any(path.name not in MODEL_FILES for path in files):
        raise ValueError(f"--tokenizer-model {folder} holds no tokenizer (tokenizer.json, vocab.json, tokenizer.model)")
    return files


def _from_core(library: str, path: Path | None, **kwargs: Any) -> Any:
    """Core's tokenizer library object. Imported here because importing core takes seconds."""
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=None if path is None else str(path), metadata_path={"library": library}, **kwargs
    )
    return tokenizer._tokenizer


def _build_hugging_face(folder: Path) -> Tokenizer:
    files = _hugging_face_files(folder)
    _require("transformers")
    try:
        library = _from_core("huggingface", folder, use_fast=True)
    except Exception as error:
        raise ValueError(f"--tokenizer-model {folder} cannot be read as a Hugging Face tokenizer: {error}") from error
    if library.eod is None:
        raise ValueError(
            f"the tokenizer in {folder} has no eos_token, which ends documents; set it in its tokenizer_config.json"
        )
    # Ids may have holes, so the largest id counts, not how many there are.
    largest = max(library.tokenizer.get_vocab().values())
    return Tokenizer(
        library,
        vocab_size=max(library.vocab_size, largest + 1),
        eod=library.eod,
        bos=library.bos_id,
        fingerprint=_fingerprint([path for path in files if path.name not in MODEL_FILES]),
    )


def _build_sentencepiece(path: Path) -> Tokenizer:
    _require("sentencepiece")
    try:
        library = _from_core("sentencepiece", path)
    except Exception as error:
        raise ValueError(f"--tokenizer-model {path} cannot be read as a SentencePiece model: {error}") from error
    if library.eos_id < 0:
        raise ValueError(f"the SentencePiece model {path} has no eos piece, which ends documents; train it with one")
    return Tokenizer(
        library,
        vocab_size=library.vocab_size,
        eod=library.eos_id,
        bos=library.bos_id if library.bos_id >= 0 else None,
        fingerprint=_fingerprint([path]),
    )


def _build_null(data: DataConfig) -> Tokenizer:
    if not data.vocab_size or data.vocab_size < 1:
        raise ValueError(
            f"NullTokenizer (also of --mock-data without --tokenizer-model) needs --vocab-size of at least 1, "
            f"not {data.vocab_size}"
        )
    library = _from_core("null", None, vocab_size=data.vocab_size)
    return Tokenizer(library, vocab_size=library.vocab_size, eod=library.eod, bos=None, fingerprint="numbers")


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"this tokenizer needs the package `{package}`: pip install {package}")


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda file: file.suffix):
        digest.update(path.read_bytes())
    return digest.hexdigest()
