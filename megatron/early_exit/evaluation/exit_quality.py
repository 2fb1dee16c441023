"""How good the exits of a model are on a text: losses, agreement with the final head, and how well an exit's score
tells where it agrees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.early_exit.evaluation.rows import Row, share_interval
from megatron.early_exit.evaluation.statistics.exit_metrics import auroc, expected_calibration_error, reliability
from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import ScoreParams
from megatron.early_exit.inference.results import ScoredHead


@dataclass(frozen=True)
class HeadScores:
    """What one head predicts over a text: one list for each sequence, of its positions that a token follows."""

    layer: int
    is_final: bool
    log_probs: tuple[np.ndarray, ...]
    """Nats, of the text's next token."""
    scores: tuple[np.ndarray, ...]
    """Largest probability, which thresholds are compared with."""
    is_right: tuple[np.ndarray, ...]
    """Whether the most probable token is the text's."""
    agrees: tuple[np.ndarray, ...]
    """Whether it is the final head's."""

    def of(self, sequences: Sequence[int]) -> HeadScores:
        """Those of some sequences."""
        some = lambda values: tuple(values[index] for index in sequences)
        return HeadScores(
            self.layer, self.is_final, some(self.log_probs), some(self.scores), some(self.is_right), some(self.agrees)
        )


def head_scores(
    llm: LLM, sequences: Sequence[Sequence[int]], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[HeadScores]:
    """Every exit in the order of layers, and then the final head, over `sequences` of at least two ids each."""
    found = {}
    for index, result in llm.stream_scores([list(ids) for ids in sequences], ScoreParams(score_last=False)):
        found[index] = result.check().heads
        progress(len(found), len(sequences))
    of_sequences = [found[index] for index in range(len(sequences))]
    finals, num_layers = [heads[-1] for heads in of_sequences], llm.engine.description.num_layers
    return [_scores_of(of_head, sequences, finals, num_layers) for of_head in zip(*of_sequences, strict=True)]


def _scores_of(
    of_head: Sequence[ScoredHead], sequences: Sequence[Sequence[int]], finals: Sequence[ScoredHead], num_layers: int
) -> HeadScores:
    layer = of_head[0].exit_layer
    predicted = [np.array(head.tokens) for head in of_head]
    return HeadScores(
        layer=num_layers if layer is None else layer,
        is_final=layer is None,
        log_probs=tuple(np.array(head.log_probs) for head in of_head),
        scores=tuple(np.array(head.confidences) for head in of_head),
        is_right=tuple(own == np.array(ids[1:]) for own, ids in zip(predicted, sequences, strict=True)),
        agrees=tuple(own == np.array(final.tokens) for own, final in zip(predicted, finals, strict=True)),
    )


def head_row(head: HeadScores, costs: StepCosts, seed: int) -> Row:
    """The numbers of one head. The calibration of the final head's own score is not asked for: it agrees with itself.

    costs: of layers and heads, measured here. seed: of the interval."""
    log_probs, scores = np.concatenate(head.log_probs), np.concatenate(head.scores)
    agrees = np.concatenate(head.agrees)
    agreeing = np.array([[one.sum(), one.size] for one in head.agrees], dtype=float)
    loss = float(-log_probs.mean())
    in_layers = (costs.final_head(1) if head.is_final else costs.approximate_head(1)) / costs.layer(1)
    return {
        "layer": head.layer,
        "is_final": head.is_final,
        "loss": loss,
        "perplexity": float(np.exp(loss)) if loss < 700 else None,
        "accuracy": float(np.concatenate(head.is_right).mean()),
        "agreement": float(agrees.mean()),
        "agreement_interval": None if head.is_final else share_interval(agreeing, seed),
        "confidence": float(scores.mean()),
        "ece": None if head.is_final else expected_calibration_error(scores, agrees),
        "auroc": None if head.is_final else auroc(scores, agrees),
        "cost_in_layers": in_layers,
    }


def reliability_rows(head: HeadScores) -> list[Row]:
    """Of bins of the score: how often the exit agrees with the final head there."""
    return [
        {"score": one.score, "agreement": one.correct, "count": one.count}
        for one in reliability(np.concatenate(head.scores), np.concatenate(head.agrees))
    ]
