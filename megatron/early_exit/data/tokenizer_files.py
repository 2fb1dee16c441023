"""The files that make up a tokenizer, and its copy in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron.early_exit.config.checkpoint_files import SENTENCEPIECE_FILE, TOKENIZER_SETTINGS_FILE
from megatron.early_exit.config.data import TokenizerConfig

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")

# A Hugging Face folder often holds a model's weights too. These say what model it is, and make up its tokenizer.
MODEL_FILES = ("config.json", "generation_config.json")
HUGGING_FACE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_MORE_TEMPLATES = "additional_chat_templates/*.jinja"


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
        source = existing_model(data)
        if data.tokenizer_type == "HuggingFaceTokenizer":
            files = {str(path.relative_to(source)): path.read_bytes() for path in hugging_face_files(source)}
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


def _needs_model(data: TokenizerConfig) -> bool:
    return data.tokenizer_type == "HuggingFaceTokenizer" or data.tokenizer_type in SENTENCEPIECE_TYPES


def existing_model(data: TokenizerConfig) -> Path:
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


def hugging_face_files(folder: Path) -> list[Path]:
    files = present_files(folder)
    if not any(path.name not in MODEL_FILES for path in files):
        raise ValueError(f"--tokenizer-model {folder} holds no tokenizer (tokenizer.json, vocab.json, tokenizer.model)")
    return files
