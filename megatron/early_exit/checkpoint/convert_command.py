"""The programme behind `tools/convert_checkpoint.py`: from and to other formats, exits added and removed."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megatron.early_exit.checkpoint.tensors import Tensors
    from megatron.early_exit.config.data import DataConfig
    from megatron.early_exit.config.exits import ExitConfig
    from megatron.early_exit.config.model import ModelConfig
    from megatron.early_exit.config.run import RunConfig

DTYPES = ("fp32", "bf16", "fp16")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description="Convert checkpoints, add early exits to them and look into them. Tensors pass one by one, so that "
        "a model need not fit into memory, and no GPU is needed. Our checkpoints load under any tensor, pipeline and "
        "data parallel size.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser("from-hf", help="a model of Hugging Face transformers -> ours")
    one.add_argument("--input", type=Path, required=True, metavar="DIR", help="local folder, or a GGUF file")
    _add_target(one, "--save")
    _add_vocabulary(one)
    one.add_argument("--max-position-embeddings", type=int, metavar="N", help="longest sequence; default: the model's")
    one.set_defaults(run=from_hugging_face)

    one = commands.add_parser("to-hf", help="ours -> a model of Hugging Face transformers")
    _add_source(one)
    _add_target(one, "--output")
    one.add_argument(
        "--with-exits",
        action="store_true",
        help="write the exits too, with a class (trust_remote_code) that uses them",
    )
    one.set_defaults(run=to_hugging_face)

    one = commands.add_parser("from-legacy", help="a checkpoint of the original EE-LLM -> ours")
    _add_source(one)
    _add_target(one, "--save")
    one.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="for --load of partial tuning (--tune-exit-pipeline-parallel-size): the whole model that it was tuned "
        "from, a checkpoint of the original EE-LLM or one of ours; it gives what is missing",
    )
    tokenizer = "tokenizer that the model was trained with; default: what the checkpoint names"
    one.add_argument("--tokenizer-type", help=tokenizer)
    one.add_argument("--tokenizer-model", metavar="PATH", help="its folder or file")
    one.add_argument("--vocab-size", type=int, help="with --tokenizer-type NullTokenizer")
    one.set_defaults(run=from_legacy)

    one = commands.add_parser("add-exits", help="add early exits, ready to be tuned")
    _add_source(one)
    _add_target(one, "--save", with_dtype=False)
    one.add_argument("--exit-layer-nums", type=int, nargs="+", required=True, metavar="N", help="layers, from 1")
    one.add_argument("--pre-exit", action="store_true", help="exits read the input of their layers")
    one.add_argument("--untie-exit-output-weights", action="store_true", help="output projections of their own")
    one.add_argument("--use-exit-norm", action="store_true", help="a norm before the output projection")
    one.add_argument("--use-exit-mlp", action="store_true", help="through an MLP branch")
    one.add_argument("--use-exit-block", action="store_true", help="through one more transformer layer")
    one.add_argument(
        "--init", choices=("copy", "random"), default="copy", help="of the model's own parts; default copy"
    )
    one.add_argument("--replace", action="store_true", help="start exits that are there anew")
    one.add_argument("--seed", type=int, default=1234, help="of --init random")
    one.set_defaults(run=add)

    one = commands.add_parser("remove-exits", help="take exits away")
    _add_source(one)
    _add_target(one, "--save", with_dtype=False)
    one.add_argument("--exit-layer-nums", type=int, nargs="+", metavar="N", help="default: all")
    one.set_defaults(run=remove)

    one = commands.add_parser(
        "reshard", help="pad the vocabulary for a tensor-parallel size (nothing else depends on it)"
    )
    _add_source(one)
    _add_target(one, "--save", with_dtype=False)
    _add_vocabulary(one)
    one.set_defaults(run=reshard)

    one = commands.add_parser("inspect", help="architecture, exits and sizes")
    _add_source(one)
    one.add_argument("--tensors", action="store_true", help="every tensor with shape and type")
    one.set_defaults(run=inspect)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--load-iteration", type=int, metavar="N", help="default: the last one")


def _add_target(parser: argparse.ArgumentParser, flag: str, with_dtype: bool = True) -> None:
    parser.add_argument(flag, type=Path, required=True, metavar="DIR", dest="save", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    if with_dtype:
        parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as they are")


def _add_vocabulary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, metavar="N", help="pad the vocabulary for so many ranks"
    )
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="times the ranks")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for what cannot be converted, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_checkpoint.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


# The sub-commands. Each raises ValueError or OSError with what is wrong.


def from_hugging_face(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.hugging_face import read_hugging_face
    from megatron.early_exit.checkpoint.store import check_target
    from megatron.early_exit.config.data import DataConfig
    from megatron.early_exit.config.exits import ExitConfig

    check_target(args.save, args.force)
    model, tensors, their_config = read_hugging_face(args.input, args.max_position_embeddings)
    with _tokenizer_folder(args.input, their_config) as folder:
        data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
        _save(args, _run_config(model, ExitConfig(), data, tensors), tensors)


def to_hugging_face(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.hugging_face import write_hugging_face
    from megatron.early_exit.checkpoint.store import TOKENIZER_FOLDER

    config, tensors, folder = _read(args)
    tokenizer = folder / TOKENIZER_FOLDER
    with _progress("written") as progress:
        model_type = write_hugging_face(
            args.save,
            _with_length(config),
            tensors,
            exits=config.exits if args.with_exits else None,
            tokenizer=tokenizer if tokenizer.is_dir() else None,
            **_ids_of(tokenizer, config),
            dtype=_dtype(args.dtype),
            force=args.force,
            progress=progress,
        )
    exits = ""
    if config.exits.num_exits:
        exits = f", {'with' if args.with_exits else 'without'} its exits ({_listed(config.exits.exit_layer_nums)})"
    print(f"{args.save}: a {model_type} of transformers{exits}")


def from_legacy(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.legacy import find_legacy, read_legacy
    from megatron.early_exit.checkpoint.store import check_target

    check_target(args.save, args.force)
    folder = find_legacy(args.load, args.load_iteration)
    if args.base is not None:
        _merge_legacy(args, folder)
        return
    model, exits, tensors, theirs = read_legacy(folder)
    data = _legacy_tokenizer(args, theirs)
    _save(args, _run_config(model, exits, data, tensors), tensors)


def _merge_legacy(args: argparse.Namespace, folder: Path) -> None:
    from megatron.early_exit.checkpoint.legacy import read_partial
    from megatron.early_exit.checkpoint.legacy_merge import merge_partial

    partial = read_partial(folder)
    config, tensors = _read_base(args, partial.settings)
    with _progress("compared") as progress:
        merged = merge_partial(partial, config, tensors, progress)
    for layers, why in merged.left_out:
        print(f"no exits at layers {_listed(layers)}: {why}", file=sys.stderr)
    _save(args, merged.config, merged.tensors)


def _read_base(args: argparse.Namespace, settings: argparse.Namespace) -> tuple[RunConfig, Tensors]:
    """The model of --base with the tokenizer of the flags, else its own. settings: of the checkpoint it is for, whose
    tokenizer is that of a legacy base."""
    from megatron.early_exit.checkpoint.legacy import find_legacy, holds_legacy, read_legacy
    from megatron.early_exit.checkpoint.store import checkpoint_folder, read_checkpoint
    from megatron.early_exit.config.validate import LATEST_FILE

    if holds_legacy(args.base):
        model, exits, tensors, _ = read_legacy(find_legacy(args.base))
        return _run_config(model, exits, _legacy_tokenizer(args, settings), tensors), tensors
    if not (args.base / LATEST_FILE).is_file():
        raise FileNotFoundError(f"--base {args.base} holds no checkpoint, of EE-LLM or ours")
    folder = checkpoint_folder(args.base)
    config, tensors = read_checkpoint(folder)
    if args.tokenizer_type or args.tokenizer_model:
        return replace(config, data=_legacy_tokenizer(args, settings)), tensors
    return _with_own_tokenizer(config, folder), tensors


def add(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.exits import add_exits
    from megatron.early_exit.config.exits import ExitConfig

    config, tensors, folder = _read(args)
    wanted = ExitConfig(
        exit_layer_nums=tuple(sorted(args.exit_layer_nums)),
        pre_exit=args.pre_exit,
        untie_exit_output_weights=args.untie_exit_output_weights,
        use_exit_norm=args.use_exit_norm,
        use_exit_mlp=args.use_exit_mlp,
        use_exit_block=args.use_exit_block,
    )
    tensors, exits = add_exits(
        tensors, config.model, config.exits, wanted, init=args.init, replace_present=args.replace, seed=args.seed
    )
    _save_changed(args, folder, replace(config, exits=exits), tensors)


def remove(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.exits import remove_exits

    config, tensors, folder = _read(args)
    layers = None if args.exit_layer_nums is None else tuple(args.exit_layer_nums)
    tensors, exits = remove_exits(tensors, config.exits, layers)
    _save_changed(args, folder, replace(config, exits=exits), tensors)


def reshard(args: argparse.Namespace) -> None:
    config, tensors, folder = _read(args)
    config = replace(config, model=replace(config.model, padded_vocab_size=None))
    _save_changed(args, folder, config, tensors)


def inspect(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.families import standard_model_type, vocabulary_rows
    from megatron.early_exit.checkpoint.store import has_training_state
    from megatron.early_exit.checkpoint.tensors import EXIT_HEAD

    config, tensors, folder = _read(args)
    model, exits = config.model, config.exits
    try:
        like = f"as {standard_model_type(model)} of transformers"
    except ValueError:
        like = "no architecture of transformers"
    count = lambda names: sum(_numel(tensors[name].shape) for name in names)
    size = sum(tensor.num_bytes for tensor in tensors.values())
    of_exits = [name for name in tensors if EXIT_HEAD in name]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    rows = [
        ("checkpoint", f"{folder}, {'with' if has_training_state(folder) else 'without'} training state"),
        ("architecture", f"{model.num_layers} layers of width {model.hidden_size}, {like}"),
        (
            "attention",
            f"{model.num_attention_heads} heads of {model.head_size}, {model.num_kv_heads} of keys and values, "
            f"{model.position_embedding_type}, up to {_with_length(config).max_position_embeddings} positions",
        ),
        ("vocabulary", f"{vocabulary_rows(tensors)} rows, {_divisors(vocabulary_rows(tensors))}"),
        ("parameters", f"{count(tensors):,}, {size / 2**20:,.0f} MiB in {', '.join(dtypes)}"),
        ("exits", f"after layers {_listed(exits.exit_layer_nums)}" if exits.num_exits else "none"),
    ]
    if exits.num_exits:
        before = "before" if exits.pre_exit else "after"
        rows[-1] = ("exits", f"{before} layers {_listed(exits.exit_layer_nums)}: {_kind(exits)}")
        rows.append(("of exits", f"{count(of_exits):,} parameters of their own"))
    for name, text in rows:
        print(f"{name:<14}{text}")
    if args.tensors:
        width = max(map(len, tensors))
        for name, tensor in tensors.items():
            print(f"{name:<{width}}  {list(tensor.shape)!s:<16} {str(tensor.dtype).removeprefix('torch.')}")


# What they share.


def _read(args: argparse.Namespace) -> tuple[RunConfig, Tensors, Path]:
    from megatron.early_exit.checkpoint.legacy import holds_legacy
    from megatron.early_exit.checkpoint.store import check_target, checkpoint_folder, read_checkpoint

    if hasattr(args, "save") and args.run is not to_hugging_face:
        check_target(args.save, args.force)
    if holds_legacy(args.load):
        raise ValueError(f"{args.load} is a legacy checkpoint; convert it first with from-legacy")
    folder = checkpoint_folder(args.load, args.load_iteration)
    config, tensors = read_checkpoint(folder)
    return config, tensors, folder


def _save_changed(args: argparse.Namespace, folder: Path, config: RunConfig, tensors: Tensors) -> None:
    """A changed checkpoint keeps its tokenizer."""
    _save(args, _with_own_tokenizer(config, folder), tensors)


def _with_own_tokenizer(config: RunConfig, folder: Path) -> RunConfig:
    """`config` with the tokenizer in the checkpoint that it comes from."""
    from megatron.early_exit.checkpoint.store import TOKENIZER_FOLDER
    from megatron.early_exit.data.tokenizer import saved_tokenizer_config

    if not (folder / TOKENIZER_FOLDER).is_dir():
        return config
    saved = saved_tokenizer_config(folder / TOKENIZER_FOLDER)
    data = replace(config.data, tokenizer_type=saved.tokenizer_type, tokenizer_model=saved.tokenizer_model)
    return replace(config, data=data)


def _save(args: argparse.Namespace, config: RunConfig, tensors: Tensors) -> None:
    from megatron.early_exit.checkpoint.families import pad_vocabulary
    from megatron.early_exit.checkpoint.store import write_checkpoint
    from megatron.early_exit.data.tokenizer import build_tokenizer, check_ids_fit, save_tokenizer

    if args.save.is_file():
        raise FileExistsError(f"{args.save} is a file; give a folder")
    rows = config.model.padded_vocab_size or _padded_rows(args, tensors)
    data = config.data
    if not data.mock_data:
        check_ids_fit(build_tokenizer(data).vocab_size, rows)
    dtype = _dtype(getattr(args, "dtype", None))
    tensors = pad_vocabulary(tensors, rows)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        config = replace(config, training=_training_in(config, dtype))
    config = replace(config, model=replace(config.model, padded_vocab_size=rows))
    with _progress("written") as progress:
        folder = write_checkpoint(
            args.save,
            config,
            tensors,
            copy_tokenizer=None if data.mock_data else lambda folder: save_tokenizer(data, folder),
            force=args.force,
            progress=progress,
        )
    exits = config.exits
    what = f"exits at layers {_listed(exits.exit_layer_nums)}" if exits.num_exits else "no exits"
    print(f"{folder}: {config.model.num_layers} layers, {what}")


def _padded_rows(args: argparse.Namespace, tensors: Tensors) -> int:
    """Rows of the vocabulary for the ranks that the flags name."""
    from megatron.early_exit.checkpoint.families import vocabulary_rows

    multiple = getattr(args, "make_vocab_size_divisible_by", 128) * getattr(args, "tensor_model_parallel_size", 1)
    if multiple < 1:
        raise ValueError(
            f"--make-vocab-size-divisible-by {args.make_vocab_size_divisible_by} and --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} must be at least 1"
        )
    return -(-vocabulary_rows(tensors) // multiple) * multiple


def _run_config(model: ModelConfig, exits: ExitConfig, data: DataConfig, tensors: Tensors) -> RunConfig:
    """Settings for a checkpoint that no run of ours made: what concerns training is a placeholder."""
    from megatron.early_exit.config.optimization import OptimizerConfig, TrainingConfig
    from megatron.early_exit.config.run import RunConfig

    training = TrainingConfig(seq_length=model.max_position_embeddings, micro_batch_size=1)
    config = RunConfig(model=model, exits=exits, training=training, optimizer=OptimizerConfig(lr=1e-4), data=data)
    return replace(config, training=_training_in(config, next(iter(tensors.values())).dtype))


def _training_in(config: RunConfig, dtype: torch.dtype) -> Any:
    import torch

    return replace(config.training, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}[name]


def _with_length(config: RunConfig) -> ModelConfig:
    from megatron.early_exit.config.serialize import max_positions

    return replace(config.model, max_position_embeddings=max_positions(config))


def _ids_of(tokenizer: Path, config: RunConfig) -> dict[str, Any]:
    """What `write_hugging_face` must be told of the ids of a model that did not come from transformers."""
    from megatron.early_exit.data.tokenizer import load_tokenizer

    if (tokenizer / "config.json").is_file():
        return {}  # it says
    if not tokenizer.is_dir():
        return {"vocab_size": config.model.padded_vocab_size}
    own = load_tokenizer(tokenizer)
    return {
        "vocab_size": own.vocab_size,
        "special_ids": {"eos_token_id": own.eod, "bos_token_id": own.bos, "pad_token_id": None},
    }


@contextmanager
def _tokenizer_folder(path: Path, their_config: Any) -> Iterator[Path]:
    """A folder with the tokenizer's files; of a GGUF file, made for the while."""
    from megatron.early_exit.checkpoint.hugging_face import tokenizer_files
    from megatron.early_exit.data.tokenizer import MODEL_FILES

    if path.is_dir() and any(file.name not in MODEL_FILES for file in tokenizer_files(path)):
        yield path
        return
    from transformers import AutoTokenizer

    files = [path] if path.is_file() else list(path.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{path} holds no tokenizer (tokenizer.json or tokenizer.model); copy it there")
    folder, name = files[0].parent, files[0].name
    with tempfile.TemporaryDirectory() as temporary:
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(temporary)
        their_config.quantization_config = None
        their_config.save_pretrained(temporary)
        yield Path(temporary)


def _legacy_tokenizer(args: argparse.Namespace, theirs: argparse.Namespace) -> DataConfig:
    from megatron.early_exit.config.data import DataConfig

    kind = args.tokenizer_type or getattr(theirs, "tokenizer_type", None)
    path = args.tokenizer_model or getattr(theirs, "tokenizer_model", None)
    size = args.vocab_size or getattr(theirs, "vocab_size", None)
    if kind == "NullTokenizer":
        return DataConfig(tokenizer_type=kind, vocab_size=size)
    if path is None or not Path(path).exists():
        raise ValueError(
            f"the checkpoint names the tokenizer {kind} {path}, which is not here; give --tokenizer-type and "
            "--tokenizer-model (or --tokenizer-type NullTokenizer --vocab-size N for a model of bare numbers)"
        )
    return DataConfig(tokenizer_type=kind, tokenizer_model=str(path))


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A line that grows on a terminal, and one line a tenth elsewhere."""
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // max(total, 1)
        if tenth == shown:
            return
        shown = tenth
        text = f"{what} {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB"
        print(text, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    yield show
    if shown >= 0 and sys.stderr.isatty():
        print(file=sys.stderr)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _kind(exits: ExitConfig) -> str:
    parts = [
        ("transformer block", exits.use_exit_block), ("MLP branch", exits.use_exit_mlp), ("norm", exits.use_exit_norm),
        ("own output projection", exits.untie_exit_output_weights),
        ("the model's output projection", not exits.untie_exit_output_weights),
    ]  # fmt: skip
    return ", ".join(name for name, is_on in parts if is_on)


def _divisors(rows: int) -> str:
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if rows % size == 0]
    return f"for tensor parallel sizes up to {max(sizes)}"


def _numel(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)
