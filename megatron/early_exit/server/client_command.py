"""The program behind `tools/request_client.py`: prompts to a server, its answers to the terminal, coloured by exit."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.early_exit.inference.prompt_input import prompts_of_file, typed_prompts
from megatron.early_exit.platform.command_line import run_program
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.platform.program_flags import parse_flags
from megatron.early_exit.server.client import Client, RequestFailed, ServerUnavailable
from megatron.early_exit.server.client_flags import PROGRAM, ClientFlags, build_parser
from megatron.early_exit.server.client_sessions import MegatronSession, OpenAISession
from megatron.early_exit.server.exit_flags import check_certified


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client. Returns the exit status: 1 if a request was refused, 2 if there is no server to ask."""
    flags = parse_flags(build_parser(), ClientFlags, argv)
    try:
        _check(flags)
        prompts = [*flags.prompts, *_prompts_of_file(flags.prompt_file)]
        api_key = os.environ.get("EARLY_EXIT_API_KEY") if flags.api_key is None else flags.api_key
        client = Client(flags.url, api_key, flags.wait, flags.busy, flags.timeout)
        session = (MegatronSession if flags.api == "megatron" else OpenAISession)(flags, client)
        all_answered = True
        for prompt in prompts or typed_prompts():
            try:
                session.ask(prompt)
            except RequestFailed as error:
                print(f"{PROGRAM}: {error}", file=sys.stderr, flush=True)
                all_answered = False
        return 0 if all_answered else 1
    except (ServerUnavailable, ValueError) as error:
        print(f"{PROGRAM}: {in_words(error)}", file=sys.stderr, flush=True)
        return 2


def run() -> int:
    """The console command `early-exit-client`."""
    return run_program(main)


def _check(flags: ClientFlags) -> None:
    check_certified(flags.certified, flags.early_exit_thres, flags.mode)
    of_openai = {
        "--chat": flags.chat or None, "--exit-score": flags.exit_score, "--draft-source": flags.draft_source,
        "--draft-exit": flags.draft_exit, "--draft-length": flags.draft_length,
    }  # fmt: skip
    if flags.api == "megatron":
        useless = [flag for flag, value in of_openai.items() if value is not None]
        if flags.mode == "self_speculative":
            useless.append("--mode self_speculative")
        if useless:
            raise ValueError(f"{', '.join(useless)}: /api has no such thing; leave out --api megatron")
        if flags.early_exit_thres is not None and len(flags.early_exit_thres) > 1:
            raise ValueError("--early-exit-thres: /api takes one for all exits; leave out --api megatron")
    elif flags.print_max_prob:
        raise ValueError("--print-max-prob needs --api megatron")


def _prompts_of_file(path: Path | None) -> list[str]:
    """Lines, or the fields `text` of JSON lines. Raises ValueError."""
    lines = prompts_of_file(path)
    return [_text_field(line, path) for line in lines] if path is not None and path.suffix == ".jsonl" else lines


def _text_field(line: str, path: Path) -> str:
    try:
        text: str = json.loads(line)["text"]
        return text
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--prompt-file {path}: {line[:40]!r} is no JSON object with the field text") from error
