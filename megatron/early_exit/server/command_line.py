"""The program behind `tools/run_text_generation_server.py`: flags in, a server."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron.early_exit.data.chat_template import read_chat_template
from megatron.early_exit.inference.model_flags import check_torchrun, engine_settings
from megatron.early_exit.inference.params import (
    CertifiedThresholds,
    GenerationParams,
)
from megatron.early_exit.platform.command_line import run_program
from megatron.early_exit.platform.failures import in_words
from megatron.early_exit.platform.processes import die_with_torchrun
from megatron.early_exit.platform.program_flags import parse_flags
from megatron.early_exit.platform.world import world_size
from megatron.early_exit.server.config import EngineConfig, RequestLimits, ServerConfig
from megatron.early_exit.server.exit_flags import check_certified
from megatron.early_exit.server.server_flags import PROGRAM, ServerFlags, build_parser

KEY_VARIABLE = "EARLY_EXIT_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server. Returns the exit status: 1 if the engine has failed, 2 for settings that cannot work.

    In a process of torchrun whose rank is not 0, serve rank 0 until it ends."""
    from megatron.early_exit.inference.executor.base import ExecutorError

    flags = parse_flags(build_parser(), ServerFlags, argv)
    try:
        if os.environ.get("RANK", "0") != "0" and world_size() > 1:
            from megatron.early_exit.inference.executor.worker_process import serve_torchrun_rank

            return serve_torchrun_rank()
        check_torchrun(flags)
        die_with_torchrun()
        config = server_config(flags)
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


def server_config(flags: ServerFlags) -> ServerConfig:
    """The settings that the flags say. Raises ValueError or OSError."""
    if flags.restart_workers and world_size() > 1:
        raise ValueError(
            "--restart-workers cannot start torchrun's processes again; have torchrun do it (--max-restarts)"
        )
    template = None if flags.chat_template is None else read_chat_template(Path(flags.chat_template))
    settings = {**engine_settings(flags), "chat_template": template, "audit_share": flags.audit_share}
    return ServerConfig(
        engine=EngineConfig(flags.load, settings, flags.worker_timeout, flags.restart_workers),
        host=flags.host,
        port=flags.port,
        served_model_name=flags.served_model_name,
        defaults=_defaults(flags),
        chat_template=template,
        limits=RequestLimits(**{field.name: getattr(flags, field.name) for field in fields(RequestLimits)}),
        api_keys=_api_keys(flags),
        allowed_origins=tuple(flags.allowed_origins),
        drain_seconds=flags.drain_seconds,
        access_log=not flags.no_access_log,
    )


def _defaults(flags: ServerFlags) -> GenerationParams:
    names = (
        "exit_layers", "draft_source", "draft_exit", "draft_length", "draft_min_confidence", "mode", "max_deferred",
        "plan_exits", "exit_score", "speculation",
    )  # fmt: skip
    given = {"exit_thresholds": flags.early_exit_thres, **{name: getattr(flags, name) for name in names}}
    check_certified(flags.certified, flags.early_exit_thres, flags.mode)
    if flags.certified is not None:
        given |= {"exit_thresholds": CertifiedThresholds(flags.certified), "mode": "early_exit"}
    return GenerationParams(**{name: value for name, value in given.items() if value is not None})


def _api_keys(flags: ServerFlags) -> tuple[str, ...]:
    keys = [*flags.api_key, *([os.environ[KEY_VARIABLE]] if KEY_VARIABLE in os.environ else [])]
    if flags.api_key_file is not None:
        from_file = [line.strip() for line in flags.api_key_file.read_text().splitlines() if line.strip()]
        if not from_file:
            raise ValueError(f"--api-key-file {flags.api_key_file} has no keys; give one a line")
        keys += from_file
    if not all(key.strip() for key in keys):
        raise ValueError(f"an API key is empty; see --api-key and {KEY_VARIABLE}")
    return tuple(keys)
