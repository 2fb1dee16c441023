"""What the commands of `evaluate.py` share: flags of the model and of the output, the loaded model, the document."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.early_exit.inference.model_flags import ModelFlags, add_model_flags, engine_settings
from megatron.early_exit.platform.program_flags import flags_of

if TYPE_CHECKING:
    from megatron.early_exit.inference.engine_loading import LoadedEngine
    from megatron.early_exit.inference.llm import LLM

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(commands: Commands, name: str, words: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command that loads one model and writes one document, `NAME.json`."""
    parser = commands.add_parser(name, help=words, description=description)
    add_model_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: evaluation/{name}.json in the checkpoint's folder"
    )
    return parser


def check_output(path: Path) -> None:
    """Raise ValueError before anything is computed if the document could not be written."""
    from megatron.early_exit.config.checks.files import unwritable

    problem = unwritable(path, is_folder=False)
    if problem:
        raise ValueError(f"--output {path}: {problem}")


def load(args: argparse.Namespace, **overrides: Any) -> tuple[LLM, LoadedEngine]:
    """The model of the flags. overrides: arguments of `load_engine`. Raises ValueError or OSError."""
    from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
    from megatron.early_exit.data.chat_template import read_chat_template
    from megatron.early_exit.inference.engine_loading import load_engine
    from megatron.early_exit.inference.llm import LLM

    check_output(args.output or _default_output(args, checkpoint_folder(args.load, args.load_iteration)))
    settings = engine_settings(flags_of(ModelFlags, args)) | {"worker_timeout": args.worker_timeout}
    template = getattr(args, "chat_template", None)  # of commands that read prompts
    if template is not None:  # certificates may depend on it
        settings["chat_template"] = read_chat_template(template)
    loaded = load_engine(args.load, **settings | overrides)
    return LLM(loaded.engine, loaded.tokenizer, loaded.engine.exits), loaded


def output_path(args: argparse.Namespace, loaded: LoadedEngine) -> Path:
    """Where the document of the command goes."""
    return args.output or _default_output(args, loaded.checkpoint.folder)


def _default_output(args: argparse.Namespace, checkpoint: Path) -> Path:
    from megatron.early_exit.config.checkpoint_files import RESULTS_FOLDER

    return checkpoint / RESULTS_FOLDER / f"{args.command}.json"


def finish(
    args: argparse.Namespace, loaded: LoadedEngine, settings: Mapping[str, Any], results: Mapping[str, Any], **more: Any
) -> None:
    """Write the document of the command. more: of `result_document`."""
    from megatron.early_exit.evaluation.documents import result_document, write_document

    path = output_path(args, loaded)
    write_document(result_document(args.command, loaded, settings, results, **more), path)
    print(f"\nwrote {path}")
