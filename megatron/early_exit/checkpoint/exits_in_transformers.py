"""Exits in a folder of `transformers`: their parameters beside the model's, and the class that uses them.

The parameters of exit I are `exits.I.PART.*` in the same files as the model's. What follows PART is as in the
architecture: of a layer (`block`), an MLP (`mlp`), a norm (`norm`) and a linear layer (`output`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.early_exit.checkpoint.accounting import THEIR_EXITS
from megatron.early_exit.checkpoint.family import Family
from megatron.early_exit.checkpoint.tensors import EXIT_HEAD, Tensors, below, without_exits
from megatron.early_exit.checkpoint.vocabulary import model_output_weight
from megatron.early_exit.checkpoint.weight_files import read_safetensors
from megatron.early_exit.config.exits import ExitConfig, ExitHeadKind

if TYPE_CHECKING:
    from megatron.early_exit.config.model import ModelConfig

_CLASS_FILE = "modeling_early_exit.py"
_OLDER_FILE = "exits.safetensors"
"""Where older versions wrote the exits, with names that have no prefix."""

# By family: modules that the class of `remote_code/` needs to find, where the architectures differ.
_MODULES = {
    "llama": {
        "layers": "model.layers", "mlp_norm": "post_attention_layernorm", "final_norm": "model.norm",
        "rotary": "model.rotary_emb",
    },
    "gpt2": {
        "layers": "transformer.h", "mlp_norm": "ln_2", "final_norm": "transformer.ln_f",
        "positions": "transformer.wpe",
    },
}  # fmt: skip
# Part of an exit -> where it is in a model of one layer of ours, and in our exit head.
_PARTS = {
    "block": ("decoder.layers.0.", "block."),
    "mlp": ("decoder.layers.0.mlp.", "mlp."),
    "norm": ("decoder.final_layernorm.", "norm."),
    "output": ("output_layer.", "output_layer."),
}


def exits_for_transformers(tensors: Tensors, model: ModelConfig, exits: ExitConfig, family: Family) -> Tensors:
    """Their parameters of all exits."""
    heads = zip(exits.exit_layer_nums, exits.heads, strict=True)
    return {
        f"{THEIR_EXITS}{index}.{part}.{name}": tensor
        for index, (layer, head) in enumerate(heads)
        for part, of_part in _their_parts(_one_layer(tensors, model, layer), model, head, family).items()
        for name, tensor in of_part.items()
    }


def write_exit_class(folder: Path, exits: ExitConfig, family: Family) -> None:
    """The exits' settings in config.json, and the class that uses them."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["early_exits"] = {
        "layers": list(exits.exit_layer_nums), "pre_exit": exits.pre_exit,
        "uses": [exits.use_of(index) for index in range(exits.num_exits)],
        "block": [head.block for head in exits.heads], "mlp": [head.mlp for head in exits.heads],
        "norm": [head.norm for head in exits.heads], "own_output": [head.untied_output for head in exits.heads],
        "temperatures": [exits.temperature_of(index) for index in range(exits.num_exits)],
        "modules": _MODULES[family.model_types[0]],
    }  # fmt: skip
    config["auto_map"] = {"AutoModelForCausalLM": f"{Path(_CLASS_FILE).stem}.EarlyExitForCausalLM"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    code = (Path(__file__).parent / "remote_code" / _CLASS_FILE).read_text(encoding="utf-8")
    base = config["architectures"][0]
    (folder / _CLASS_FILE).write_text(code.replace("LlamaForCausalLM as Base", f"{base} as Base"))


def read_exits(
    folder: Path, settings: dict[str, Any], theirs: Tensors, ours: Tensors, model: ModelConfig, family: Family
) -> tuple[ExitConfig, Tensors]:
    """(settings, our parameters) of the exits in a folder of transformers.

    settings: `early_exits` of its config.json; theirs, ours: the parameters there, and those of the plain model.
    Raises ValueError if parameters are missing, too many or of other shapes than the settings say."""
    exits = _exit_config(settings)
    given = below(theirs, THEIR_EXITS)
    if not given and (folder / _OLDER_FILE).is_file():
        given = read_safetensors(folder / _OLDER_FILE)
    result: Tensors = {}
    expected: dict[str, tuple[int, ...]] = {}
    one = _of_one_layer(model)
    for index, (layer, head) in enumerate(zip(exits.exit_layer_nums, exits.heads, strict=True)):
        one_layer = _one_layer(ours, model, layer)
        their_one_layer = family.theirs(one_layer, one)
        for part, of_part in _their_parts(one_layer, model, head, family).items():
            names = {f"{index}.{part}.{name}": name for name in of_part}
            expected |= {name: of_part[their_name].shape for name, their_name in names.items()}
            prefix = _their_prefixes(family)[part]
            their_one_layer |= {prefix + own: given[name] for name, own in names.items() if name in given}
        if any(name not in given for name in expected):
            break
        # Converted as a model of one layer, whose parts are the exit's.
        converted = family.ours(their_one_layer, one)
        for part in _parts_of(head):
            source, target = _PARTS[part]
            prefix = f"decoder.layers.{layer - 1}{EXIT_HEAD}{target}"
            result |= {prefix + name: tensor for name, tensor in below(converted, source).items()}
    found = {name: tensor.shape for name, tensor in given.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"the exits in {folder} do not fit early_exits of its config.json: {THEIR_EXITS}{name} has the shape "
            f"{found.get(name, 'of nothing, it is missing')}, expected {expected.get(name, 'no such parameter')}"
        )
    return exits, result


def _exit_config(settings: dict[str, Any]) -> ExitConfig:
    """Older versions wrote one value for the heads of all exits, and no uses."""
    of_heads = lambda name: value if isinstance(value := settings[name], bool) else tuple(value)
    temperatures = tuple(float(value) for value in settings["temperatures"])
    return ExitConfig(
        exit_layer_nums=tuple(settings["layers"]),
        pre_exit=settings["pre_exit"],
        untie_exit_output_weights=of_heads("own_output"),
        use_exit_norm=of_heads("norm"),
        use_exit_mlp=of_heads("mlp"),
        use_exit_block=of_heads("block"),
        exit_uses=tuple(settings.get("uses", ())),
        exit_layer_temperature=() if set(temperatures) == {1.0} else temperatures,
    )


def _parts_of(head: ExitHeadKind) -> list[str]:
    has = {"block": head.block, "mlp": head.mlp, "norm": head.norm, "output": head.untied_output}
    return [part for part, is_there in has.items() if is_there]


def _their_prefixes(family: Family) -> dict[str, str]:
    """Where each part of an exit is in a model of one layer of theirs."""
    modules = _MODULES[family.model_types[0]]
    return {
        "block": f"{modules['layers']}.0.", "mlp": f"{modules['layers']}.0.mlp.", "norm": f"{modules['final_norm']}.",
        "output": "lm_head.",
    }  # fmt: skip


def _of_one_layer(model: ModelConfig) -> ModelConfig:
    return replace(model, num_layers=1, untie_embeddings_and_output_weights=True)


def _one_layer(tensors: Tensors, model: ModelConfig, layer_number: int) -> Tensors:
    """A model of one layer whose parts are the exit's where it has own ones, and else those of its layer and model."""
    layer = f"decoder.layers.{layer_number - 1}"
    head = below(tensors, f"{layer}{EXIT_HEAD}")
    one_layer = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.layers.")}
    one_layer["output_layer.weight"] = model_output_weight(tensors)
    one_layer |= {
        f"decoder.layers.0.{name}": tensor for name, tensor in below(without_exits(tensors), f"{layer}.").items()
    }
    for source, target in _PARTS.values():
        one_layer |= {source + name: tensor for name, tensor in below(head, target).items()}
    return one_layer


def _their_parts(one_layer: Tensors, model: ModelConfig, head: ExitHeadKind, family: Family) -> dict[str, Tensors]:
    """Parameters by part, as the architecture names them."""
    theirs, prefixes = family.theirs(one_layer, _of_one_layer(model)), _their_prefixes(family)
    return {part: below(theirs, prefixes[part]) for part in _parts_of(head)}
