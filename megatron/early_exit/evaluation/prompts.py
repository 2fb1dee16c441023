"""Prompts that models are evaluated on: beginnings of documents of a corpus, or lines of a file.

The unit of every interval and of every guarantee is the prompt, so no prompt comes twice, and those that are taken are
drawn at random: any part of them is a sample like the whole."""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from megatron.early_exit.data.tokenizer import Tokenizer
    from megatron.early_exit.inference.protocol import WorkerDescription

log = logging.getLogger(__name__)

_KEYS = ("prompt", "messages", "ids")
"""What a line of JSON may give, one of them."""
_JSON_OBJECT = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"')
"""How the first line begins, perhaps behind a byte-order mark, if lines are JSON whatever the file's name."""


@dataclass(frozen=True)
class EvalPrompt:
    """One prompt."""

    ids: tuple[int, ...]
    domain: str | None
    """What it is of; None: nothing is said."""
    name: str
    """Where it comes from: PREFIX:DOCUMENT, counted from 0, or FILE:LINE, counted from 1."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the random order in which they were drawn."""

    prompts: tuple[EvalPrompt, ...]
    digest: str
    """SHA-256 of all ids."""
    template_digest: str | None
    """SHA-256 of the chat template; None: the prompts are no chats."""
    data: dict[str, str]
    """Name of each file -> SHA-256 of its content."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Those that prompts name, in alphabetical order."""
        return tuple(sorted({prompt.domain for prompt in self.prompts if prompt.domain is not None}))


def add_prompt_flags(
    parser: argparse.ArgumentParser,
    default_prompts: int,
    default_length: int = 32,
    what: str = "prompts",
    is_one_source: bool = True,
) -> None:
    """Add the group of flags that `load_prompts` reads, and --seed. what: the command's word for prompts.
    is_one_source: both kinds of prompts cannot be given, and one must be."""
    group = parser.add_argument_group(what)
    source = group.add_mutually_exclusive_group(required=True) if is_one_source else group
    source.add_argument(
        "--data-path", nargs="+", metavar="PREFIX",
        help="beginnings of documents, drawn from all over PREFIX.bin and PREFIX.idx; of several files, each is a "
        "domain",
    )  # fmt: skip
    source.add_argument(
        "--prompts-file", type=Path, metavar="FILE",
        help='lines of text, or of JSON with one of "prompt" (text), "messages" (a chat) and "ids", and perhaps '
        '"domain"',
    )  # fmt: skip
    group.add_argument(
        "--prompts", type=int, metavar="N", help=f"how many; default {default_prompts}, or all if there are fewer"
    )
    group.add_argument(
        "--prompt-length", type=int, metavar="N", help=f"tokens of each, with --data-path; default {default_length}"
    )
    group.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja template for chats; default: the tokenizer's"
    )
    group.add_argument("--seed", type=int, default=1234, metavar="N", help="of all that is drawn; default 1234")
    parser.set_defaults(default_prompts=default_prompts, default_length=default_length)


def load_prompts(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    model: WorkerDescription,
    room: int,
    least: int = 1,
    excluded: Collection[str] = (),
) -> PromptSet:
    """The prompts of the flags. room: tokens of the answer that must fit behind each; 1: the prompt alone must. least:
    how many are needed, even if fewer are asked for. excluded: `prompt_digest` of those that are not to be drawn.

    Raises ValueError if there are too few, one is damaged or does not fit; OSError for files that cannot be read."""
    from megatron.early_exit.evaluation.documents import content_digest

    _check_numbers(args, longest_prompt(model, room), room)
    source = _Documents(args, model) if args.data_path else _Lines(args, tokenizer, model.vocab_size)
    drawn = _drawn(args, source, least, frozenset(excluded))
    _check_lengths(drawn, longest_prompt(model, room), room)
    template = source.template
    return PromptSet(
        prompts=tuple(drawn),
        digest=ids_digest(prompt.ids for prompt in drawn),
        template_digest=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        data={str(path): content_digest(path) for path in source.files},
    )


def longest_prompt(model: WorkerDescription, room: int) -> int:
    """Tokens of the longest prompt that can have an answer of `room` tokens; the last of them takes no place."""
    return model.num_positions - room + 1


def ids_digest(sequences: Iterable[Sequence[int]]) -> str:
    """SHA-256 of sequences of ids, each with its length before it, as little-endian int64."""
    import numpy as np

    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(np.array([len(ids), *ids], dtype="<i8").tobytes())
    return digest.hexdigest()


def prompt_digest(ids: Sequence[int]) -> str:
    """What tells one prompt from others."""
    return ids_digest([ids])[:16]


def check_unseen(prompts: Iterable[EvalPrompt], seen: Collection[str]) -> None:
    """Raise ValueError if some of the prompts are among those with the digests `seen`, which probes were trained on."""
    known = frozenset(seen)
    found = [prompt.name for prompt in prompts if prompt_digest(prompt.ids) in known]
    if found:
        raise ValueError(
            f"{len(found)} of the prompts, {found[0]} for instance, are those that the probes were trained on, whose "
            "scores are better there than elsewhere; leave them out"
        )


