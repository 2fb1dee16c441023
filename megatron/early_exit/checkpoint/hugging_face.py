"""Models of `transformers` in a local folder: read tensor by tensor, and written as any such model is.

A folder holds `config.json`, `model.safetensors` or its shards with an index, and the tokenizer; or one GGUF file,
which `transformers` reads as a whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron.early_exit.checkpoint.families import (
    Family,
    family_of,
    model_output_weight,
    pad_vocabulary,
    standard_model_type,
    vocabulary_rows,
)
from megatron.early_exit.checkpoint.store import Progress
from megatron.early_exit.checkpoint.tensors import EXIT_HEAD, LazyTensor, Tensors, below, with_rows
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.data.tokenizer import HUGGING_FACE_FILES, MODEL_FILES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
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


def read_hugging_face(
    path: Path, max_position_embeddings: int | None = None
) -> tuple[ModelConfig, Tensors, PretrainedConfig]:
    """(our settings, our parameters without padding of the vocabulary, their config) of the model in a folder or a GGUF
    file.

    max_position_embeddings: shorter sequences than the model takes. Raises ValueError or OSError with what is wrong."""
    path, gguf_file = _split_gguf(path)
    config = _read_config(path, gguf_file)
    family = family_of(config.model_type)
    if max_position_embeddings is not None:
        config.max_position_embeddings = _shorter(max_position_embeddings, config.max_position_embeddings)
    model = family.model_config(config)
    theirs = _read_gguf(path, gguf_file) if gguf_file else _read_safetensors(path)
    try:
        ours = family.ours(theirs, model)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}; it has {', '.join(sorted(theirs)[:3])}, ...") from None
    positions = "embedding.position_embeddings.weight"
    if positions in ours:
        ours[positions] = with_rows(ours[positions], model.max_position_embeddings)
    if len({tensor.dtype for tensor in ours.values()}) > 1:
        ours = {name: tensor.to(torch.float32) for name, tensor in ours.items()}
    return model, ours, config


def from_transformers(theirs: PreTrainedModel, vocab_rows: int) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """(our settings, our parameters) of a model that is in memory already. vocab_rows: of the embedding, padded."""
    family = family_of(theirs.config.model_type)
    model = family.model_config(theirs.config)
    ours = family.ours({name: LazyTensor.of(tensor) for name, tensor in theirs.state_dict().items()}, model)
    return model, {name: tensor.read() for name, tensor in pad_vocabulary(ours, vocab_rows).items()}


def _shorter(wanted: int, limit: int) -> int:
    if not 1 <= wanted <= limit:
        raise ValueError(f"--max-position-embeddings {wanted}: the model takes sequences of 1 to {limit} tokens")
    return wanted


def _split_gguf(path: Path) -> tuple[Path, str | None]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder with config.json, or a GGUF file")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is neither a folder nor a GGUF file")
        return path.parent, path.name
    if not (path / "config.json").is_file():
        candidates = sorted(path.glob("*.gguf"))
        if len(candidates) == 1:
            return path, candidates[0].name
        raise FileNotFoundError(f"{path} holds no config.json" + (", and several GGUF files" if candidates else ""))
    return path, None


def _read_config(path: Path, gguf_file: str | None) -> PretrainedConfig:
    from transformers import AutoConfig

    if gguf_file is None:
        name = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
        family_of(str(name))  # names what is supported, before transformers says that it does not know it
    try:
        return AutoConfig.from_pretrained(path, **({"gguf_file": gguf_file} if gguf_file else {}))
    except Exception as error:  # of many kinds, KeyError among them
        raise ValueError(f"transformers cannot read the settings of the model in {path}: {error}") from error


def _read_gguf(path: Path, gguf_file: str) -> Tensors:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=gguf_file, dtype=torch.float32)
    return {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    files = _weight_files(path)
    tensors: Tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    part = opened.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise ValueError(f"{file}: {name} has the type {part.get_dtype()}, which is not supported")
                    read = lambda file=file, name=name: _read_tensor(file, name)
                    tensors[name] = LazyTensor(tuple(part.get_shape()), dtype, read)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{file} cannot be read, it may be damaged or not fully copied: {error}") from error
    return tensors


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{path} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}")
        return [path / name for name in names]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    hint = "; save it as safetensors first" if list(path.glob("*.bin")) else ""
    raise FileNotFoundError(f"{path} holds no {WEIGHTS} and no {INDEX}{hint}")


def _read_tensor(file: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def tokenizer_files(path: Path) -> list[Path]:
    """Files of the tokenizer and the settings in a folder of `transformers`."""
    names = (*HUGGING_FACE_FILES, *MODEL_FILES)
    return [path / name for name in names if (path / name).is_file()]


def write_hugging_face(
    output: Path,
    model: ModelConfig,
    tensors: Tensors,
    *,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    special_ids: dict[str, int | None] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    exits: ExitConfig | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> str:
    """Write a model as a standard one of `transformers`; returns its model type.

    tensors: ours. tokenizer: folder with a tokenizer, and with the config.json that the model came with, if it did: its
    model type and special ids are kept. vocab_size: ids of the model; default: that of this config.json, else all rows.
    special_ids: eos_token_id and so on, of a model that did not come from there.
    exits: write them as well, in a file of their own, with a class that generates with them (`remote_code/`).
    Raises ValueError if no architecture of `transformers` is like this, FileExistsError if `output` holds something."""
    if output.exists() and any(output.iterdir()) and not force:
        raise FileExistsError(f"{output} is not empty; choose another folder, or --force to replace it")
    source = {**(special_ids or {}), **_source_config(tokenizer)}
    if exits is not None:
        _check_exits(exits)
    family, model_type = _target_family(model, source)
    rows = vocab_size or source.get("vocab_size") or vocabulary_rows(tensors)
    tensors = pad_vocabulary(tensors, rows)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    theirs = family.theirs(without_exits(tensors), model)
    with _partial(output) as partial:
        dtype = next(iter(theirs.values())).dtype
        _write_config(partial, family, model_type, model, source, rows, dtype)
        _write_safetensors(partial, theirs, max_shard_bytes, progress)
        if exits is not None:
            _write_exits(partial, tensors, model, exits, family)
        for file in tokenizer_files(tokenizer) if tokenizer is not None else []:
            if file.name != "config.json":
                shutil.copyfile(file, partial / file.name)
    return model_type


@contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """A folder that gets the name `output` when all is written."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)


