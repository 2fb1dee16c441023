"""The flags of `tools/generate.py`. Imports neither torch nor core."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron.early_exit.inference.model_flags import ModelFlags
from megatron.early_exit.inference.params import DraftSourceChoice, ExitScore, Mode, Speculation
from megatron.early_exit.platform.program_flags import Parser, Spelling, parser_of


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no ID:BIAS, as in 5:-100") from None


@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """prompts"""

    prompt: Annotated[tuple[str, ...], "TEXT", Spelling(action="append")] = ()
    """may be given several times"""

    prompt_file: Annotated[Path, "FILE"] | None = None
    """one prompt a line; empty lines are skipped"""

    no_special_tokens: bool = False
    """give the prompt's text alone, without the begin-of-text token that the tokenizer may add"""

    chat: bool = False
    """talk: each answer sees the conversation before it"""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """sampling (the default is greedy)"""

    tokens_to_generate: Annotated[int, "N"] | None = None
    """at most; default 64, or as was certified (--certified)"""

    min_tokens: Annotated[int, "N"] = 0
    """no end and no stop before; default 0"""

    temperature: float | None = None
    """0: greedy; default: 1 with --top-k, --top-p or --min-p"""

    top_k: Annotated[int, "K"] = 0
    """choose among the K most probable; 0: all"""

    top_p: Annotated[float, "P"] = 0.0
    """choose among the fewest with probability P; 0: all"""

    top_p_decay: Annotated[float, "F"] = 0.0
    """multiply top-p by this a token"""

    top_p_bound: Annotated[float, "P"] = 0.0
    """top-p decays no further"""

    min_p: Annotated[float, "F"] = 0.0
    """leave out what is below this share of the best; 0: none"""

    repetition_penalty: Annotated[float, "F"] = 1.0
    """1: off"""

    frequency_penalty: Annotated[float, "F"] = 0.0
    """as OpenAI's; 0: off"""

    presence_penalty: Annotated[float, "F"] = 0.0
    """as OpenAI's; 0: off"""

    logit_bias: Annotated[tuple[tuple[int, float], ...], "ID:BIAS", Spelling(type=_bias)] = ()
    """add to the logits of these tokens; -100 all but bans one, 100 all but forces it"""

    seed: int = 1234
    """the same seed for every prompt"""

    stop: Annotated[tuple[str, ...], "TEXT", Spelling(action="append")] = ()
    """stop before this; repeatable"""

    samples: Annotated[int, "N"] = 1
    """answers to each prompt"""


@dataclass(frozen=True, kw_only=True)
class EarlyExitFlags:
    """early exit"""

    mode: Mode | None = None
    """default: full, or what other flags imply"""

    use_early_exit: bool = False
    """the same as --mode early_exit"""

    early_exit_thres: Annotated[tuple[float, ...], "F"] | None = None
    """probability of its best token from which on an exit is taken, one for all exits or one for each; 0: always the
    first exit, 1: only where the probability rounds to 1; default 0.8"""

    certified: Annotated[float, "LEVEL"] | None = None
    """with the thresholds that are certified for this level, as in 0.99: the share of tokens, averaged over prompts,
    that are the full model's (tools/evaluate.py calibrate); implies --mode early_exit"""

    exit_layers: Annotated[tuple[int, ...], "N"] | None = None
    """exits to evaluate; default: all"""

    max_deferred: Annotated[int, "N"] | None = None
    """rows of a request that may be deferred; where one more exits, all run the remaining layers, and the token is
    still the exit's; default 32"""

    exit_score: ExitScore | None = None
    """what thresholds are compared with: the probability of the exit's best token (head), or what a small network says
    before the head is evaluated (probe; tools/evaluate.py probes); default: head, with --certified what the
    certificate was made with"""

    plan_exits: bool | None = None
    """only exits that pay on this machine (calibrate); default: with --certified"""

    draft_source: DraftSourceChoice | None = None
    """self_speculative: an exit drafts, or what followed the last tokens where they stood before, in the prompt or the
    answer (ngram: for models without exits too), or whichever promises more; default exit"""

    draft_exit: Annotated[int, "N"] | None = None
    """self_speculative: exit that drafts; default: the one that promises most"""

    draft_length: Annotated[int, "N"] | None = None
    """self_speculative: tokens to draft at once; default: it adapts"""

    draft_min_confidence: Annotated[float, "F"] | None = None
    """self_speculative: an exit's draft ends with a token of less confidence; default: where one more token is not
    expected to pay"""

    speculation: Speculation | None = None
    """self_speculative: feed drafts while the pipeline stages verify those before them (across_stages), or verify some
    together; default auto: across stages where one lies behind that of the draft exit"""


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """output"""

    json: bool = False
    """one JSON document a line for each answer"""

    print_max_prob: bool = False
    """what evaluated exits predict for each token"""

    color: Literal["auto", "always", "never"] = "auto"
    """colour text by exit"""


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(ModelFlags, PromptFlags, SamplingFlags, EarlyExitFlags, OutputFlags):
    """Continue prompts with a trained early-exit model, all at once. Without --prompt and --prompt-file it reads one
    prompt a line from standard input; with --chat it keeps the conversation."""


def build_parser() -> Parser:
    """Flags; those of exits are EE-LLM's."""
    return parser_of(GenerateFlags, "generate.py")
