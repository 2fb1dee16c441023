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
        return flat


def collect_losses(exit_losses: ExitLosses, exits: ExitConfig) -> LossMetrics:
    """Reduce the statistics over replicas and stages, and start counting anew. All ranks must call it together.

    Each exit's losses are known on its own stage only, so every rank adds its rows; TP ranks hold the same ones."""
    statistics = exit_losses.statistics.clone()
    exit_losses.reset_statistics()
    torch.distributed.all_reduce(statistics, group=parallel_state.get_data_parallel_group())
    torch.distributed.all_reduce(statistics, group=parallel_state.get_pipeline_model_parallel_group())
    heads = [_head_metrics(*row) for row in statistics.tolist()]
    return LossMetrics(heads[-1], dict(zip(exits.exit_layer_nums, heads[:-1], strict=True)))


def _head_metrics(loss_sum: float, num_tokens: float, num_correct: float) -> HeadMetrics:
    if num_tokens == 0:
        return HeadMetrics(math.nan, math.nan, 0)
    return HeadMetrics(loss_sum / num_tokens, num_correct / num_tokens, round(num_tokens))
