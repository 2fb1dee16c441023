"""The keys under which checkpoints hold parameters, as against the names that these have in a model.

They are core's keys: Transformer Engine fuses the norms before attention and before the MLP with the matrices that read
them, and core stores a norm that stands alone under the name that it has there. So a checkpoint is the same whatever
modules wrote it, and Megatron-LM's have the same keys. Our checkpoints had the names themselves as keys once; a key of
either kind gives the same name.

Exits follow the same rule: the norms of an exit's block have keys like a layer's. An MLP branch has no norm of its own:
it reads what its layer's norm before the MLP gives.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path

from megatron.early_exit.config.description import MismatchError

KEYS_OF_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""In a transformer layer: beginning of the names -> beginning of the keys, as core's specs of layers take it."""


def key_of(name: str) -> str:
    """The key of a parameter, or of what an optimizer keeps of it."""
    for ours, key in KEYS_OF_NORMS.items():
        name = name.replace(f".{ours}", f".{key}")
    return name


def name_of(key: str) -> str:
    """The name of the parameter that a checkpoint holds under `key`, of whatever kind the key is."""
    for ours, fused in KEYS_OF_NORMS.items():
        key = key.replace(f".{fused}", f".{ours}")
    return key


def stored_key(key: str, stored: Container[str]) -> str:
    """The key under which a checkpoint that holds the keys `stored` has what is written as `key` today."""
    old = name_of(key)
    return old if key not in stored and old in stored else key


def check_keys(stored: Iterable[str], folder: Path) -> None:
    """Raise MismatchError if an MLP branch in `folder` has a norm of its own, as once under Transformer Engine."""
    of_branch = ".exit_head." + KEYS_OF_NORMS["pre_mlp_layernorm."]
    if of_branch in "\n".join(stored):
        raise MismatchError(
            f"{folder} was trained with --transformer-impl transformer_engine by a version in which an exit's MLP "
            "branch had a norm of its own there, and is not supported: branches share the norm of their layer"
        )


def has_extra_state(key: str) -> bool:
    """Whether core's module asks for a state beside the parameter of this key, which is empty but for FP8."""
    return key.endswith(".weight") and key.split(".")[-2].startswith("linear_")


def extra_state_key(key: str) -> str:
    """Where that state lies."""
    return f"{key.removesuffix('.weight')}._extra_state/shard_0_1"
