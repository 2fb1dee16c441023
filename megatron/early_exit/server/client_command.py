"""The program behind `tools/request_client.py`: prompts to a server, its answers to the terminal, coloured by exit."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.early_exit.inference.params import EXIT_SCORES
from megatron.early_exit.inference.prompt_input import prompts_of_file, typed_prompts
from megatron.early_exit.platform.command_line import add_verbose_flag, run_program
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.server.client import Client, RequestFailed, ServerUnavailable
from megatron.early_exit.server.client_sessions import MegatronSession, OpenAISession
from megatron.early_exit.server.exit_flags import check_certified

PROGRAM = "request_client.py"


def build_parser() -> argparse.ArgumentParser:
    """Flags; those of sampling and exits are as in `generate.py`."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Send prompts to a text-generation server and show the answers as they come. Without prompts it "
        "reads one a line from standard input.",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="one prompt a line; of .jsonl the field `text` of each line"
    )
    parser.add_argument("--chat", action="store_true", help="talk: each answer sees the conversation before it")
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:5000", help="where it listens; default %(default)s")
    server.add_argument("--api", choices=("openai", "megatron"), default="openai", help="megatron: PUT /api, no stream")
    server.add_argument("--api-key", default=os.environ.get("EARLY_EXIT_API_KEY"), help="default: EARLY_EXIT_API_KEY")
    server.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="until a server is there and ready")
    server.add_argument(
        "--busy", type=float, default=60.0, metavar="SECONDS", help="to try again where it is too busy; default 60"
    )
    server.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of silence; default 600")
    sampling = parser.add_argument_group("sampling (the default is greedy)")
    sampling.add_argument(
        "--tokens-to-generate", type=int, metavar="N", help="at most; default 64, or as was certified (--certified)"
    )
    sampling.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K most probable; 0: all")
    sampling.add_argument("--top-p", type=float, default=0.0, metavar="P", help="choose among probability P; 0: all")
    sampling.add_argument("--seed", type=int, default=1234)
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before this; repeatable")
    exits = parser.add_argument_group("early exit (the default is the server's)")
    exits.add_argument("--mode", choices=("full", "early_exit", "self_speculative"))
    exits.add_argument("--early-exit-thres", type=float, nargs="+", metavar="F", help="one, or one for each exit")
    exits.add_argument(
        "--certified", type=float, metavar="LEVEL", help="thresholds that are certified for this level, as in 0.99"
    )
    exits.add_argument("--exit-layers", type=int, nargs="+", metavar="N", help="exits to evaluate; default: all")
    exits.add_argument("--exit-score", choices=EXIT_SCORES, help="early_exit: what thresholds are compared with")
    exits.add_argument("--draft-source", choices=("exit", "ngram", "both"), help="self_speculative: what drafts")
    exits.add_argument("--draft-exit", type=int, metavar="N", help="self_speculative: exit that drafts")
    exits.add_argument("--draft-length", type=int, metavar="N", help="self_speculative: tokens to draft at once")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON document a line for each answer")
    output.add_argument("--print-max-prob", action="store_true", help="what evaluated exits predict (--api megatron)")
    output.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="colour text by exit")
    add_verbose_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client. Returns the exit status: 1 if a request was refused, 2 if there is no server to ask."""
    args = build_parser().parse_args(argv)
    try:
        _check(args)
        prompts = [*args.prompts, *_prompts_of_file(args.prompt_file)]
        client = Client(args.url, args.api_key, args.wait, args.busy, args.timeout)
        session = (MegatronSession if args.api == "megatron" else OpenAISession)(args, client)
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


def _check(args: argparse.Namespace) -> None:
    check_certified(args.certified, args.early_exit_thres, args.mode)
    of_openai = {
        "--chat": args.chat or None, "--exit-score": args.exit_score, "--draft-source": args.draft_source,
        "--draft-exit": args.draft_exit, "--draft-length": args.draft_length,
    }  # fmt: skip
    if args.api == "megatron":
        useless = [flag for flag, value in of_openai.items() if value is not None]
        if args.mode == "self_speculative":
            useless.append("--mode self_speculative")
        if useless:
            raise ValueError(f"{', '.join(useless)}: /api has no such thing; leave out --api megatron")
        if args.early_exit_thres is not None and len(args.early_exit_thres) > 1:
            raise ValueError("--early-exit-thres: /api takes one for all exits; leave out --api megatron")
    elif args.print_max_prob:
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
