"""The architecture of a checkpoint in place of flags (--use-checkpoint-args)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from megatron.early_exit.config.checkpoint_choice import has_checkpoint
from megatron.early_exit.config.description import EXIT_STRUCTURE_FIELDS, FREE_MODEL_FIELDS, ModelDescription
from megatron.early_exit.config.fields import flag_of
from megatron.early_exit.config.settings import RunSettings


def overlay_architecture(cfg: RunSettings, present: ModelDescription, given: Collection[str] = ()) -> RunSettings:
    """`cfg` with the checkpoint's model and exits (--use-checkpoint-args).

    given: names of the fields that the user set. These win only where the checkpoint's weights do not depend on them:
    dropout and the like (FREE_MODEL_FIELDS), loss weights and their schedule, and the tokenizer."""
    is_rope = present.model.position_embedding_type == "rope"
    free = FREE_MODEL_FIELDS | ({"max_position_embeddings"} if is_rope else set())
    model = dataclasses.replace(present.model, **{name: getattr(cfg.model, name) for name in free if name in given})

    weight_fields = [field.name for field in dataclasses.fields(cfg.exits) if field.name not in EXIT_STRUCTURE_FIELDS]
    own = [name for name in weight_fields if name in given and name != "exit_layer_temperature"]
    exits = dataclasses.replace(present.exits, **{name: getattr(cfg.exits, name) for name in own})

    tokenizer = {name: value for name, value in vars(present.tokenizer).items() if name not in given}
    return dataclasses.replace(cfg, model=model, exits=exits, data=dataclasses.replace(cfg.data, **tokenizer))


def checkpoint_source(settings: Mapping[str, Any]) -> tuple[str | None, int | None, str]:
    """(folder, iteration) of the checkpoint that the run starts from, and the flag that names the folder."""
    load, pretrained = settings.get("load"), settings.get("pretrained_checkpoint")
    if pretrained is not None and (load is None or not has_checkpoint(load)):
        return pretrained, None, "--pretrained-checkpoint"
    return load, settings.get("load_iteration"), "--load"


def warn_of_replaced(
    before: RunSettings, after: RunSettings, given: Mapping[str, Any], warn: Callable[[str], None]
) -> None:
    """Say which flags lost against the checkpoint."""
    for section in ("model", "exits"):
        for name, value in vars(getattr(before, section)).items():
            taken = getattr(getattr(after, section), name)
            if name in given and name not in FREE_MODEL_FIELDS and taken != value:
                warn(f"{flag_of(name)} {value} is replaced by the checkpoint's {taken} (--use-checkpoint-args)")