def _source_config(tokenizer: Path | None) -> dict[str, Any]:
    file = None if tokenizer is None else tokenizer / "config.json"
    return {} if file is None or not file.is_file() else json.loads(file.read_text(encoding="utf-8"))


def _target_family(model: ModelConfig, source: dict[str, Any]) -> tuple[Family, str]:
    standard, name = standard_model_type(model), source.get("model_type")
    if {standard, name} <= {"llama", "mistral"}:  # they have one architecture
        return family_of(name), name
    return family_of(standard), standard


def _write_config(
    folder: Path,
    family: Family,
    model_type: str,
    model: ModelConfig,
    source: dict[str, Any],
    vocab_size: int,
    dtype: torch.dtype,
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    kept = {name: source[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in source}
    config = AutoConfig.for_model(
        model_type,
        **family.settings(model),
        **kept,
        vocab_size=vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
    )
    if model_type == "mistral":
        config.sliding_window = None
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.dtype = dtype
    config.save_pretrained(folder)


def _write_safetensors(folder: Path, tensors: Tensors, max_shard_bytes: int, progress: Progress | None) -> None:
    """Shards of whole tensors, each at most `max_shard_bytes` unless one tensor is larger; one shard in memory."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.num_bytes
    total, written, weight_map = sum(tensor.num_bytes for tensor in tensors.values()), 0, {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        state = {name: tensors[name].read().to(tensors[name].dtype).contiguous().clone() for name in names}
        save_file(state, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        written += sum(tensors[name].num_bytes for name in names)
        if progress is not None:
            progress(written, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _check_exits(exits: ExitConfig) -> None:
    if not exits.num_exits:
        raise ValueError("the model has no exits to write (--with-exits); leave --with-exits out, or add-exits first")


def _write_exits(folder: Path, tensors: Tensors, model: ModelConfig, exits: ExitConfig, family: Family) -> None:
    """The exits' weights, their settings in config.json, and the class that uses both."""
    from safetensors.torch import save_file

    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    modules = _MODULES[family.model_types[0]]
    state = {}
    for index, layer in enumerate(exits.exit_layer_nums):
        for name, tensor in _their_exit(tensors, model, exits, family, layer).items():
            state[f"{index}.{name}"] = tensor.read().to(tensor.dtype).contiguous().clone()
    save_file(state, folder / "exits.safetensors", metadata={"format": "pt"})
    config["early_exits"] = {
        "layers": list(exits.exit_layer_nums), "pre_exit": exits.pre_exit, "block": exits.use_exit_block,
        "mlp": exits.use_exit_mlp, "norm": exits.use_exit_norm, "own_output": exits.untie_exit_output_weights,
        "temperatures": [exits.temperature_of(index) for index in range(exits.num_exits)], "modules": modules,
    }  # fmt: skip
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_early_exit.EarlyExitForCausalLM"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    code = (Path(__file__).parent / "remote_code" / "modeling_early_exit.py").read_text(encoding="utf-8")
    base = config["architectures"][0]
    (folder / "modeling_early_exit.py").write_text(code.replace("LlamaForCausalLM as Base", f"{base} as Base"))


def _their_exit(tensors: Tensors, model: ModelConfig, exits: ExitConfig, family: Family, layer_number: int) -> Tensors:
    """The own parameters of the exit at a layer, as `remote_code/` names them.

    They are converted as those of a model of one layer: the exit's block, or its layer with the exit's MLP, and the
    exit's norm and output as the final ones."""
    layer = f"decoder.layers.{layer_number - 1}"
    head = below(tensors, f"{layer}{EXIT_HEAD}")
    one_layer = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.layers.")}
    one_layer["output_layer.weight"] = head.get("output_layer.weight", model_output_weight(tensors))
    one_layer |= {f"decoder.final_layernorm.{name}": tensor for name, tensor in below(head, "norm.").items()}
    parts = below(without_exits(tensors), f"{layer}.") | below(head, "block.")
    parts |= {f"mlp.{name}": tensor for name, tensor in below(head, "mlp.").items()}
    one_layer |= {f"decoder.layers.0.{name}": tensor for name, tensor in parts.items()}
    theirs = family.theirs(one_layer, replace(model, num_layers=1, untie_embeddings_and_output_weights=True))
    modules = _MODULES[family.model_types[0]]
    sources = {
        "block": (exits.use_exit_block, f"{modules['layers']}.0."),
        "mlp": (exits.use_exit_mlp, f"{modules['layers']}.0.mlp."),
        "norm": (exits.use_exit_norm, f"{modules['final_norm']}."),
        "output": (exits.untie_exit_output_weights, "lm_head."),
    }
    return {
        f"{part}.{name}": tensor
        for part, (is_there, prefix) in sources.items()
        if is_there
        for name, tensor in below(theirs, prefix).items()
    }


def without_exits(tensors: Tensors) -> Tensors:
    """The parameters of the plain model."""
    return {name: tensor for name, tensor in tensors.items() if EXIT_HEAD not in name}
