"""The program behind `tools/run_text_generation_server.py`: flags in, a server."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

from megatron.early_exit.inference.model_flags import add_model_flags, check_torchrun, engine_settings
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.platform.command_line import add_verbose_flag
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.platform.processes import die_with_torchrun
from megatron.early_exit.platform.world import world_size
from megatron.early_exit.server.config import EngineConfig, RequestLimits, ServerConfig

PROGRAM = "run_text_generation_server.py"


def build_parser() -> argparse.ArgumentParser:
    """Flags; --load and those of exits are as in `generate.py`."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Serve an early-exit model over HTTP: the OpenAI API, Megatron's /api, metrics, and a page to try "
        "it.",
    )
    add_model_flags(parser)
    ignored = parser.add_argument_group("accepted from EE-LLM's scripts (the checkpoint says all this)")
    ignored.add_argument("--use-checkpoint-args", action="store_true", help="always so")
    ignored.add_argument("--tokenizer-type", metavar="TYPE", help="ignored: the checkpoint has its tokenizer")
    ignored.add_argument("--tokenizer-model", metavar="FILE", help="ignored: the checkpoint has its tokenizer")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    server.add_argument("--port", type=int, default=5000, help="0: any free one; default 5000")
    server.add_argument("--served-model-name", metavar="NAME", help="in the OpenAI API; default: the folder's name")
    server.add_argument("--chat-template", metavar="FILE", help="Jinja template for chats; default: the tokenizer's")
    server.add_argument("--restart-workers", action="store_true", help="load the model again if the engine dies")
    server.add_argument("--drain-seconds", type=float, default=30.0, help="for running requests at the end; default 30")
    server.add_argument("--max-waiting", type=int, default=256, help="answers that may wait for a slot; default 256")
    exits = parser.add_argument_group("early exit (for requests that do not say)")
    exits.add_argument("--mode", choices=("full", "early_exit", "self_speculative"), help="default: full")
    exits.add_argument("--early-exit-thres", type=float, nargs="+", metavar="F", help="one, or one for each exit")
    exits.add_argument("--exit-layers", type=int, nargs="+", metavar="N", help="exits to evaluate; default: all")
    exits.add_argument("--draft-exit", type=int, metavar="N", help="self_speculative: exit that drafts")
    exits.add_argument("--draft-length", type=int, metavar="N", help="self_speculative: tokens to draft at once")
    add_verbose_flag(parser)
    return parser


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


def server_config(args: argparse.Namespace) -> ServerConfig:
    """The settings that the flags say. Raises ValueError."""
    given = {
        "exit_thresholds": args.early_exit_thres, "exit_layers": args.exit_layers, "draft_exit": args.draft_exit,
        "draft_length": args.draft_length, "mode": args.mode,
    }  # fmt: skip
    defaults = GenerationParams(**{name: value for name, value in given.items() if value is not None})
    return ServerConfig(
        engine=EngineConfig(args.load, engine_settings(args), args.worker_timeout, args.restart_workers),
        host=args.host,
        port=args.port,
        served_model_name=args.served_model_name,
        defaults=defaults,
        limits=RequestLimits(max_waiting=args.max_waiting),
        drain_seconds=args.drain_seconds,
    )
