"""What a recipe would do, and about what it takes: `--dry-run`. Nothing is loaded but settings, nothing is written.

Times are arithmetic over the speed of a matrix product here and now, so they are off by a factor of two where
something else is the bottleneck; sizes are exact."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.early_exit.evaluation.prompts import count_prompts
from megatron.early_exit.model import sizes

if TYPE_CHECKING:
    from megatron.early_exit.config.description import ModelDescription
    from megatron.early_exit.config.run import ResolvedConfig
    from megatron.early_exit.tuning.recipe import Recipe

_SECONDS_OF_MEASURING = 0.5
_SHARE_OF_PEAK = 0.5
"""Of a plain product's speed, that all the rest leaves."""


@dataclass(frozen=True)
class Estimate:
    """Of one step."""

    seconds: float = 0.0
    disk_bytes: int = 0
    memory_bytes: int = 0
    words: str = ""


def describe(recipe: Recipe) -> str:
    """The plan in lines. Raises ValueError or OSError for a model that cannot be read."""
    lines, total_seconds, total_bytes = [], 0.0, 0
    estimates = estimated(recipe)
    for number, step in enumerate(recipe.steps, start=1):
        state, one = recipe.manifest.state(step.name), estimates.get(step.name, Estimate())
        done = {"done": "done", "begun": "begun", "changed": "other settings: needs --redo"}.get(state, "to do")
        if state != "done":
            total_seconds, total_bytes = total_seconds + one.seconds, total_bytes + one.disk_bytes
        memory = f", memory {_gib(one.memory_bytes)}" if one.memory_bytes else ""
        lines.append(
            f"{number} {step.title:<42} {done:<8} about {_time(one.seconds)}, disk {_gib(one.disk_bytes)}{memory}"
        )
        lines += [f"  {one.words}"] if one.words else []
    free = shutil.disk_usage(_existing(recipe.folder)).free
    lines.append(f"left: about {_time(total_seconds)}, {_gib(total_bytes)} of disk ({_gib(free)} are free)")
    lines.append(
        "Times follow from the speed of one matrix product on this machine, answers counted at their longest: expect a "
        "factor of two."
    )
    return "\n".join(lines)


