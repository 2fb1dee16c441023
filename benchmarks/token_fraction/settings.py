"""What is measured, and the variants that are compared."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.early_exit.config.exits import ExitConfig

PARTS = ("time", "variance", "losses")
HEADS: dict[str, dict[str, bool]] = {
    "norm": {"use_exit_norm": True},
    "MLP": {"use_exit_norm": True, "use_exit_mlp": True},
}


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    parts: tuple[str, ...] = PARTS
    device: str = "cpu"
    fractions: tuple[float, ...] = (1.0, 0.5, 0.25)
    """With 1 first, which the others are compared with."""
    num_layers: int = 4
    hidden_size: int = 192
    num_attention_heads: int = 6
    vocab_size: int = 16384
    seq_length: int = 512
    micro_batch_size: int = 4
    num_microbatches: int = 1
    rounds: int = 9
    bf16: bool = False
    batches: int = 12
    """Of the demo's text, for the variance."""
    draws: int = 4
    """Of each of these batches."""
    train_iters: int = 250
    seeds: tuple[int, ...] = (1234, 5, 6)
    """Of the runs from scratch."""


QUICK = Settings(
    num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=8192, seq_length=128, rounds=2, batches=2, draws=2,
    train_iters=4, seeds=(1234,),
)  # fmt: skip
"""Shows that everything runs; its numbers say nothing."""


def fractions_of(settings: Settings) -> tuple[float, ...]:
    """Below 1."""
    return settings.fractions[1:]


def exits_of(settings: Settings, head: str, fraction: float) -> ExitConfig:
    layers = (settings.num_layers // 4, settings.num_layers // 2)
    return ExitConfig(exit_layer_nums=layers, exit_loss_token_fraction=(fraction,), **HEADS[head])


def variant_name(head: str, fraction: float) -> str:
    return f"{head} {fraction:g}"
