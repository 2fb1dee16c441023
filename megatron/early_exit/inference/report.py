"""Shows a generation to people (coloured text, tables) and to programs (JSON). Returns strings; prints nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron.early_exit.data.tokenizer import Tokenizer
from megatron.early_exit.inference.results import GeneratedToken, RequestResult
from megatron.early_exit.inference.text_engine import RequestOutput
from megatron.early_exit.platform.columns import aligned

# Colours (of 256) from the first layer to the last; the final head's text keeps the terminal's own colour.
_SHADES = (46, 118, 190, 226, 214, 208, 203)
_RESET = "\033[0m"


def in_colour(choice: str) -> bool:
    """Whether to colour what is printed. choice: of --color"""
    if choice == "auto":
        return sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return choice == "always"


def coloured(piece: str, generated: GeneratedToken, num_layers: int) -> str:
    """`piece` in the colour of the exit's depth, for a terminal."""
    if generated.is_final or not piece:
        return piece
    shade = _SHADES[min((generated.exit_layer - 1) * len(_SHADES) // max(num_layers, 1), len(_SHADES) - 1)]
    return f"\033[38;5;{shade}m{piece}{_RESET}"


def coloured_text(pieces: Sequence[str], tokens: Sequence[GeneratedToken], num_layers: int) -> str:
    """The text of all tokens, each with its piece in its colour."""
    return "".join(coloured(piece, token, num_layers) for piece, token in zip(pieces, tokens, strict=True))


def marked(texts: Sequence[str], tokens: Sequence[GeneratedToken]) -> str:
    """Every token's text with the head that produced it, where colours cannot show it: `the@6 cat@final`."""
    return " ".join(f"{text!r}@{_head(t.exit_layer, t.is_final)}" for text, t in zip(texts, tokens, strict=True))


def usage_table(output: RequestOutput, num_stages: int = 1) -> str:
    """Exit, tokens, share and mean confidence, and what was saved. num_stages: of the pipeline."""
    result = output.check()
    total, statistics = len(result.tokens), result.statistics
    rows = [("exit", "tokens", "share", "mean confidence")]
    for usage in result.usage:
        share = f"{usage.tokens / total:.1%}" if total else "-"
        rows.append((_head(usage.exit_layer, usage.is_final), str(usage.tokens), share, _number(usage.mean_confidence)))
    lines = [aligned(rows)]
    if statistics.acceptance is not None:
        of_text = ""
        if statistics.ngram_drafted:
            of_text = f"; from earlier text {statistics.ngram_accepted} of {statistics.ngram_drafted}"
        lines.append(f"drafted {statistics.drafted} tokens, accepted {statistics.acceptance:.1%}{of_text}")
    num_caught_up = sum(token.caught_up for token in result.tokens)
    notes = f" ({num_caught_up} tokens ran all layers because of the cap on deferred rows)" if num_caught_up else ""
    has_exits = len(result.usage) > 1  # else nothing could be saved
    if has_exits and statistics.full_layer_passes:  # none for an answer of one token, which comes with the prompt
        of_all = f"{statistics.runs_saved:.1%} of {statistics.full_layer_passes}"
        if num_stages > 1:  # with exact keys and values every row passes every stage in the end
            lines.append(f"layers that no token waited for: {of_all}{notes}")
        else:
            lines.append(
                f"layer runs saved: {of_all}, with all deferred rows run at once; row computations saved: "
                f"{statistics.layers_saved:.1%}{notes}"
            )
    lines.append(f"{_speed(result)}; stopped by {result.finish_reason}")
    return "\n".join(lines)


def _speed(result: RequestResult) -> str:
    statistics, total = result.statistics, len(result.tokens)
    if statistics.first_token_seconds is None:
        return "no tokens"
    text = f"{total} token{'s' * (total != 1)}, the first after {statistics.first_token_seconds:.2f} s"
    if total > 1:
        rate = (total - 1) / max(statistics.decode_seconds, 1e-9)
        text += f", the others in {statistics.decode_seconds:.2f} s ({rate:.1f} tokens/s)"
    return text


def predictions_table(texts: Sequence[str], tokens: Sequence[GeneratedToken], tokenizer: Tokenizer) -> str:
    """For every token what each evaluated head predicts, with its confidence; the last one gave the token."""
    rows = [("token", "text", "exit", "log-prob", "most probable token and confidence of each evaluated head")]
    for index, (text, token) in enumerate(zip(texts, tokens, strict=True)):
        predictions = "  ".join(
            f"{_head(p.exit_layer, p.exit_layer is None)}: {tokenizer.detokenize([p.token])!r} {_number(p.confidence)}"
            for p in token.predictions
        )
        head = _head(token.exit_layer, token.is_final)
        rows.append((str(index), repr(text), head, _number(token.log_prob), predictions))
    return aligned(rows)


def as_json(prompt: str, output: RequestOutput) -> dict[str, Any]:
    """Everything about one output, ready for `json.dumps`."""
    document: dict[str, Any] = {"prompt": prompt, "finish_reason": output.finish_reason}
    if output.result is None:
        return document | {"error": output.error}
    result, statistics = output.result, output.result.statistics
    total = max(len(result.tokens), 1)
    pairs = zip(output.pieces, result.tokens, strict=True)
    return document | {
        "error": output.error,
        "text": output.text,
        "tokens": [{"text": text, **asdict(token)} for text, token in pairs],
        "prompt_tokens": [asdict(token) for token in result.prompt],
        "exits": [{**asdict(usage), "share": usage.tokens / total} for usage in result.usage],
        **asdict(statistics),
        "layers_saved": statistics.layers_saved,
        "runs_saved": statistics.runs_saved,
        "acceptance": statistics.acceptance,
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _head(exit_layer: int | None, is_final: bool) -> str:
    return "final" if is_final else str(exit_layer)
