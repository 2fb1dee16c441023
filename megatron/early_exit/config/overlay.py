"""The architecture of a checkpoint in place of flags (--use-checkpoint-args)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from megatron.early_exit.config.description import EXIT_STRUCTURE_FIELDS, FREE_MODEL_FIELDS, ModelDescription
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
