"""The steps from a model to tuned exits, each with what it depends on and what it makes.

    FOLDER/recipe.json       what is done (`manifest.py`)
    FOLDER/base              the model as our checkpoint, if it was another's
    FOLDER/exits             the same with exits that are not tuned yet
    FOLDER/answers           prompts, and the model's answers as they came
    FOLDER/samples           train and held_out: rows of tokens with loss masks
    FOLDER/hidden_states     what the frozen layers make of them, where that pays
    FOLDER/tuned             checkpoints, metrics
    FOLDER/exits.json        the exits on held-out answers, before and after

Modules that need NumPy, PyTorch or transformers, which take seconds, are imported by the steps that need them."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.early_exit.checkpoint.commands.exits import add, wanted_exits
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.checkpoint_files import LATEST_FILE, iteration_of, names_latest
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.flags import parse_run_config
from megatron.early_exit.config.saved_description import read_description
from megatron.early_exit.evaluation.prompt_flags import load_prompts
from megatron.early_exit.evaluation.prompts import EvalPrompt
from megatron.early_exit.inference.model_flags import ModelFlags, engine_settings
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.inference.protocol import WorkerDescription
from megatron.early_exit.platform.command_line import is_main_rank
from megatron.early_exit.platform.program_flags import flags_of
from megatron.early_exit.platform.world import world_size
from megatron.early_exit.tuning.answer_progress import AnswerProgress
from megatron.early_exit.tuning.manifest import Facts, Manifest, Step
from megatron.early_exit.tuning.training_process import TrainingStopped, run_training
from megatron.early_exit.tuning.training_words import LEARNING_RATE_OF_OUTPUTS, TrainingPlan

if TYPE_CHECKING:
    from megatron.early_exit.data.tokenizer import Tokenizer
    from megatron.early_exit.inference.llm import LLM

_HEAD_BYTES = 1 << 20
"""Of each file of another's weights that its digest is of, with its size: whole files take minutes to read."""

DEFAULT_REPORT_ANSWERS = 200

