"""From and to models of Hugging Face transformers: from-hf, to-hf."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.early_exit.checkpoint.commands.common import (
    add_comparison,
    add_source,
    add_target,
    add_vocabulary,
    describe,
    in_dtype,
    listed,
    progress_shown,
    read,
    save,
    show_notes,
)

if TYPE_CHECKING:
    from megatron.early_exit.checkpoint.hugging_face import Source
    from megatron.early_exit.checkpoint.tensors import Tensors
    from megatron.early_exit.config.description import ModelDescription


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = commands.add_parser("from-hf", help="a model of Hugging Face transformers -> ours")
    one.add_argument("--input", type=Path, required=True, metavar="DIR", help="local folder, or a GGUF file")
    add_target(one, "--save")
    add_vocabulary(one)
    one.add_argument("--max-position-embeddings", type=int, metavar="N", help="longest sequence; default: the model's")
    add_comparison(one)
    one.set_defaults(run=from_hugging_face)

    one = commands.add_parser("to-hf", help="ours -> a model of Hugging Face transformers")
    add_source(one)
    add_target(one, "--output")
    which = one.add_mutually_exclusive_group()
    which.add_argument(
        "--with-exits",
        action="store_true",
        help="write the exits too, with a class (trust_remote_code) that uses them",
    )
    which.add_argument(
        "--exit", type=int, metavar="N", help="write the exit at layer N as a plain model of its own, of fewer layers"
    )
    one.add_argument(
        "--unit-norm",
        action="store_true",
        help="with --exit, for exits without a norm: a final norm of ones, which keeps the order of tokens alone",
    )
    add_comparison(one)
    one.set_defaults(run=to_hugging_face)


def from_hugging_face(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.hugging_face import read_hugging_face
    from megatron.early_exit.checkpoint.vocabulary import pad_vocabulary
    from megatron.early_exit.checkpoint.writing import check_target
    from megatron.early_exit.config.data import TokenizerConfig

    check_target(args.save, args.force)
    source = read_hugging_face(args.input, args.max_position_embeddings)
    show_notes(source.notes)
    with tokenizer_folder(args.input, source.config) as folder:
        tokenizer = TokenizerConfig("HuggingFaceTokenizer", str(folder))
        tensors = pad_vocabulary(source.tensors, _rows_for(folder, source.config.vocab_size))
        done: list[str] = []
        check = None if args.skip_comparison else lambda made: done.append(_compare_import(made, source, folder))
        save(args, describe(args, source.model, source.exits, tokenizer, tensors), tensors, check)
    print(*done or ["not compared with its source (--skip-comparison)"])


def _rows_for(tokenizer: Path, rows: int) -> int:
    """Rows of the embedding for a model of `rows` ids: more, if its tokenizer has got further tokens.

    Raises ValueError if other tokens than added ones have no row: it is another model's tokenizer."""
    from megatron.early_exit.checkpoint.comparison import their_tokenizer

    library = their_tokenizer(tokenizer)
    without_row = {token: index for token, index in library.get_vocab().items() if index >= rows}
    if not without_row:
        return rows
    num_ids: int = max(without_row.values()) + 1
    if without_row.keys() - library.get_added_vocab().keys():
        raise ValueError(
            f"the tokenizer has {num_ids} ids, but the model's embedding has {rows} rows: it is that of another "
            "model; put the model's own into the folder"
        )
    names = sorted(without_row, key=without_row.__getitem__)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    show_notes([
        f"the tokenizer has {len(names)} added token(s) that the model has no row for ({', '.join(names[:5])}{more}): "
        "rows of zeros are added, and the model never says them unless it is trained to"
    ])  # fmt: skip
    return num_ids


def _compare_import(made: Path, source: Source, tokenizer: Path) -> str:
    """What was compared. Raises ValueError if the checkpoint in `made` is not the model of `source`."""
    from megatron.early_exit.checkpoint.comparison import Head, compare_logits, compare_tokenizers, compare_weights
    from megatron.early_exit.checkpoint.families import family_of
    from megatron.early_exit.checkpoint.store import read_checkpoint
    from megatron.early_exit.checkpoint.tensors import without_exits
    from megatron.early_exit.config.checkpoint_files import TOKENIZER_FOLDER

    _, tensors = read_checkpoint(made)
    compare_weights(tensors, source.tensors)
    theirs = family_of(source.config.model_type).theirs(without_exits(tensors), source.model)
    compare_weights(theirs, source.theirs)
    compare_tokenizers(made / TOKENIZER_FOLDER, tokenizer)
    gguf = None if source.gguf_file is None else (source.gguf_file, source.config)
    head = Head(source.tensors, source.model)
    return "compared: weights, tokenizer; " + compare_logits(
        head, source.folder, vocab_size=source.config.vocab_size, gguf=gguf
    )


