"""Where numbers go: console lines, metrics.jsonl, TensorBoard, Weights & Biases. On one rank only."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.serialize import to_dict
from megatron.early_exit.data.metrics_file import MetricsFile


class Reporter:
    """Writes on rank 0; on other ranks every method does nothing."""

    def __init__(self, config: RunConfig, is_active: bool) -> None:
        """Raises ImportError if a tracker that was asked for is not installed."""
        self._metrics: MetricsFile | None = None
        self._tensorboard = self._wandb = None
        if not is_active:
            return
        self._metrics = MetricsFile(metrics_path(config))
        settings = config.logging
        if settings.tensorboard_dir is not None:
            self._tensorboard = _tensorboard_writer(settings.tensorboard_dir)
        if settings.wandb_project is not None:
            self._wandb = _wandb_run(config)

    def text(self, message: str) -> None:
        """Print lines on the console. Raises OSError if it is closed, or a full disk."""
        if self._metrics is None:
            return
        try:
            print(message, flush=True)
        except OSError as error:
            error.filename = "standard output"
            raise

    def record(self, kind: str, iteration: int, values: Mapping[str, float | int | None]) -> None:
        """Send one set of numbers to metrics.jsonl and the trackers. kind: "train", "valid" or "test"."""
        if self._metrics is None:
            return
        # NaN is no JSON: unknown values are null.
        clean = {key: value if value is None or math.isfinite(value) else None for key, value in values.items()}
        line = {"kind": kind, "iteration": iteration, "time": round(time.time(), 3), **clean}
        self._metrics.append(line)
        present = {f"{kind}/{key}": value for key, value in clean.items() if value is not None}
        if self._tensorboard is not None:
            for key, value in present.items():
                self._tensorboard.add_scalar(key, value, iteration)
        if self._wandb is not None:
            self._wandb.log(present, step=iteration)

    def close(self) -> None:
        for target in (self._metrics, self._tensorboard):
            if target is not None:
                target.close()
        if self._wandb is not None:
            self._wandb.finish()


def metrics_path(config: RunConfig) -> Path:
    """Where metrics.jsonl is."""
    if config.logging.metrics_file is not None:
        return Path(config.logging.metrics_file)
    return Path(config.checkpoint.save or ".") / "metrics.jsonl"


def _tensorboard_writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard-dir needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(folder)


def _wandb_run(config: RunConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("--wandb-project needs the package wandb: pip install wandb") from error
    settings = config.logging
    return wandb.init(
        project=settings.wandb_project,
        group=settings.wandb_group,
        name=settings.wandb_exp_name,
        entity=settings.wandb_entity,
        dir=settings.wandb_save_dir,
        config=to_dict(config),
    )


def training_line(iteration: int, last_iteration: int | None, values: dict[str, float | int | None]) -> str:
    """One log line: the values of `record` in the words that users of Megatron and EE-LLM know."""
    of = f"/{last_iteration:8d}" if last_iteration is not None else ""
    parts = [
        f"iteration {iteration:8d}{of}",
        f"consumed samples: {values['consumed_samples']:9d}",
        f"elapsed time per iteration (ms): {values['iteration_ms']:.1f}",
        f"learning rate: {values['learning_rate']:.3E}",
        f"global batch size: {values['global_batch_size']:5d}",
        *_loss_parts(values),
    ]
    for key, value in values.items():
        if key.startswith("exit_weight/layer_"):
            parts.append(f"exit weight [{key.rsplit('_', 1)[1]}]: {value:.3g}")
    if values.get("loss_scale") is not None:
        parts.append(f"loss scale: {values['loss_scale']:.1f}")
    if values.get("grad_norm") is not None:
        parts.append(f"grad norm: {values['grad_norm']:.3f}")
    parts.append(f"skipped iterations: {values['skipped_iterations']}")
    if values.get("tflops_per_rank") is not None:
        parts.append(f"TFLOP/s per rank: {values['tflops_per_rank']:.2f}")
    return " " + " | ".join(parts)


def evaluation_line(name: str, iteration: int, values: dict[str, float]) -> str:
    """One line for a validation or test."""
    accuracy = " | ".join(
        f"{_head_name(key, 'accuracy')}: {100 * value:.2f}%" for key, value in values.items() if "accuracy" in key
    )
    parts = _loss_parts(values)
    if "lm_loss" in values:
        parts.append(f"lm perplexity: {math.exp(min(values['lm_loss'], 50)):.4g}")
    return f" {name} at iteration {iteration} | " + " | ".join([*parts, accuracy])


def _loss_parts(values: dict[str, Any]) -> list[str]:
    words = {"lm_loss": "loss", "exit_loss": "loss", "exit_divergence": "divergence"}
    kinds = {key: key.partition("/")[0] for key in values}
    return [f"{_head_name(key, words[kind])}: {values[key]:.6f}" for key, kind in kinds.items() if kind in words]


def _head_name(key: str, what: str) -> str:
    """ "lm_loss" -> "lm loss", "exit_loss/layer_6" -> "early loss [6]"."""
    return f"lm {what}" if key.startswith("lm_") else f"early {what} [{key.rsplit('_', 1)[1]}]"
