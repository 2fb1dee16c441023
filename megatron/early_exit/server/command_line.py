"""The program behind `tools/run_text_generation_server.py`: flags in, a server."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron.early_exit.data.chat_template import read_chat_template
from megatron.early_exit.inference.model_flags import add_model_flags, check_torchrun, engine_settings
from megatron.early_exit.inference.params import (
    DRAFT_SOURCES,
    EXIT_SCORES,
    MODES,
    SPECULATIONS,
    CertifiedThresholds,
    GenerationParams,
)
from megatron.early_exit.platform.command_line import add_verbose_flag, run_program
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.platform.processes import die_with_torchrun
from megatron.early_exit.platform.world import world_size
from megatron.early_exit.server.config import EngineConfig, RequestLimits, ServerConfig
from megatron.early_exit.server.exit_flags import check_certified

PROGRAM = "run_text_generation_server.py"
KEY_VARIABLE = "EARLY_EXIT_API_KEY"

_LIMITS = {
    "max_waiting": "answers that may wait for a slot; more get 429",
    "max_connections": "open at once; more get 503",
    "max_body_bytes": "of one request; larger ones get 413",
    "max_total_body_bytes": "of all requests at once; more get 429",
    "max_prompts": "in one request",
    "max_answers": "prompts times n of one request",
    "header_seconds": "until the headers of a request are complete",
    "body_seconds": "until its body is",
    "reader_seconds": "that a client may leave what was sent to it unread",
    "keep_alive_seconds": "that a connection may be idle between requests",
}
"""Fields of `RequestLimits`, which are flags of the same names."""


def build_parser() -> argparse.ArgumentParser:
    """Flags; --load and those of exits are as in `generate.py`."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Serve an early-exit model over HTTP: the OpenAI API, Megatron's /api, metrics, and a page to try "
        "it.",
    )
    add_model_flags(parser)
    _add_server_flags(parser)
    _add_early_exit_flags(parser)
    limits = parser.add_argument_group("limits")
    for field in fields(RequestLimits):
        kind = float if isinstance(field.default, float) else int
        limits.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=field.default, metavar="N",
            help=f"{_LIMITS[field.name]}; default {field.default}",
        )  # fmt: skip
    ignored = parser.add_argument_group("accepted from EE-LLM's scripts (the checkpoint says all this)")
    ignored.add_argument("--use-checkpoint-args", action="store_true", help="always so")
    ignored.add_argument("--tokenizer-type", metavar="TYPE", help="ignored: the checkpoint has its tokenizer")
    ignored.add_argument("--tokenizer-model", metavar="FILE", help="ignored: the checkpoint has its tokenizer")
    add_verbose_flag(parser)
    return parser


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    server.add_argument("--port", type=int, default=5000, help="0: any free one; default 5000")
    server.add_argument("--served-model-name", metavar="NAME", help="in the OpenAI API; default: the folder's name")
    server.add_argument("--chat-template", metavar="FILE", help="Jinja template for chats; default: the tokenizer's")
    server.add_argument(
        "--api-key-file", type=Path, metavar="FILE",
        help=f"keys, one a line, of which requests must bring one; or one key in the variable {KEY_VARIABLE}",
    )  # fmt: skip
    server.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="a key; other users of this machine can see it"
    )
    server.add_argument(
        "--allowed-origins", nargs="+", default=[], metavar="ORIGIN",
        help="web sites whose pages may call the server, as https://host:port, or *; default: none",
    )  # fmt: skip
    server.add_argument("--restart-workers", action="store_true", help="load the model again if the engine dies")
    server.add_argument("--drain-seconds", type=float, default=30.0, help="for running requests at the end; default 30")
    server.add_argument("--no-access-log", action="store_true", help="no line on standard output for each request")


