"""What the commands of `tools/convert_checkpoint.py` share: flags, reading, saving, words."""

from __future__ import annotations

import argparse
import sys
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


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--load-iteration", type=int, metavar="N", help="default: the last one")


def add_target(parser: argparse.ArgumentParser, flag: str, with_dtype: bool = True) -> None:
    parser.add_argument(flag, type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    if with_dtype:
        parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as they are")


def add_vocabulary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, metavar="N", help="pad the vocabulary for so many ranks"
    )
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="times the ranks")


def read(args: argparse.Namespace) -> tuple[RunConfig, Tensors, Path]:
    from megatron.early_exit.checkpoint.legacy import holds_legacy
    from megatron.early_exit.checkpoint.store import check_target, checkpoint_folder, read_checkpoint

    if hasattr(args, "save"):
        check_target(args.save, args.force)
    if holds_legacy(args.load):
        raise ValueError(f"{args.load} is a legacy checkpoint; convert it first with from-legacy")
    folder = checkpoint_folder(args.load, args.load_iteration)
    config, tensors = read_checkpoint(folder)
    return config, tensors, folder


def save_changed(args: argparse.Namespace, folder: Path, config: RunConfig, tensors: Tensors) -> None:
    """A changed checkpoint keeps its tokenizer."""
    save(args, with_own_tokenizer(config, folder), tensors)


def with_own_tokenizer(config: RunConfig, folder: Path) -> RunConfig:
    """`config` with the tokenizer in the checkpoint that it comes from."""
    from megatron.early_exit.checkpoint.store import TOKENIZER_FOLDER
    from megatron.early_exit.data.tokenizer import saved_tokenizer_config

    if not (folder / TOKENIZER_FOLDER).is_dir():
        return config
    saved = saved_tokenizer_config(folder / TOKENIZER_FOLDER)
    data = replace(config.data, tokenizer_type=saved.tokenizer_type, tokenizer_model=saved.tokenizer_model)
    return replace(config, data=data)


def save(args: argparse.Namespace, config: RunConfig, tensors: Tensors) -> None:
    from megatron.early_exit.checkpoint.families import pad_vocabulary
    from megatron.early_exit.checkpoint.store import write_checkpoint
    from megatron.early_exit.data.tokenizer import build_tokenizer, check_ids_fit, save_tokenizer

    if args.save.is_file():
        raise FileExistsError(f"{args.save} is a file; give a folder")
    rows = config.model.padded_vocab_size or _padded_rows(args, tensors)
    data = config.data
    if not data.mock_data:
        check_ids_fit(build_tokenizer(data).vocab_size, rows)
    dtype = dtype_of(getattr(args, "dtype", None))
    tensors = pad_vocabulary(tensors, rows)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        config = replace(config, training=_training_in(config, dtype))
    config = replace(config, model=replace(config.model, padded_vocab_size=rows))
    with progress_shown("written") as progress:
        folder = write_checkpoint(
            args.save,
            config,
            tensors,
            copy_tokenizer=None if data.mock_data else lambda folder: save_tokenizer(data, folder),
            force=args.force,
            progress=progress,
        )
    exits = config.exits
    what = f"exits at layers {listed(exits.exit_layer_nums)}" if exits.num_exits else "no exits"
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


def run_config(model: ModelConfig, exits: ExitConfig, data: DataConfig, tensors: Tensors) -> RunConfig:
    """Settings for a checkpoint that no run of ours made: what concerns training is a placeholder."""
    from megatron.early_exit.config.optimization import OptimizerConfig, TrainingConfig
    from megatron.early_exit.config.run import RunConfig

    training = TrainingConfig(seq_length=model.max_position_embeddings, micro_batch_size=1)
    config = RunConfig(model=model, exits=exits, training=training, optimizer=OptimizerConfig(lr=1e-4), data=data)
    return replace(config, training=_training_in(config, next(iter(tensors.values())).dtype))


def _training_in(config: RunConfig, dtype: torch.dtype) -> Any:
    import torch

    return replace(config.training, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)


def dtype_of(name: str | None) -> torch.dtype | None:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}[name]


def with_length(config: RunConfig) -> ModelConfig:
    from megatron.early_exit.config.serialize import max_positions

    return replace(config.model, max_position_embeddings=max_positions(config))


@contextmanager
def progress_shown(what: str) -> Iterator[Callable[[int, int], None]]:
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


def show_notes(notes: Sequence[str]) -> None:
    """Lines on what is not as a user might think."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
