"""Where prompts come from: beginnings of documents of a corpus, or lines of a file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megatron.early_exit.evaluation.prompts import EvalPrompt

if TYPE_CHECKING:
    from megatron.early_exit.data.tokenizer import Tokenizer

_KEYS = ("prompt", "messages", "ids")
"""What a line of JSON may give, one of them."""
_JSON_OBJECT = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"')
"""How the first line begins, perhaps behind a byte-order mark, if lines are JSON whatever the file's name."""


class PromptSource(Protocol):
    """Prompts by place, from 0."""

    count: int
    files: Sequence[Path]
    """What the prompts are read from."""
    where: str
    """The files, for people."""
    words: str
    """What the prompts are, for people."""
    template: str | None
    """Of chats; None: the prompts are none."""

    def prompt(self, place: int) -> EvalPrompt:
        """Raises ValueError for one that is damaged, empty, or of ids that the model does not have."""


class Documents:
    """Beginnings of all documents that are long enough."""

    template: str | None = None

    def __init__(self, data_path: Sequence[str], length: int, vocab_size: int) -> None:
        """data_path: prefixes of token files; of several, each is a domain. length: of each beginning, in tokens.

        Raises ValueError if a file is damaged or another tokenizer's, OSError."""
        import numpy as np
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        from megatron.early_exit.data.token_files import check_token_file

        prefixes = list(dict.fromkeys(data_path))
        files = [check_token_file(prefix) for prefix in prefixes]
        for file in files:
            file.check_ids(vocab_size)
        self._length, self._vocab_size = length, vocab_size
        self._prefixes, self._datasets = prefixes, [IndexedDataset(prefix) for prefix in prefixes]
        self._documents = [np.flatnonzero(file.sequence_lengths >= self._length) for file in files]
        names = [Path(prefix).name for prefix in prefixes]
        several = names if len(set(names)) == len(names) else prefixes
        self._domains: list[str | None] = [None] if len(names) == 1 else [*several]
        self._ends = np.cumsum([len(documents) for documents in self._documents])
        self.count = int(self._ends[-1])
        self.files: Sequence[Path] = [Path(f"{prefix}.{suffix}") for prefix in prefixes for suffix in ("bin", "idx")]
        self.where = " ".join(prefixes)
        self.words = f"beginnings of {self._length} tokens (--prompt-length)"

    def prompt(self, place: int) -> EvalPrompt:
        import numpy as np

        from megatron.early_exit.data.token_files import foreign_id

        file = int(np.searchsorted(self._ends, place, side="right"))
        document = int(self._documents[file][place - (self._ends[file - 1] if file else 0)])
        prefix = self._prefixes[file]
        ids = tuple(self._datasets[file].get(document, 0, self._length).tolist())
        foreign = _foreign(ids, self._vocab_size)
        if foreign is not None:
            raise ValueError(foreign_id(f"document {document} of {prefix}", foreign, self._vocab_size))
        return EvalPrompt(ids, self._domains[file], f"{prefix}:{document}")


class _Line(NamedTuple):
    """One prompt of a file, before it is tokenized."""

    location: str
    key: str
    """One of `_KEYS`."""
    value: Any
    domain: str | None


