"""The results of a calibration: certificates with their tests, curves of the test split, and all of it for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron.early_exit.evaluation.certification import NEVER, LineTest, ThresholdLine, first_exits
from megatron.early_exit.evaluation.statistics.exit_metrics import coverage_risk
from megatron.early_exit.evaluation.statistics.text_metrics import distinct_n, is_loop
from megatron.early_exit.inference.certificates import Certificate
from megatron.early_exit.inference.exit_records import PromptRecord


def card_of(one: Certificate, line: ThresholdLine, tested: LineTest, layers: Sequence[int]) -> dict[str, Any]:
    """A certificate, with all points that were tested. layers: of the exits that may be taken. What the test split says
    is not known yet."""
    return {
        "level": one.level,
        "delta": one.delta,
        "risk": one.risk,
        "exit_score": one.score,
        "status": "certified" if one.refusal is None else "refused",
        "reason": one.refusal,
        "thresholds": {str(layer): value for layer, value in one.thresholds.items()},
        "max_tokens": one.answers.max_tokens,
        "prompts": one.num_prompts,
        "p_value": one.p_value,
        "calibration_risk": one.calibration_risk,
        "test_risk": None,
        "test_risk_interval": None,
        "free_running": None,
        "expected_runs_saved": None,
        "path": [
            {
                "budget": line.names[point],
                "thresholds": {
                    str(layer): None if value == NEVER else float(value)
                    for layer, value in zip(layers, line.thresholds[point])
                },
                "p_value": tested.p_values[point],
                "risk": tested.risks[point],
            }
            for point in range(len(tested.p_values))
        ],
    }


def description_of(
    records: Sequence[PromptRecord], layers: Sequence[int], thresholds: np.ndarray | None
) -> dict[str, Any]:
    """Curves and texts of the test split. thresholds: [exits] of the shares by position; None: there are none."""
    curves = {}
    for index, layer in enumerate(layers):
        scores = np.concatenate([one.scores[:, index] for one in records])
        is_right = ~np.concatenate([one.is_wrong[:, index] for one in records])
        curves[str(layer)] = [point._asdict() for point in coverage_risk(scores, is_right)]
    answers = [one.tokens.tolist() for one in records]
    return {
        "coverage_risk": curves,
        "exit_share_by_position": [] if thresholds is None else _shares_by_position(records, layers, thresholds),
        "text": {
            "loop_rate": float(np.mean([is_loop(answer) for answer in answers])),
            "distinct_1": float(np.mean([distinct_n(answer, 1) for answer in answers])),
            "distinct_2": float(np.mean([distinct_n(answer, 2) for answer in answers if len(answer) > 1] or [0.0])),
        },
    }


def _shares_by_position(
    records: Sequence[PromptRecord], layers: Sequence[int], thresholds: np.ndarray
) -> list[dict[str, Any]]:
    taken = [first_exits(one, thresholds) for one in records]
    names = [*map(str, layers), "final"]
    rows = []
    for position in range(max(map(len, taken))):
        here = np.array([one[position] for one in taken if position < len(one)])
        shares = np.bincount(here, minlength=len(names)) / len(here)
        rows.append({"position": position, "count": len(here), "shares": dict(zip(names, shares.tolist()))})
    return rows


def calibration_text(results: Mapping[str, Any]) -> str:
    """The certificates and what the test split says of them, for people."""
    blocks = []
    for card in results["certificates"]:
        by = ", probes" if card["exit_score"] == "probe" else ""
        title = f"certified:{card['level']:g} ({card['risk']}, delta {card['delta']:g}{by}): {card['status']}"
        lines = [title] if card["reason"] is None else [f"{title}: {card['reason']}"]
        if card["status"] == "certified":
            thresholds = ", ".join(f"exit {layer}: {value:.4f}" for layer, value in card["thresholds"].items())
            low, high = card["test_risk_interval"]
            lines += [
                f"  thresholds: {thresholds}",
                f"  calibration: risk {card['calibration_risk']:.3%} on {card['prompts']['calibration']} prompts, "
                f"p-value {card['p_value']:.2g}",
                f"  test: risk {card['test_risk']:.3%} ({low:.3%} to {high:.3%}) on {card['prompts']['test']} "
                f"prompts; along its own answers {card['free_running']['test_risk']:.3%}",
                f"  layer runs saved: {card['expected_runs_saved']:.1%}",
            ]
            if card["free_running"]["p_value"] is not None:
                one = card["free_running"]
                verdict = "certified" if one["is_certified"] else "not certified"
                lines.append(f"  its own answers: {verdict}, risk {one['risk']:.3%}, p-value {one['p_value']:.2g}")
        blocks.append("\n".join(lines))
    rounding = results["rounding"]
    if rounding["decisions"]:
        blocks.append(f"the full model alone and in batches: {rounding['batch_1_vs_n']:.3%} of decisions differ")
    return "\n\n" + "\n".join(blocks)