VOCABULARY_MULTIPLE = 128
"""To which the vocabulary of another's model is padded."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Recipe:
    """Steps in order, for one command line. Nothing is loaded or written until a step runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises ValueError or OSError for a model or prompts that are not there."""
        self.args = args
        self.training = TrainingPlan.of(args)
        _check_iteration(args)
        self.folder: Path = args.output
        self.source = Path(args.load)
        self.is_ours = _is_ours(self.source)
        self.base = self.source if self.is_ours else self.folder / "base"
        self.exits = self.folder / "exits" if args.exit_layer_nums else self.base
        self.answers_folder, self.samples = self.folder / "answers", self.folder / "samples"
        self.tuned, self.report_path = self.folder / "tuned", self.folder / "exits.json"
        if not (args.exit_layer_nums or (self.is_ours and self.description_of_base().exits.num_exits)):
            raise ValueError(f"{self.source} has no exits: give --exit-layer-nums, and what their heads are made of")
        if args.lr is None and self._tunes_present_outputs():
            self.training = replace(self.training, learning_rate=LEARNING_RATE_OF_OUTPUTS)
        self.steps = self._steps()
        self.manifest = Manifest(self.folder, self.steps)

    def _steps(self) -> list[Step]:
        args = self.args
        source = {"model": _digest_of_model(self.source, self.is_ours, args.load_iteration)}
        steps = []
        base: tuple[str, ...] = ()
        if not self.is_ours:
            base = ("base",)
            steps.append(Step("base", "convert the model", source, self.convert, outputs=(self.base,)))
        exits = base
        if args.exit_layer_nums:
            exits = ("exits",)
            settings = source | _exit_settings(args)
            steps.append(Step("exits", "add exits", settings, self.add_exits, base, (self.exits,)))
        answers = source | _answer_settings(args)
        samples = {"seq_length": args.seq_length, "held_out": args.held_out}
        steps += [
            Step("answers", "the model answers prompts", answers, self.answer, base, (self.answers_folder,)),
            Step("samples", "make training samples", samples, self.make_samples, ("answers",), (self.samples,)),
            Step(
                "training", "tune the exits", source | self.training.settings, self.train, (*exits, "samples"),
                (self.tuned,), is_collective=True,
            ),
            Step(
                "report", "compare exits on held-out answers", _report_settings(args), self.report, ("training",),
                (self.report_path,),
            ),
        ]  # fmt: skip
        return steps

    def _tunes_present_outputs(self) -> bool:
        """Whether exits that the checkpoint has, and that are not replaced, have output projections of their own."""
        if not self.is_ours:
            return False
        present = self.description_of_base().exits
        kept = set(present.exit_layer_nums) - set(self.args.exit_layer_nums or ())
        return any(head.untied_output for head in present.heads_of(kept))

    def check(self) -> None:
        """Raise ValueError or OSError, before anything is made, for prompts and lengths that the model cannot take."""
        from megatron.early_exit.tuning.samples import check_room

        description, _ = self.model
        if self.args.seq_length > description.max_position_embeddings:
            raise ValueError(
                f"--seq-length {self.args.seq_length} is more than the model takes: "
                f"{description.max_position_embeddings}"
            )
        if self.manifest.state("samples") != "done":
            for part in (self.prompts[: self._first_held_out], self.prompts[self._first_held_out :]):
                check_room(part, self.args.seq_length)

    @cached_property
    def model(self) -> tuple[ModelDescription, Tokenizer]:
        """What the model is, and its tokenizer, also before it is our checkpoint."""
        from megatron.early_exit.checkpoint.commands.hugging_face import tokenizer_folder
        from megatron.early_exit.checkpoint.hugging_face import read_hugging_face
        from megatron.early_exit.data.tokenizer import build_tokenizer

        if self.is_ours or self.manifest.state("base") == "done":
            description = self.description_of_base()
            return description, build_tokenizer(description.tokenizer)
        source = read_hugging_face(self.source)
        rows = -(-source.config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        with tokenizer_folder(self.source, source.config) as folder:
            config = TokenizerConfig("HuggingFaceTokenizer", str(folder))
            tokenizer = build_tokenizer(config)
        return ModelDescription(replace(source.model, padded_vocab_size=rows), source.exits, config, "fp32"), tokenizer

    @cached_property
    def prompts(self) -> list[EvalPrompt]:
        """In random order: those that the answers are of, or, before there are any, as they are drawn now. Raises
        ValueError or OSError for prompts that cannot be answered."""
        from megatron.early_exit.evaluation.own_answers import AnswersFolder

        folder = AnswersFolder(self.answers_folder)
        is_written = self.manifest.state("answers") in ("begun", "done") and folder.prompts_path.exists()
        return folder.prompts() if is_written else self._drawn_prompts()

    @property
    def _first_held_out(self) -> int:
        """Number of the first prompt whose answers are not trained on, nor are those behind it."""
        from megatron.early_exit.tuning.samples import num_held_out

        return len(self.prompts) - num_held_out(len(self.prompts), self.args.held_out)

    def answer_params(self, number: int) -> GenerationParams:
        """How the model gives answer `number`: the prompt's number x answers to each + which one it is. Nobody reads
        log-probs, so its head may be one that gives none."""
        args = self.args
        sampling = SamplingSettings(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
        return GenerationParams(max_tokens=args.answer_tokens, sampling=sampling.of_sample(number), log_probs=False)

    # What the steps do

    def convert(self) -> Facts:
        from megatron.early_exit.checkpoint.commands.hugging_face import from_hugging_face

        flags = {
            "input": self.source, "save": self.base, "force": True, "max_position_embeddings": None,
            "skip_comparison": False, "dtype": None, "tensor_model_parallel_size": 1,
            "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE, "load_iteration": None,
        }  # fmt: skip
        from_hugging_face(argparse.Namespace(**flags))
        return {}

    def add_exits(self) -> Facts:
        flags = vars(self.args) | {"load": self.base, "save": self.exits, "force": True}
        add(argparse.Namespace(**flags))
        return {}

    def answer(self) -> Facts:
        from megatron.early_exit.evaluation.own_answers import AnswersFolder, take_answers

        args, folder = self.args, AnswersFolder(self.answers_folder)
        if not folder.prompts_path.exists():
            folder.write_prompts(self.prompts)
        longest = max(len(one.ids) for one in self.prompts) + args.answer_tokens - 1
        numbers = range(len(self.prompts) * args.answers_to_each)
        ids = [self.prompts[number // args.answers_to_each].ids for number in numbers]
        with self._loaded(self.base, longest) as llm:
            answers = take_answers(llm, folder, ids, list(map(self.answer_params, numbers)), AnswerProgress().show)
        ended = sum(one.finish_reason == "eod" for one in answers)
        num_tokens = sum(len(one.ids) for one in answers)
        print(f"{len(answers):,} answers, {num_tokens:,} tokens; {ended:,} ended by themselves")
        return {"answers": len(answers), "tokens": num_tokens, "ended": ended}

    def make_samples(self) -> Facts:
        from megatron.early_exit.evaluation.own_answers import AnswersFolder
        from megatron.early_exit.tuning.samples import marked_answers, write_samples

        args, prompts, (_, tokenizer) = self.args, self.prompts, self.model
        texts = marked_answers(prompts, AnswersFolder(self.answers_folder).answers(), args.answers_to_each)
        first_held_out = self._first_held_out
        parts = {
            "train": [text for number, text in texts if number < first_held_out],
            "held_out": [text for number, text in texts if number >= first_held_out],
        }
        partial = self.folder / "samples.partial"
        shutil.rmtree(partial, ignore_errors=True)
        facts: Facts = {"first_held_out": first_held_out}
        for name, part in parts.items():
            made = write_samples(partial / name, part, args.seq_length, tokenizer.eod, tokenizer.vocab_size)
            facts[name] = made._asdict()
            cut = f"; {made.num_cut:,} texts are longer, and were cut" if made.num_cut else ""
            print(
                f"{name}: {len(part):,} prompts with answers in {made.num_rows:,} rows of {args.seq_length} tokens, "
                f"{made.num_answer_tokens:,} of them answers'{cut}"
            )
        shutil.rmtree(self.samples, ignore_errors=True)
        os.replace(partial, self.samples)
        return facts

    def train(self) -> Facts:
        cache = self._cache_folder()
        if is_main_rank() and cache.parent.exists():  # of other samples or precision
            for other in cache.parent.iterdir():
                if other != cache:
                    shutil.rmtree(other)
        words = self.training_words()
        run_training(words)
        wanted = int(words[words.index("--train-iters") + 1])
        if iteration_of(checkpoint_folder(self.tuned)) < wanted:  # a signal that this process did not get
            raise TrainingStopped
        return {"iterations": wanted}

    def training_words(self) -> list[str]:
        """The flags of the training program. The samples must have been made."""
        made = self.manifest.facts("samples")
        return self._words(made["train"]["num_rows"] - 1, made["held_out"]["num_rows"] - 1)

    @property
    def exits_are_there(self) -> bool:
        names = [name for name in ("base", "exits") if name in self.manifest.steps]
        return all(self.manifest.state(name) == "done" for name in names)

    def check_training(self) -> None:
        """Raise ValueError for settings that the training would refuse, as soon as the exits are there: the answers may
        take hours."""
        parse_run_config(self._words(1000, 100), world_size=world_size(), warn=lambda _: None)

    def _words(self, num_train: int, num_held_out: int) -> list[str]:
        return self.training.words(
            exits=self.exits, tuned=self.tuned, samples=self.samples, cache=self._cache_folder(), num_train=num_train,
            num_held_out=num_held_out, world_size=world_size(),
        )  # fmt: skip

    def _cache_folder(self) -> Path:
        """Of these samples and this precision; other settings of the training use it as well."""
        content = f"{self.manifest.signatures['samples']} {self.training.cache_key}"
        return self.folder / "hidden_states" / hashlib.sha256(content.encode()).hexdigest()[:12]

    def report(self) -> Facts:
        from megatron.early_exit.evaluation.commands.exits import evaluated_heads
        from megatron.early_exit.evaluation.documents import content_digest, result_document, write_document
        from megatron.early_exit.evaluation.own_answers import AnswersFolder
        from megatron.early_exit.inference.engine_loading import load_engine
        from megatron.early_exit.inference.llm import LLM
        from megatron.early_exit.tuning.samples import marked_answers

        args, prompts, answers = self.args, self.prompts, AnswersFolder(self.answers_folder).answers()
        first = self.manifest.facts("samples")["first_held_out"]
        held_out = [
            (prompts[number], text)
            for number, text in marked_answers(prompts, answers, args.answers_to_each)
            if number >= first
        ][: args.report_answers]
        longest = max(len(text.ids) for _, text in held_out)
        sequences = [EvalPrompt(tuple(text.ids), prompt.domain, prompt.name) for prompt, text in held_out]
        counted = [[bool(mark & 1) for mark in text.marks[1:]] for _, text in held_out]
        results: dict[str, Any] = {}
        for name, path in (("before", self.exits), ("after", self.tuned)):
            settings = self._engine_settings(longest) | {"iteration": None, "quantize": None}
            with _alone():
                loaded = load_engine(str(path), **settings)
            with LLM(loaded.engine, loaded.tokenizer, loaded.engine.exits) as llm:
                words = f"{path}, {name} tuning, held-out answers"
                results[name] = evaluated_heads(llm, words, sequences, args.seed, counted)
        of_tuned = results["after"] | {"compare": [{"checkpoint": str(self.exits), **results["before"]}]}
        settings = {"sequences": len(sequences), "seed": args.seed, "recipe": asdict(self.training)}
        data = {str(path): content_digest(path) for path in sorted(self.answers_folder.glob("*.npz"))}
        write_document(result_document("exits", loaded, settings, of_tuned, data=data), self.report_path)
        print(f"\nwrote {self.report_path}")
        return {}

    @contextmanager
    def _loaded(self, path: Path, longest: int) -> Iterator[LLM]:
        from megatron.early_exit.inference.llm import LLM

        with _alone(), LLM.load(str(path), **self._engine_settings(longest)) as llm:
            yield llm
            del llm
        _free_memory()  # for the training, which is another process

    def _engine_settings(self, longest: int) -> dict[str, Any]:
        """longest: sequence that is run; for shorter ones more requests fit into memory."""
        settings = engine_settings(flags_of(ModelFlags, self.args)) | {"worker_timeout": self.args.worker_timeout}
        settings["max_length"] = min(self.args.max_length or longest, longest)
        return settings if self.is_ours else settings | {"iteration": None}

    def _drawn_prompts(self) -> list[EvalPrompt]:
        """Of both sources, mixed, so that the last ones are a sample of all."""
        import numpy as np

        args, (description, tokenizer) = self.args, self.model
        num_positions = min(args.max_length or description.max_position_embeddings, description.max_position_embeddings)
        model = WorkerDescription(
            description.model.num_layers, description.model.hidden_size, tokenizer.vocab_size, (), num_slots=1,
            num_positions=num_positions,
        )  # fmt: skip
        absent = {
            "data_path": {"prompts_file": None, "chat_template": None},
            "prompts_file": {"data_path": None, "prompt_length": None},
        }
        found: list[EvalPrompt] = []
        for source, others in absent.items():
            if getattr(args, source):
                one = argparse.Namespace(**vars(args) | others)
                found += load_prompts(one, tokenizer, model, args.answer_tokens).prompts
        if len(found) < 2:
            raise ValueError("one prompt is too few: some are held out; give two or more")
        order = np.random.default_rng(args.seed).permutation(len(found))
        return [found[number] for number in order]

    def description_of_base(self) -> ModelDescription:
        """Of the model as our checkpoint, when it is one."""
        return read_description(checkpoint_folder(self.base, self.args.load_iteration if self.is_ours else None))


def _free_memory() -> None:
    """Give back what no object holds any more."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _alone() -> Iterator[None]:
    """As if torchrun had not started others: what one process does while they wait."""
    saved = {name: os.environ.pop(name) for name in _TORCHRUN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _is_ours(path: Path) -> bool:
    """Whether a folder holds our checkpoints, not a model of transformers. Raises ValueError if it is neither."""
    if not path.exists():
        raise ValueError(f"--load {path} does not exist; give a folder of checkpoints, or of a Hugging Face model")
    if names_latest(path):
        return True
    if path.suffix == ".gguf" or (path / "config.json").exists() or list(path.glob("*.gguf")):
        return False
    raise ValueError(
        f"--load {path} holds neither checkpoints ({LATEST_FILE}) nor a Hugging Face model (config.json, or a .gguf "
        "file)"
    )


def _check_iteration(args: argparse.Namespace) -> None:
    """Raise ValueError for an iteration from which the training would not begin."""
    wanted, source = args.load_iteration, Path(args.load)
    if wanted is None:
        return
    if not _is_ours(source):
        raise ValueError(f"--load-iteration {wanted}: {source} is another's model, which has none; leave it out")
    last = iteration_of(checkpoint_folder(source))
    if not args.exit_layer_nums and wanted != last:
        raise ValueError(
            f"--load-iteration {wanted}: exits that are there are tuned from the last checkpoint on, which is that of "
            f"iteration {last}; leave it out, or let tools/convert_checkpoint.py reshard write iteration {wanted} into "
            "a folder of its own"
        )


def _digest_of_model(path: Path, is_ours: bool, iteration: int | None) -> str:
    if is_ours:
        from megatron.early_exit.checkpoint.read_model import fingerprint

        return fingerprint(checkpoint_folder(path, iteration))
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file())
    return _digest_of_files(files)


