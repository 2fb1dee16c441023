"""What is reported, how often and where."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.early_exit.config.ranges import PositiveInt


@dataclass(frozen=True)
class LoggingConfig:
    """Console, metrics.jsonl, TensorBoard, Weights & Biases."""

    log_interval: PositiveInt = 100
    """Iterations between log lines."""

    log_throughput: bool = False
    """Add TFLOP/s per rank to the log line."""

    log_timers_to_tracker: bool = False
    """Send timers of the forward, backward and optimizer parts to TensorBoard and W&B."""

    metrics_file: str | None = None
    """JSON lines with everything that is logged. Default: SAVE/metrics.jsonl, or ./metrics.jsonl."""

    tensorboard_dir: str | None = None
    """Folder for TensorBoard events."""

    wandb_project: str | None = None
    """Weights & Biases project; turns W&B on."""

    wandb_group: str | None = None
    """Weights & Biases group."""

    wandb_exp_name: str | None = None
    """Weights & Biases run name."""

    wandb_entity: str | None = None
    """Weights & Biases account."""

    wandb_save_dir: str | None = None
    """Folder for W&B's local files."""