def estimated(recipe: Recipe) -> dict[str, Estimate]:
    args, plan = recipe.args, recipe.training
    config = _resolved(recipe)
    speed = _flops_per_second(config.training.dtype) * _SHARE_OF_PEAK
    vocab, layers = config.description.padded_vocab_size, config.model.num_layers
    model_bytes = sizes.weight_bytes(config, sizes.stage_parameters(config, (), True, True))
    model_bytes += sizes.weight_bytes(config, layers * sizes.layer_parameters(config))
    kinds = config.exits.heads
    trained = sum(sizes.exit_parameters(config, kind) for kind in kinds)
    exit_bytes = sizes.weight_bytes(config, trained)
    prompts = _num_prompts(recipe)
    prompt_length = (args.prompt_length or args.default_length) if args.data_path else 64
    num_answers = prompts * args.answers_to_each
    tokens = prompts * prompt_length + num_answers * args.answer_tokens
    # Six FLOPs a weight are forward and backward.
    forward = (layers * sizes.layer_flops_per_token(config) + sizes.output_flops_per_token(config, vocab)) / 3
    heads = sum(sizes.exit_flops_per_token(config, index, vocab) for index in range(len(kinds)))
    rows = max(num_answers * (prompt_length + args.answer_tokens) // args.seq_length, 2)
    num_train = max(round(rows * (1 - args.held_out)), 1)
    if recipe.manifest.state("samples") == "done":
        num_train = recipe.manifest.facts("samples")["train"]["num_rows"] - 1
    iterations = plan.iterations(num_train)
    drawn = iterations * args.global_batch_size
    keeps = drawn > num_train if plan.keeps_hidden_states is None else plan.keeps_hidden_states
    through_layers = min(num_train, drawn) if keeps else drawn
    width = config.model.hidden_size * (2 if plan.bf16 else 4)
    points = len(kinds) + bool(plan.distillation)
    kept = points * min(num_train, drawn) * args.seq_length * width if keeps else 0
    of_training = heads
    if plan.distillation:
        of_training += sum(sizes.teacher_flops_per_token(config, index, vocab) for index in range(len(kinds)))
    training = args.seq_length * (through_layers * forward + drawn * of_training) / speed
    memory = model_bytes + sizes.gradient_bytes(config, trained) + sizes.optimizer_bytes(config, 1, trained)
    memory += sizes.logits_chunk_bytes(config, args.micro_batch_size * args.seq_length) + sizes.activation_bytes(
        config, 1
    )
    answers_words = (
        f"{num_answers:,} answers of at most {args.answer_tokens} tokens, about "
        f"{num_answers * args.answer_tokens / max(tokens * forward / speed, 1e-9):,.0f} tokens/s"
    )
    hidden = f", hidden states kept ({_gib(kept)})" if keeps else ""
    training_words = (
        f"{iterations:,} iterations of {args.global_batch_size} x {args.seq_length} tokens over about {num_train:,} "
        f"samples{hidden}; learning rate {plan.learning_rate:g}, distillation {plan.distillation:g}"
    )
    report_tokens = 2 * min(args.report_answers, max(num_answers * args.held_out, 1)) * (
        prompt_length + args.answer_tokens
    )  # fmt: skip
    return {
        "base": Estimate(model_bytes / 2e8, model_bytes, model_bytes // layers),
        "exits": Estimate(model_bytes / 2e8, model_bytes + exit_bytes),
        "answers": Estimate(tokens * forward / speed, tokens * 4, model_bytes, answers_words),
        "samples": Estimate(tokens / 1e6, rows * args.seq_length * 5),
        "training": Estimate(training, kept + exit_bytes * 8, memory, training_words),
        "report": Estimate(report_tokens * (forward + heads / 3) / speed, 0, model_bytes),
    }


def _num_prompts(recipe: Recipe) -> int:
    args = recipe.args
    wanted = args.prompts or args.default_prompts
    of_file = 0 if args.prompts_file is None else min(wanted, count_prompts(args.prompts_file))
    return of_file + (wanted if args.data_path else 0)


def _resolved(recipe: Recipe) -> ResolvedConfig:
    """Settings of a training of this model with these exits, for the arithmetic of `model.sizes`."""
    from megatron.early_exit.checkpoint.commands.exits import wanted_exits
    from megatron.early_exit.config.run import RunConfig
    from megatron.early_exit.config.serialize import build_settings

    description = _description(recipe)
    exits = wanted_exits(recipe.args) if recipe.args.exit_layer_nums else description.exits
    args = recipe.args
    settings = build_settings({
        **{name: value for name, value in vars(description.model).items() if value is not None},
        "seq_length": args.seq_length, "micro_batch_size": args.micro_batch_size,
        "global_batch_size": args.global_batch_size, "train_iters": 1, "lr": 1.0, "bf16": recipe.training.bf16,
        "tokenizer_type": "NullTokenizer", "vocab_size": description.padded_vocab_size - 1, "mock_data": True,
    })  # fmt: skip
    settings = replace(settings, exits=replace(exits, exit_loss_token_fraction=(recipe.training.token_fraction,)))
    return RunConfig(**vars(settings)).resolved(description.padded_vocab_size)


def _description(recipe: Recipe) -> ModelDescription:
    if recipe.is_ours:
        return recipe.description_of_base()
    from megatron.early_exit.checkpoint.hugging_face import read_hugging_face
    from megatron.early_exit.config.data import TokenizerConfig
    from megatron.early_exit.config.description import ModelDescription

    source = read_hugging_face(recipe.source)
    rows = -(-source.config.vocab_size // 128) * 128
    model = replace(source.model, padded_vocab_size=rows)
    return ModelDescription(model, source.exits, TokenizerConfig("HuggingFaceTokenizer", str(recipe.source)), "fp32")


def _flops_per_second(dtype: str) -> float:
    """Of one product of matrices like those of a model."""
    import torch

    from megatron.early_exit.platform.device import device

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    one, other = (torch.randn(512, 1024, device=device(), dtype=kind) for _ in range(2))
    other = other.t().contiguous()

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            result = one @ other
        float(result[0, 0])  # waits for the device
        return time.perf_counter() - start

    seconds(1)
    count, taken = 1, seconds(1)
    while taken < _SECONDS_OF_MEASURING and count < 1 << 14:
        count *= 2
        taken = seconds(count)
    return count * 2 * 512 * 1024 * 512 / taken


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
