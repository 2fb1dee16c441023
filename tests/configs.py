"""Small run configurations for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.early_exit.config.checkpoint import CheckpointConfig
from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.logging import LoggingConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import OptimizerConfig, TrainingConfig
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.config.pipeline import PipelineConfig
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.settings import RunSettings

VOCAB_SIZE = 96

MIXED_HEADS: dict[str, Any] = {
    "exit_layer_nums": (1, 2, 3, 4), "exit_layer_weight": (0.4, 0.25, 0.5, 0.3),
    "use_exit_block": (True, False, False, False), "use_exit_norm": (False, True, True, False),
    "use_exit_mlp": (False, False, True, False), "untie_exit_output_weights": (False, False, False, True),
    "exit_uses": ("draft", "both", "leave", "both"),
}  # fmt: skip
"""Four exits, each of another kind: a block that drafts, a norm, an MLP branch with a norm, an own output."""

_SECTIONS = {
    "model": (ModelConfig, {
        "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48,
        "group_query_attention": True, "num_query_groups": 2, "position_embedding_type": "rope",
        "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "make_vocab_size_divisible_by": 16,
    }),
    "exits": (ExitConfig, {"exit_layer_nums": (2, 3), "exit_layer_weight": (0.25, 0.5)}),
    "parallel": (ParallelConfig, {}),
    "pipeline": (PipelineConfig, {}),
    "training": (TrainingConfig, {"seq_length": 12, "micro_batch_size": 2, "eval_iters": 0}),
    "optimizer": (OptimizerConfig, {"lr": 1e-2, "adam_eps": 1e-2, "clip_grad": 1.0}),
    "data": (DataConfig, {"tokenizer_type": "NullTokenizer", "vocab_size": VOCAB_SIZE - 1, "num_workers": 0}),
    "checkpoint": (CheckpointConfig, {}),
    "logging": (LoggingConfig, {"log_interval": 1}),
}  # fmt: skip


def make_config(**changes: Any) -> RunConfig:
    """The small configuration with some fields changed; each field name belongs to one section.

    A Llama of four layers (odd sizes, grouped queries) with exits after layers 2 and 3, in fp32."""
    return RunConfig(**vars(make_settings(**changes)))


def make_settings(**changes: Any) -> RunSettings:
    """As `make_config`, not checked. The weights of exits are those of two, if there are two."""
    if len(changes.get("exit_layer_nums", (2, 3))) != 2:
        changes.setdefault("exit_layer_weight", ())
    sections = {}
    for name, (section_class, defaults) in _SECTIONS.items():
        mine = {key: changes.pop(key) for key in list(changes) if key in section_class.__dataclass_fields__}
        sections[name] = section_class(**{**defaults, **mine})
    if changes:
        raise TypeError(f"no section has the fields {sorted(changes)}")
    return RunSettings(**sections)


def make_training_config(data_prefix: str, folder: Path, **changes: Any) -> RunConfig:
    """The small configuration, training on `data_prefix` with metrics in `folder`."""
    settings = {
        "data_path": (data_prefix,), "split": "80,20,0", "train_iters": 6, "global_batch_size": 8,
        "lr_decay_iters": 6, "lr_warmup_iters": 2, "metrics_file": str(folder / "metrics.jsonl"),
    }  # fmt: skip
    return make_config(**{**settings, **changes})