def _check_numbers(args: argparse.Namespace, longest: int, room: int) -> None:
    if args.prompts is not None and args.prompts < 1:
        raise ValueError(f"--prompts is {args.prompts}; it must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must be 0 or more")
    if longest < 1:
        raise ValueError(f"answers of {room} tokens leave no room for a prompt: the model takes {longest + room - 1}")
    if args.prompt_length is not None and not args.data_path:
        raise ValueError("--prompt-length has no effect without --data-path")
    if args.chat_template is not None and not args.prompts_file:
        raise ValueError("--chat-template has no effect without --prompts-file")
    length = prompt_length(args)
    if args.data_path and not 1 <= length <= longest:
        raise ValueError(
            f"--prompt-length is {length}; with an answer of {room} tokens the model takes 1 to {longest} "
            "(see --max-length)"
        )


def prompt_length(args: argparse.Namespace) -> int:
    """Tokens of each beginning of a document."""
    length: int = args.default_length if args.prompt_length is None else args.prompt_length
    return length


def _drawn(
    args: argparse.Namespace, source: _Documents | _Lines, least: int, excluded: frozenset[str]
) -> list[EvalPrompt]:
    """Prompts in random order, none twice and none that is excluded. Raises ValueError if there are too few."""
    import numpy as np

    needed = max(args.prompts or 1, least)
    wanted = max(needed, args.default_prompts) if args.prompts is None else needed
    drawn: dict[tuple[int, ...], EvalPrompt] = {}
    num_twice = num_excluded = 0
    for place in np.random.default_rng(args.seed).permutation(source.count):
        if len(drawn) == wanted:
            break
        prompt = source.prompt(int(place))
        if prompt.ids in drawn:
            num_twice += 1
        elif excluded and prompt_digest(prompt.ids) in excluded:
            num_excluded += 1
        else:
            drawn[prompt.ids] = prompt
    if num_twice:
        log.warning("%d prompts have the same ids as others and were left out", num_twice)
    if num_excluded:
        log.warning("%d prompts were left out, since the probes were trained on them", num_excluded)
    if len(drawn) < needed:
        but = f" that the probes were not trained on ({num_excluded} others)" if num_excluded else ""
        raise ValueError(
            f"{needed} prompts are needed, but {source.where} has {len(drawn)} different {source.words}{but}; give "
            "more text, or ask for fewer"
        )
    return list(drawn.values())


def _check_lengths(prompts: Sequence[EvalPrompt], longest: int, room: int) -> None:
    too_long = [prompt for prompt in prompts if len(prompt.ids) > longest]
    if too_long:
        worst = max(too_long, key=lambda prompt: len(prompt.ids))
        answer = f" with an answer of {room} tokens" if room > 1 else ""
        raise ValueError(
            f"{len(too_long)} of {len(prompts)} prompts are too long{answer}: the model takes {longest} tokens, and "
            f"{worst.name} has {len(worst.ids)}; leave them out, or see --max-length"
        )


class _Documents:
    """Beginnings of all documents that are long enough."""

    template = None

    def __init__(self, args: argparse.Namespace, model: WorkerDescription) -> None:
        import numpy as np
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        from megatron.early_exit.data.token_files import check_token_file

        prefixes = list(dict.fromkeys(args.data_path))
        files = [check_token_file(prefix) for prefix in prefixes]
        for file in files:
            file.check_ids(model.vocab_size)
        self._length, self._vocab_size = prompt_length(args), model.vocab_size
        self._prefixes, self._datasets = prefixes, [IndexedDataset(prefix) for prefix in prefixes]
        self._documents = [np.flatnonzero(file.sequence_lengths >= self._length) for file in files]
        names = [Path(prefix).name for prefix in prefixes]
        self._domains = [None] if len(names) == 1 else names if len(set(names)) == len(names) else prefixes
        self._ends = np.cumsum([len(documents) for documents in self._documents])
        self.count = int(self._ends[-1])
        self.files = [Path(f"{prefix}.{suffix}") for prefix in prefixes for suffix in ("bin", "idx")]
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


class _Lines:
    """The lines of a file that are not blank. Damaged ones are found before the first prompt is drawn."""

    words = "prompts"

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int) -> None:
        from megatron.early_exit.data.chat_template import read_chat_template

        path = args.prompts_file
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lines = _lines_of_one_kind(path)
        self.count, self.files, self.where = len(self._lines), [path], str(path)
        self.template: str | None = None
        if self._lines[0].key == "messages":
            given = None if args.chat_template is None else read_chat_template(args.chat_template)
            self.template = given or tokenizer.chat_template
            if self.template is None:
                raise ValueError(
                    f"{path} holds chats, but the model's tokenizer has no chat template; give --chat-template FILE"
                )
        elif args.chat_template is not None:
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
