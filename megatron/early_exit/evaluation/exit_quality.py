"""How good the exits of a model are on a text: losses, agreement with the final head, and how well an exit's score
tells where it agrees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron.early_exit.evaluation.probes import layer_and_states, probe_scores
from megatron.early_exit.evaluation.rows import Row, share_interval
from megatron.early_exit.evaluation.statistics.exit_metrics import auroc, expected_calibration_error, reliability
from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.exit_probes import ExitProbes
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import ExitScore, ScoreParams
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
    probe_scores: tuple[np.ndarray, ...] | None = None
    """Output of the exit's probe, if there is one: exits that only draft have none."""

    def of(self, sequences: Sequence[int]) -> HeadScores:
        """Those of some sequences."""
        return self._each(lambda values: tuple(values[index] for index in sequences))

    def scores_of(self, score: ExitScore) -> np.ndarray:
        """[positions]: what thresholds are compared with."""
        if score == "head":
            return np.concatenate(self.scores)
        assert self.probe_scores is not None, "scores of probes are those of exits that have one"
        return np.concatenate(self.probe_scores)

    def at(self, counted: Sequence[Sequence[bool]]) -> HeadScores:
        """Those of some positions of each sequence."""
        masks = [np.asarray(of_sequence, bool) for of_sequence in counted]
        return self._each(lambda values: tuple(value[mask] for value, mask in zip(values, masks, strict=True)))

    def _each(self, some: Callable[[tuple[np.ndarray, ...]], tuple[np.ndarray, ...]]) -> HeadScores:
        """With `some` of each field's arrays."""
        return replace(
            self,
            log_probs=some(self.log_probs),
            scores=some(self.scores),
            is_right=some(self.is_right),
            agrees=some(self.agrees),
            probe_scores=None if self.probe_scores is None else some(self.probe_scores),
        )


def head_scores(
    llm: LLM,
    sequences: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    probes: ExitProbes | None = None,
) -> list[HeadScores]:
    """Every exit in the order of layers, and then the final head, over `sequences` of at least two ids each. probes:
    the model's, whose output is wanted as well."""
    found: dict[int, list[ScoredHead]] = {}
    of_probes: dict[int, dict[int, np.ndarray]] = {}
    """By sequence and layer."""
    params = ScoreParams(score_last=False, states=probes is not None)
    for index, result in llm.stream_scores([list(ids) for ids in sequences], params):
        *exits, final = result.check().heads
        if probes is not None:
            states = dict(map(layer_and_states, exits))
            of_probes[index] = {
                layer: probe_scores(probes.networks[layer], states[layer]) for layer in states.keys() & probes.networks
            }
        found[index] = [*(replace(head, states=None) for head in exits), final]
        progress(len(found), len(sequences))
    numbers = range(len(sequences))
    heads = [_scores_of(head, sequences, [found[index] for index in numbers], llm) for head in range(len(found[0]))]
    if probes is None:
        return heads
    scores_of = lambda layer: tuple(of_probes[index][layer] for index in numbers)
    has_probe = lambda head: not head.is_final and head.layer in probes.networks
    return [replace(head, probe_scores=scores_of(head.layer)) if has_probe(head) else head for head in heads]


def _scores_of(
    place: int, sequences: Sequence[Sequence[int]], of_sequences: Sequence[Sequence[ScoredHead]], llm: LLM
) -> HeadScores:
    """Of the head at `place` among all."""
    of_head, finals = [heads[place] for heads in of_sequences], [heads[-1] for heads in of_sequences]
    layer, predicted = of_head[0].exit_layer, [np.array(head.tokens) for head in of_head]
    return HeadScores(
        layer=llm.engine.description.num_layers if layer is None else layer,
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


def used_heads_row(heads: Sequence[HeadScores], thresholds: Mapping[int, float], score: ExitScore) -> Row:
    """A text's perplexity where each token is judged by the head that would give it: the first exit whose score reaches
    its threshold, else the final head. thresholds: by layer; of exits that are never taken none."""
    *exits, final = heads
    used = [head for head in exits if head.layer in thresholds]
    of_final = np.concatenate(final.log_probs)
    log_probs, taken = of_final, np.full(len(of_final), len(used))
    for index in reversed(range(len(used))):
        is_reached = used[index].scores_of(score) >= thresholds[used[index].layer]
        log_probs = np.where(is_reached, np.concatenate(used[index].log_probs), log_probs)
        taken[is_reached] = index
    loss, more = float(-log_probs.mean()), float(of_final.mean() - log_probs.mean())
    shares = np.bincount(taken, minlength=len(used) + 1) / len(taken)
    return {
        "loss": loss,
        "perplexity": float(np.exp(loss)) if loss < 700 else None,
        "perplexity_ratio": float(np.exp(more)) if more < 700 else None,
        "shares": dict(zip([*(str(head.layer) for head in used), "final"], shares.tolist(), strict=True)),
    }


def reliability_rows(head: HeadScores) -> list[Row]:
    """Of bins of the score: how often the exit agrees with the final head there."""
    return [
        {"score": one.score, "agreement": one.correct, "count": one.count}
        for one in reliability(np.concatenate(head.scores), np.concatenate(head.agrees))
    ]