class Lines:
    """The lines of a file that are not blank. Damaged ones are found before the first prompt is drawn."""

    words = "prompts"

    def __init__(self, path: Path, chat_template: Path | None, tokenizer: Tokenizer, vocab_size: int) -> None:
        """chat_template: a file; None: the tokenizer's. Raises ValueError for a line that is none, OSError."""
        from megatron.early_exit.data.chat_template import read_chat_template

        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lines = _lines_of_one_kind(path)
        self.count, self.where = len(self._lines), str(path)
        self.files: Sequence[Path] = [path]
        self.template: str | None = None
        if self._lines[0].key == "messages":
            given = None if chat_template is None else read_chat_template(chat_template)
            self.template = given or tokenizer.chat_template
            if self.template is None:
                raise ValueError(
                    f"{path} holds chats, but the model's tokenizer has no chat template; give --chat-template FILE"
                )
        elif chat_template is not None:
            raise ValueError(f'--chat-template has no effect: {path} holds no chats (lines with "messages")')

    def prompt(self, place: int) -> EvalPrompt:
        line = self._lines[place]
        try:
            ids = tuple(self._ids(line))
        except ValueError as error:
            raise ValueError(f"{line.location}: {error}") from None
        foreign = _foreign(ids, self._vocab_size)
        if foreign is not None:
            raise ValueError(
                f"{line.location} has the id {foreign}, but the ids of this model's tokenizer are 0 to "
                f"{self._vocab_size - 1}"
            )
        if not ids:
            raise ValueError(f"{line.location}: the prompt is empty")
        return EvalPrompt(ids, line.domain, line.location)

    def _ids(self, line: _Line) -> Sequence[int]:
        if line.key == "ids":
            ids: list[int] = line.value  # `_parsed` has checked it
            return ids
        if line.key == "messages":
            return self._tokenizer.chat(line.value, template=self.template)
        return self._tokenizer.encode_prompt(line.value)


def _lines_of_one_kind(path: Path) -> list[_Line]:
    """Raises ValueError if there is none, one is damaged, or some are chats and others not; OSError."""
    lines = list(_read_lines(path))
    chats = [line for line in lines if line.key == "messages"]
    if chats and len(chats) < len(lines):
        other = next(line for line in lines if line.key != "messages")
        raise ValueError(
            f"{chats[0].location} is a chat and {other.location} is none; chats and other prompts are evaluated "
            "apart: give two files"
        )
    return lines


def _foreign(ids: Sequence[int], vocab_size: int) -> int | None:
    """An id that is none of the tokenizer's, if there is one."""
    return next((token for token in ids if not 0 <= token < vocab_size), None)


def _read_lines(path: Path) -> Iterator[_Line]:
    """Raises ValueError with FILE:LINE, OSError."""
    from megatron.early_exit.data.text_files import decode, parse_json, split_lines

    is_json: bool | None = None
    with path.open("rb") as stream:
        for line in split_lines(stream, path):
            if line.is_blank:
                continue
            if is_json is None:
                is_json = path.suffix in (".jsonl", ".json") or bool(_JSON_OBJECT.match(line.content))
            if is_json:
                yield _parsed(parse_json(line.content, line.location), line.location)
            else:
                yield _Line(line.location, "prompt", decode(line.content, line.location), None)
    if is_json is None:
        raise ValueError(f"--prompts-file {path} holds no prompt: all lines are empty")


def _parsed(value: Any, location: str) -> _Line:
    from megatron.early_exit.inference.checked import is_integer

    keys = [key for key in _KEYS if key in value] if isinstance(value, dict) else []
    if len(keys) != 1:
        raise ValueError(f'{location}: give an object with one of {", ".join(_KEYS)}, as in {{"prompt": "some text"}}')
    (key,) = keys
    content, domain = value[key], value.get("domain")
    is_message = lambda one: isinstance(one, dict) and all(isinstance(one.get(k), str) for k in ("role", "content"))
    is_right = {
        "prompt": lambda: isinstance(content, str),
        "ids": lambda: isinstance(content, list) and all(map(is_integer, content)),
        "messages": lambda: isinstance(content, list) and bool(content) and all(map(is_message, content)),
    }[key]
    if not is_right():
        kinds = {
            "prompt": "a text", "ids": "a list of integers",
            "messages": 'a list of {"role": text, "content": text}',
        }  # fmt: skip
        raise ValueError(f"{location}: {key} must be {kinds[key]}")
    if domain is not None and not isinstance(domain, str):
        raise ValueError(f"{location}: domain must be a text")
    return _Line(location, key, content, domain)
