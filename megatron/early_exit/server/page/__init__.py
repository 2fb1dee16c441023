"""The web page at `/`, and what it asks the server about the model.

The page is one response with its styles and scripts in it. Its content security policy names them by their hashes, so
nothing else runs, and it reaches no other host.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from pydantic import BaseModel

from megatron.early_exit.inference.params import CertifiedThresholds, DraftSourceChoice, ExitScore
from megatron.early_exit.server.context import ServerContext
from megatron.early_exit.server.openai_api.errors import ERROR_RESPONSES
from megatron.early_exit.server.openai_api.models import CertifiedLevel, certified_levels

_FOLDER = Path(__file__).parent
_STYLE = re.compile(r'<link rel="stylesheet" href="(\w+\.css)">')
_SCRIPT = re.compile(r'<script src="(\w+\.js)"></script>')


class PageDefaults(BaseModel):
    """What the server does where a request says nothing."""

    mode: str
    exit_thresholds: list[float]
    """One for all exits, or one for each."""
    certified: float | None
    """The level in place of thresholds."""
    exit_layers: list[int]
    """Those that are evaluated."""
    exit_score: ExitScore
    """What thresholds are compared with."""
    draft_source: DraftSourceChoice
    """`ngram` for a model without exits that may draft."""
    draft_exit: int | None
    """None for a model without exits that may draft."""


class PageModel(BaseModel):
    """What the page needs to know of the model."""

    name: str
    """In the OpenAI API."""
    num_layers: int
    exit_layers: list[int]
    """Layer numbers of the exits, ascending."""
    leaving_layers: list[int]
    """Of those that tokens may leave at."""
    drafting_layers: list[int]
    """Of those that may draft."""
    has_probes: bool
    """Whether thresholds may be compared with what probes say."""
    num_positions: int
    """Longest prompt and answer together, in tokens."""
    has_chat_template: bool
    certified: list[CertifiedLevel]
    """Levels that may be asked for, ascending."""
    defaults: PageDefaults


def router(context: ServerContext) -> APIRouter:
    """The page, and what it asks before its first request."""
    routes = APIRouter(tags=["page"])
    html, policy = _assemble()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    @routes.get("/page/model", responses={status: ERROR_RESPONSES[status] for status in (401, 503)})
    async def model() -> PageModel:
        """What the page needs to know of the model."""
        return _describe(context)

    return routes


def _describe(context: ServerContext) -> PageModel:
    """Raises NotReady while there is no model."""
    model, defaults = context.ready_model(), context.config.defaults
    exits = model.ready.exits
    leaving, drafting = list(exits.leaving_layers), list(exits.drafting_layers)
    thresholds = defaults.exit_thresholds
    return PageModel(
        name=context.model_name,
        num_layers=model.ready.description.num_layers,
        exit_layers=list(exits.exit_layer_nums),
        leaving_layers=leaving,
        drafting_layers=drafting,
        has_probes=model.ready.description.has_probes,
        num_positions=model.ready.description.num_positions,
        has_chat_template=bool(context.config.chat_template or model.tokenizer.chat_template),
        certified=certified_levels(model.ready),
        defaults=PageDefaults(
            mode=defaults.mode,
            exit_thresholds=[0.8] if isinstance(thresholds, CertifiedThresholds) else list(thresholds),
            certified=defaults.certified_level,
            exit_layers=list(defaults.exit_layers) or leaving,
            exit_score=defaults.exit_score or "head",
            draft_source=defaults.draft_source if drafting else "ngram",
            draft_exit=drafting[0] if drafting and defaults.draft_exit is None else defaults.draft_exit,
        ),
    )


def _assemble() -> tuple[str, str]:
    """The page with its styles and scripts in it, and the policy that allows these alone."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def inlined(match: re.Match[str], tag: str) -> str:
        source = (_FOLDER / match[1]).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        hashes[tag].append(f"'sha256-{digest}'")
        return f"<{tag}>{source}</{tag}>"

    html = (_FOLDER / "index.html").read_text(encoding="utf-8")
    html = _STYLE.sub(lambda match: inlined(match, "style"), html)
    html = _SCRIPT.sub(lambda match: inlined(match, "script"), html)
    policy = [
        "default-src 'none'",
        f"style-src {' '.join(hashes['style'])}",
        f"script-src {' '.join(hashes['script'])}",
        "connect-src 'self'",
        "img-src data:",  # the icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
    return html, "; ".join(policy)
