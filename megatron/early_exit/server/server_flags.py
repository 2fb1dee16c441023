"""The flags of `tools/run_text_generation_server.py`; --load and those of exits are as in `generate.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron.early_exit.inference.model_flags import ModelFlags
from megatron.early_exit.inference.params import DraftSourceChoice, ExitScore, Mode, Speculation
from megatron.early_exit.platform.program_flags import Parser, Spelling, parser_of
from megatron.early_exit.server.config import RequestLimits

PROGRAM = "run_text_generation_server.py"


@dataclass(frozen=True, kw_only=True)
class ServingFlags:
    """server"""

    host: str = "127.0.0.1"
    """address to listen on; default: this machine alone"""

    port: int = 5000
    """0: any free one; default 5000"""

    served_model_name: Annotated[str, "NAME"] | None = None
    """in the OpenAI API; default: the folder's name"""

    chat_template: Annotated[str, "FILE"] | None = None
    """Jinja template for chats; default: the tokenizer's"""

    api_key_file: Annotated[Path, "FILE"] | None = None
    """keys, one a line, of which requests must bring one; or one key in the variable EARLY_EXIT_API_KEY"""

    api_key: Annotated[tuple[str, ...], "KEY", Spelling(action="append")] = ()
    """a key; other users of this machine can see it"""

    allowed_origins: Annotated[tuple[str, ...], "ORIGIN"] = ()
    """web sites whose pages may call the server, as https://host:port, or *; default: none"""

    restart_workers: bool = False
    """load the model again if the engine dies"""

    drain_seconds: float = 30.0
    """for running requests at the end; default 30"""

    no_access_log: bool = False
    """no line on standard output for each request"""


@dataclass(frozen=True, kw_only=True)
class EarlyExitFlags:
    """early exit (for requests that do not say)"""

    mode: Mode | None = None
    """default: full"""

    early_exit_thres: Annotated[tuple[float, ...], "F"] | None = None
    """one, or one for each exit"""

    certified: Annotated[float, "LEVEL"] | None = None
    """the thresholds that are certified for this level, as in 0.99, for greedy requests of the certified length;
    others get all layers; implies --mode early_exit"""

    exit_layers: Annotated[tuple[int, ...], "N"] | None = None
    """exits to evaluate; default: all"""

    max_deferred: Annotated[int, "N"] | None = None
    """rows of a request that may be deferred"""

    plan_exits: bool | None = None
    """only exits that pay (calibrate); default: where a certified level is asked for"""

    exit_score: ExitScore | None = None
    """as in generate.py"""

    draft_source: DraftSourceChoice | None = None
    """self_speculative: what drafts, as in generate.py"""

    draft_exit: Annotated[int, "N"] | None = None
    """self_speculative: exit that drafts"""

    draft_length: Annotated[int, "N"] | None = None
    """self_speculative: tokens to draft at once"""

    draft_min_confidence: Annotated[float, "F"] | None = None
    """self_speculative: as in generate.py; default: it adapts"""

    speculation: Speculation | None = None
    """as in generate.py; default: auto"""

    audit_share: Annotated[float, "F"] = 0.01
    """share of the early_exit requests of which the final head checks every token when they have ended, for /metrics;
    0: none; default 0.01"""


@dataclass(frozen=True, kw_only=True)
class LimitsFlags:
    """limits"""

    max_waiting: Annotated[int, "N"] = RequestLimits.max_waiting
    """answers that may wait for a slot; more get 429; default 256"""

    max_connections: Annotated[int, "N"] = RequestLimits.max_connections
    """open at once; more get 503; default 1024"""

    max_body_bytes: Annotated[int, "N"] = RequestLimits.max_body_bytes
    """of one request; larger ones get 413; default 8388608"""

    max_total_body_bytes: Annotated[int, "N"] = RequestLimits.max_total_body_bytes
    """of all requests at once; more get 429; default 134217728"""

    max_prompts: Annotated[int, "N"] = RequestLimits.max_prompts
    """in one request; default 128"""

    max_answers: Annotated[int, "N"] = RequestLimits.max_answers
    """prompts times n of one request; default 256"""

    header_seconds: Annotated[float, "N"] = RequestLimits.header_seconds
    """until the headers of a request are complete; default 20.0"""

    body_seconds: Annotated[float, "N"] = RequestLimits.body_seconds
    """until its body is; default 60.0"""

    reader_seconds: Annotated[float, "N"] = RequestLimits.reader_seconds
    """that a client may leave what was sent to it unread; default 60.0"""

    keep_alive_seconds: Annotated[int, "N"] = RequestLimits.keep_alive_seconds
    """that a connection may be idle between requests; default 120"""


@dataclass(frozen=True, kw_only=True)
class IgnoredFlags:
    """accepted from EE-LLM's scripts (the checkpoint says all this)"""

    use_checkpoint_args: bool = False
    """always so"""

    tokenizer_type: Annotated[str, "TYPE"] | None = None
    """ignored: the checkpoint has its tokenizer"""

    tokenizer_model: Annotated[str, "FILE"] | None = None
    """ignored: the checkpoint has its tokenizer"""


@dataclass(frozen=True, kw_only=True)
class ServerFlags(ModelFlags, ServingFlags, EarlyExitFlags, LimitsFlags, IgnoredFlags):
    """Serve an early-exit model over HTTP: the OpenAI API, Megatron's /api, metrics, and a page to try it."""


def build_parser() -> Parser:
    return parser_of(ServerFlags, PROGRAM)
