"""The flags of `tools/request_client.py`; those of sampling and exits are as in `generate.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron.early_exit.inference.params import DraftSourceChoice, ExitScore, Mode
from megatron.early_exit.platform.program_flags import Parser, Spelling, parser_of

PROGRAM = "request_client.py"


@dataclass(frozen=True, kw_only=True)
class ConnectionFlags:
    """server"""

    url: str = "http://127.0.0.1:5000"
    """where it listens; default http://127.0.0.1:5000"""

    api: Literal["openai", "megatron"] = "openai"
    """megatron: PUT /api, no stream"""

    api_key: str | None = None
    """default: EARLY_EXIT_API_KEY"""

    wait: Annotated[float, "SECONDS"] = 0.0
    """until a server is there and ready"""

    busy: Annotated[float, "SECONDS"] = 60.0
    """to try again where it is too busy; default 60"""

    timeout: Annotated[float, "SECONDS"] = 600.0
    """of silence; default 600"""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """sampling (the default is greedy)"""

    tokens_to_generate: Annotated[int, "N"] | None = None
    """at most; default 64, or as was certified (--certified)"""

    temperature: float = 0.0
    """0: greedy"""

    top_k: Annotated[int, "K"] = 0
    """choose among the K most probable; 0: all"""

    top_p: Annotated[float, "P"] = 0.0
    """choose among probability P; 0: all"""

    seed: int = 1234

    stop: Annotated[tuple[str, ...], "TEXT", Spelling(action="append")] = ()
    """stop before this; repeatable"""


@dataclass(frozen=True, kw_only=True)
class EarlyExitFlags:
    """early exit (the default is the server's)"""

    mode: Mode | None = None

    early_exit_thres: Annotated[tuple[float, ...], "F"] | None = None
    """one, or one for each exit"""

    certified: Annotated[float, "LEVEL"] | None = None
    """thresholds that are certified for this level, as in 0.99"""

    exit_layers: Annotated[tuple[int, ...], "N"] | None = None
    """exits to evaluate; default: all"""

    exit_score: ExitScore | None = None
    """early_exit: what thresholds are compared with"""

    draft_source: DraftSourceChoice | None = None
    """self_speculative: what drafts"""

    draft_exit: Annotated[int, "N"] | None = None
    """self_speculative: exit that drafts"""

    draft_length: Annotated[int, "N"] | None = None
    """self_speculative: tokens to draft at once"""


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """output"""

    json: bool = False
    """one JSON document a line for each answer"""

    print_max_prob: bool = False
    """what evaluated exits predict (--api megatron)"""

    color: Literal["auto", "always", "never"] = "auto"
    """colour text by exit"""


@dataclass(frozen=True, kw_only=True)
class ClientFlags(ConnectionFlags, SamplingFlags, EarlyExitFlags, OutputFlags):
    """Send prompts to a text-generation server and show the answers as they come. Without prompts it reads one a line
    from standard input."""

    prompts: Annotated[tuple[str, ...], "PROMPT", Spelling(nargs="*", is_positional=True)]
    prompt_file: Annotated[Path, "FILE"] | None = None
    """one prompt a line; of .jsonl the field `text` of each line"""

    chat: bool = False
    """talk: each answer sees the conversation before it"""


def build_parser() -> Parser:
    return parser_of(ClientFlags, PROGRAM)
