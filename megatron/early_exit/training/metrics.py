"""Losses of all exits, reduced over the ranks that computed them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.model.exit_losses import ExitLosses


@dataclass(frozen=True)
class HeadMetrics:
    """What one exit or the final head did over some microbatches."""

    loss: float
    """Nats per unmasked token; NaN if there was none."""
    accuracy: float
    """Share of unmasked tokens whose most probable next token was the right one."""
    num_tokens: int
    divergence: float | None = None
    """Nats per unmasked token of KL(final head || exit); None: the exit does not follow the final head here."""


@dataclass(frozen=True)
class LossMetrics:
    """All heads of the model."""

    final: HeadMetrics
    exits: dict[int, HeadMetrics]
    """By exit layer."""

    def as_dict(self) -> dict[str, float]:
        """Flat, under the stable names of metrics.jsonl and the trackers; without the final head if it did not run."""
        flat = {"lm_loss": self.final.loss, "lm_accuracy": self.final.accuracy} if self.final.num_tokens else {}
        for layer, head in self.exits.items():
            flat[f"exit_loss/layer_{layer}"] = head.loss
            flat[f"exit_accuracy/layer_{layer}"] = head.accuracy
            if head.divergence is not None:
                flat[f"exit_divergence/layer_{layer}"] = head.divergence
        return flat


def collect_losses(exit_losses: ExitLosses, exits: ExitConfig, follows_final_head: bool = False) -> LossMetrics:
    """Reduce the statistics over replicas and stages, and start counting anew. All ranks must call it together.
    follows_final_head: exits were trained with distillation.

    Each exit's losses are known on its own stage only, so every rank adds its rows; TP ranks hold the same ones."""
    statistics = exit_losses.statistics.clone()
    exit_losses.reset_statistics()
    torch.distributed.all_reduce(statistics, group=parallel_state.get_data_parallel_group())
    torch.distributed.all_reduce(statistics, group=parallel_state.get_pipeline_model_parallel_group())
    heads = [_head_metrics(follows_final_head, *row) for row in statistics.tolist()]
    return LossMetrics(heads[-1], dict(zip(exits.exit_layer_nums, heads[:-1], strict=True)))


def _head_metrics(
    follows_final_head: bool, loss_sum: float, num_tokens: float, num_correct: float, divergence_sum: float
) -> HeadMetrics:
    mean = lambda total: total / num_tokens if num_tokens else math.nan
    divergence = mean(divergence_sum) if follows_final_head else None
    return HeadMetrics(mean(loss_sum), mean(num_correct), round(num_tokens), divergence)
