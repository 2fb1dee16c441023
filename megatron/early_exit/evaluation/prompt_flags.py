"""The flags of prompts, and the prompts that they ask for.

No prompt comes twice, and those that are taken are drawn at random: any part of them is a sample like the whole."""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.prompt_sources import Documents, Lines, PromptSource
from megatron.early_exit.evaluation.prompts import EvalPrompt, PromptSet, ids_digest, longest_prompt, prompt_digest

if TYPE_CHECKING:
    from megatron.early_exit.data.tokenizer import Tokenizer
    from megatron.early_exit.inference.protocol import WorkerDescription

log = logging.getLogger(__name__)


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
    source = _source(args, tokenizer, model.vocab_size)
    drawn = _drawn(args, source, least, frozenset(excluded))
    _check_lengths(drawn, longest_prompt(model, room), room)
    template = source.template
    return PromptSet(
        prompts=tuple(drawn),
        digest=ids_digest(prompt.ids for prompt in drawn),
        template_digest=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        data={str(path): content_digest(path) for path in source.files},
    )


def _source(args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int) -> PromptSource:
    if args.data_path:
        return Documents(args.data_path, prompt_length(args), vocab_size)
    return Lines(args.prompts_file, args.chat_template, tokenizer, vocab_size)


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


def _drawn(args: argparse.Namespace, source: PromptSource, least: int, excluded: frozenset[str]) -> list[EvalPrompt]:
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
