"""Grids of ways to decode: thresholds x exits, certified levels, draft exits x draft lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.early_exit.evaluation.rows import Variant
from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.params import CertifiedThresholds, DraftSourceChoice, GenerationParams

FULL = "full"


@dataclass(frozen=True)
class Grid:
    """What is varied. Every list may be empty."""

    thresholds: tuple[float, ...] = ()
    exits: str = "together"
    """Exits that thresholds are tried on, of those that tokens may leave at: all `together`, `each` by itself, or
    `both`."""
    certified: tuple[float, ...] | None = ()
    """Levels; None: all whose certificates are for answers like these."""
    draft_exits: tuple[int, ...] | None = None
    """None: all that may draft."""
    draft_lengths: tuple[int | None, ...] = ()
    """None: it adapts."""
    draft_sources: tuple[DraftSourceChoice, ...] = ("exit",)
    """exit: each of `draft_exits` by itself; with the others those exits are chosen among that may draft."""


def variants_of(grid: Grid, answers: GenerationParams, checks: RequestChecks) -> list[Variant]:
    """The full model, and then all of the grid that the model can do. answers: how long they are and what ends them.

    Raises ValueError for exits that the model does not have, thresholds that are none, and levels that are not
    certified."""
    layers = checks.exits.leaving_layers
    early = [
        replace(answers, mode="early_exit", exit_thresholds=(threshold,), exit_layers=chosen)
        for chosen in _chosen_exits(grid.exits, layers) for threshold in grid.thresholds
    ]  # fmt: skip
    early += [
        replace(answers, mode="early_exit", exit_thresholds=CertifiedThresholds(level))
        for level in (_levels_of(checks, answers) if grid.certified is None else grid.certified)
    ]
    drafts = [
        replace(answers, mode="self_speculative", draft_exit=layer, draft_length=length)
        for layer in (checks.exits.drafting_layers if grid.draft_exits is None else grid.draft_exits)
        for length in grid.draft_lengths
        if "exit" in grid.draft_sources
    ]  # fmt: skip
    drafts += [
        replace(answers, mode="self_speculative", draft_source=source, draft_length=length)
        for source in grid.draft_sources if source != "exit" for length in grid.draft_lengths
    ]  # fmt: skip
    for params in (*early, *drafts):
        checks.check(params)
    return [Variant(FULL, answers), *(_variant(params, checks) for params in (*early, *drafts))]


def drafting(params: GenerationParams) -> str:
    """What drafts, in words."""
    if params.draft_source == "exit":
        return "exits" if params.draft_exit is None else f"exit {params.draft_exit}"
    return "n-grams" if params.draft_source == "ngram" else "n-grams and exits"


def _chosen_exits(exits: str, layers: Sequence[int]) -> list[tuple[int, ...]]:
    together = [()] if layers and exits in ("together", "both") else []
    is_the_same = len(layers) == 1 and bool(together)
    return together + ([(layer,) for layer in layers] if exits in ("each", "both") and not is_the_same else [])


def _levels_of(checks: RequestChecks, answers: GenerationParams) -> list[float]:
    """Certified levels that hold for such answers."""
    return sorted({
        one.level for one in checks.certificates.valid
        if one.refusal is None
        and (one.answers.max_tokens, one.answers.ignore_eod) == (answers.max_tokens, answers.ignore_eod)
    })  # fmt: skip


def _variant(params: GenerationParams, checks: RequestChecks) -> Variant:
    if params.mode == "self_speculative":
        length = "adaptive" if params.draft_length is None else str(params.draft_length)
        return Variant(f"draft with {drafting(params)}, length {length}", params, draft_exit=params.draft_exit)
    thresholds = {checks.model.exits[one.exit].layer_number: one.threshold for one in checks.thresholds(params)}
    if isinstance(params.exit_thresholds, CertifiedThresholds):
        name = f"certified {params.exit_thresholds.level:g}"
    else:
        of_exits = f", exit {' '.join(map(str, params.exit_layers))}" if params.exit_layers else ""
        name = f"threshold {params.exit_thresholds[0]:g}{of_exits}"
    return Variant(name, params, thresholds=thresholds)