def _add_early_exit_flags(parser: argparse.ArgumentParser) -> None:
    exits = parser.add_argument_group("early exit (for requests that do not say)")
    exits.add_argument("--mode", choices=MODES, help="default: full")
    exits.add_argument("--early-exit-thres", type=float, nargs="+", metavar="F", help="one, or one for each exit")
    exits.add_argument(
        "--certified", type=float, metavar="LEVEL",
        help="the thresholds that are certified for this level, as in 0.99, for greedy requests of the certified "
        "length; others get all layers; implies --mode early_exit",
    )  # fmt: skip
    exits.add_argument("--exit-layers", type=int, nargs="+", metavar="N", help="exits to evaluate; default: all")
    exits.add_argument("--max-deferred", type=int, metavar="N", help="rows of a request that may be deferred")
    exits.add_argument(
        "--plan-exits", action=argparse.BooleanOptionalAction,
        help="only exits that pay (calibrate); default: where a certified level is asked for",
    )  # fmt: skip
    exits.add_argument("--exit-score", choices=EXIT_SCORES, help="as in generate.py")
    exits.add_argument("--draft-source", choices=DRAFT_SOURCES, help="self_speculative: what drafts, as in generate.py")
    exits.add_argument("--draft-exit", type=int, metavar="N", help="self_speculative: exit that drafts")
    exits.add_argument("--draft-length", type=int, metavar="N", help="self_speculative: tokens to draft at once")
    exits.add_argument(
        "--draft-min-confidence",
        type=float,
        metavar="F",
        help="self_speculative: as in generate.py; default: it adapts",
    )
    exits.add_argument("--speculation", choices=SPECULATIONS, help="as in generate.py; default: auto")
    exits.add_argument(
        "--audit-share", type=float, default=0.01, metavar="F",
        help="share of the early_exit requests of which the final head checks every token when they have ended, for "
        "/metrics; 0: none; default 0.01",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server. Returns the exit status: 1 if the engine has failed, 2 for settings that cannot work.

    In a process of torchrun whose rank is not 0, serve rank 0 until it ends."""
    from megatron.early_exit.inference.executor.base import ExecutorError

    args = build_parser().parse_args(argv)
    try:
        if os.environ.get("RANK", "0") != "0" and world_size() > 1:
            from megatron.early_exit.inference.executor.worker_process import serve_torchrun_rank

            return serve_torchrun_rank()
        check_torchrun(args)
        die_with_torchrun()
        config = server_config(args)
        from megatron.early_exit.server.run import serve

        return asyncio.run(serve(config))
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {in_words(error)}", file=sys.stderr, flush=True)
        return 2
    except ExecutorError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr, flush=True)
        return 1


def run() -> int:
    """The console command `early-exit-server`. Returns the exit status."""
    return run_program(main)


def server_config(args: argparse.Namespace) -> ServerConfig:
    """The settings that the flags say. Raises ValueError or OSError."""
    if args.restart_workers and world_size() > 1:
        raise ValueError(
            "--restart-workers cannot start torchrun's processes again; have torchrun do it (--max-restarts)"
        )
    template = None if args.chat_template is None else read_chat_template(Path(args.chat_template))
    settings = {**engine_settings(args), "chat_template": template, "audit_share": args.audit_share}
    return ServerConfig(
        engine=EngineConfig(args.load, settings, args.worker_timeout, args.restart_workers),
        host=args.host,
        port=args.port,
        served_model_name=args.served_model_name,
        defaults=_defaults(args),
        chat_template=template,
        limits=RequestLimits(**{field.name: getattr(args, field.name) for field in fields(RequestLimits)}),
        api_keys=_api_keys(args),
        allowed_origins=tuple(args.allowed_origins),
        drain_seconds=args.drain_seconds,
        access_log=not args.no_access_log,
    )


def _defaults(args: argparse.Namespace) -> GenerationParams:
    names = (
        "exit_layers", "draft_source", "draft_exit", "draft_length", "draft_min_confidence", "mode", "max_deferred",
        "plan_exits", "exit_score", "speculation",
    )  # fmt: skip
    given = {"exit_thresholds": args.early_exit_thres, **{name: getattr(args, name) for name in names}}
    check_certified(args.certified, args.early_exit_thres, args.mode)
    if args.certified is not None:
        given |= {"exit_thresholds": CertifiedThresholds(args.certified), "mode": "early_exit"}
    return GenerationParams(**{name: value for name, value in given.items() if value is not None})


def _api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = [*args.api_key, *([os.environ[KEY_VARIABLE]] if KEY_VARIABLE in os.environ else [])]
    if args.api_key_file is not None:
        from_file = [line.strip() for line in args.api_key_file.read_text().splitlines() if line.strip()]
        if not from_file:
            raise ValueError(f"--api-key-file {args.api_key_file} has no keys; give one a line")
        keys += from_file
    if not all(key.strip() for key in keys):
        raise ValueError(f"an API key is empty; see --api-key and {KEY_VARIABLE}")
    return tuple(keys)