def to_hugging_face(args: argparse.Namespace) -> None:
    from megatron.early_exit.checkpoint.fixed_depth import model_of_exit
    from megatron.early_exit.checkpoint.hugging_face import write_hugging_face
    from megatron.early_exit.config.checkpoint_files import TOKENIZER_FOLDER

    if args.unit_norm and args.exit is None:
        raise ValueError("--unit-norm is for --exit")
    description, tensors, folder = read(args)
    tokenizer = folder / TOKENIZER_FOLDER
    tensors = in_dtype(tensors, args.dtype)
    model, written = description.model, tensors
    if args.exit is not None:
        model, written = model_of_exit(tensors, model, description.exits, args.exit, unit_norm=args.unit_norm)
    done: list[str] = []
    check = lambda made: done.append(_compare_export(made, args, description, tensors, written, tokenizer))
    with progress_shown("written") as progress:
        model_type = write_hugging_face(
            args.output,
            model,
            written,
            exits=description.exits if args.with_exits else None,
            tokenizer=tokenizer if tokenizer.is_dir() else None,
            **_ids_of(tokenizer, description, tensors),
            check=None if args.skip_comparison else check,
            force=args.force,
            progress=progress,
        )
    exits = ""
    if args.exit is not None:
        exits = f": the exit at layer {args.exit}, {model.num_layers} layers"
    elif description.exits.num_exits:
        exits = f", {'with' if args.with_exits else 'without'} its exits ({listed(description.exits.exit_layer_nums)})"
    print(f"{args.output}: a {model_type} of transformers{exits}")
    print(*done or ["not compared with its source (--skip-comparison)"])


def _compare_export(
    made: Path,
    args: argparse.Namespace,
    description: ModelDescription,
    tensors: Tensors,
    written: Tensors,
    tokenizer: Path,
) -> str:
    """What was compared. Raises ValueError if the model in `made` is not the one of `tensors`, or its exit."""
    from megatron.early_exit.checkpoint.comparison import (
        Head,
        compare_exported_tokenizer,
        compare_logits,
        compare_weights,
    )
    from megatron.early_exit.checkpoint.hugging_face import read_hugging_face
    from megatron.early_exit.checkpoint.tensors import without_exits
    from megatron.early_exit.checkpoint.vocabulary import pad_vocabulary

    again = read_hugging_face(made)
    rows = again.config.vocab_size
    compare_weights(again.tensors, pad_vocabulary(written if args.with_exits else without_exits(written), rows))
    compared = "no tokenizer (there is none)"
    if tokenizer.is_dir():
        compared = compare_exported_tokenizer(made, tokenizer, description.tokenizer.tokenizer_type)
    # A temperature is divided out of a weight, which rounds.
    is_rounded = args.exit is not None and description.exits.exit_layer_temperature and args.dtype != "fp32"
    head = Head(tensors, description.model, description.exits, args.exit)
    return f"compared: weights, {compared}; " + compare_logits(
        head, made, vocab_size=rows, tolerance=2e-2 if is_rounded else 1e-3, choices_only=args.unit_norm
    )


def _ids_of(tokenizer: Path, description: ModelDescription, tensors: Tensors) -> dict[str, Any]:
    """What `write_hugging_face` must be told of the ids of a model that did not come from transformers, or whose
    tokenizer has got further tokens since, with which it was trained."""
    from megatron.early_exit.checkpoint.vocabulary import model_output_weight
    from megatron.early_exit.checkpoint.weight_files import read_json
    from megatron.early_exit.data.tokenizer import load_tokenizer

    if (tokenizer / "config.json").is_file():
        rows, num_ids = read_json(tokenizer / "config.json").get("vocab_size"), load_tokenizer(tokenizer).vocab_size
        has_more = rows is not None and num_ids > rows and bool(model_output_weight(tensors).read()[rows:num_ids].any())
        return {"vocab_size": num_ids} if has_more else {}
    if not tokenizer.is_dir():
        return {"vocab_size": description.padded_vocab_size}
    own = load_tokenizer(tokenizer)
    return {
        "vocab_size": own.vocab_size,
        "special_ids": {"eos_token_id": own.eod, "bos_token_id": own.bos, "pad_token_id": None},
    }


@contextmanager
def tokenizer_folder(path: Path, their_config: Any) -> Iterator[Path]:
    """A folder with the tokenizer's files; of a GGUF file, made for the while."""
    from megatron.early_exit.data.tokenizer_files import MODEL_FILES, present_files

    if path.is_dir() and any(file.name not in MODEL_FILES for file in present_files(path)):
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