def _digest_of_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(_HEAD_BYTES))
    return digest.hexdigest()


def _exit_settings(args: argparse.Namespace) -> dict[str, Any]:
    # Those that are not the default: a setting that a later version adds changes nothing.
    default, wanted = asdict(ExitConfig()), asdict(wanted_exits(args))
    given = {name: value for name, value in wanted.items() if value != default[name]}
    return given | {"init": args.init, "seed": args.seed if args.init == "random" else None}


def _report_settings(args: argparse.Namespace) -> dict[str, Any]:
    # Where it is not the default: folders from before there was this setting are as they were.
    given, default = args.report_answers, DEFAULT_REPORT_ANSWERS
    return {} if given == default else {"report_answers": given}


def _answer_settings(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "prompts", "prompt_length", "seed", "answer_tokens", "answers_to_each", "temperature", "top_p", "dtype",
        "quantize", "max_length",
    )  # fmt: skip
    files = {
        "prompts_file": [] if args.prompts_file is None else [args.prompts_file],
        "chat_template": [] if args.chat_template is None else [args.chat_template],
        "data_path": [Path(f"{prefix}.{suffix}") for prefix in args.data_path or () for suffix in ("idx", "bin")],
    }
    settings = {name: getattr(args, name) for name in names}
    return settings | {name: _digest_of_files(paths) if paths else None for name, paths in files.items()}
