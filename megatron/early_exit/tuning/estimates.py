"""What a recipe would do, and about what it takes: `--dry-run`. Nothing is loaded but settings, nothing is written.

Times are arithmetic over the speed of a matrix product here and now, so they are off by a factor of two where
something else is the bottleneck; sizes are exact."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.early_exit.checkpoint.commands.exits import wanted_exits
from megatron.early_exit.config.fields import build_settings
from megatron.early_exit.config.run import ResolvedConfig, RunConfig
from megatron.early_exit.model import sizes

if TYPE_CHECKING:
    from megatron.early_exit.tuning.recipe import Recipe
    from megatron.early_exit.tuning.training_words import TrainingPlan

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
    args, plan, config = recipe.args, recipe.training, resolved(recipe)
    speed = _flops_per_second(config.training.dtype) * _SHARE_OF_PEAK
    layers = config.model.num_layers
    model_bytes = sizes.weight_bytes(config, sizes.stage_parameters(config, (), True, True))
    model_bytes += sizes.weight_bytes(config, layers * sizes.layer_parameters(config))
    trained = sum(sizes.exit_parameters(config, kind) for kind in config.exits.heads)
    exit_bytes = sizes.weight_bytes(config, trained)
    lengths = [len(prompt.ids) for prompt in recipe.prompts]
    num_answers = len(lengths) * args.answers_to_each
    tokens = sum(lengths) + num_answers * args.answer_tokens
    of_text = args.answers_to_each * sum(min(length + args.answer_tokens, args.seq_length) for length in lengths)
    num_train, num_held_out = _num_samples(recipe, max(of_text // args.seq_length, 2))
    kept = plan.samples_kept(num_train)
    points = config.exits.num_exits + bool(plan.distillation)
    kept_bytes = points * kept * args.seq_length * config.model.hidden_size * (2 if plan.bf16 else 4)
    memory = model_bytes + sizes.gradient_bytes(config, trained) + sizes.optimizer_bytes(config, 1, trained)
    memory += sizes.logits_chunk_bytes(config, args.micro_batch_size * args.seq_length) + sizes.activation_bytes(
        config, 1
    )
    answering = tokens * _forward_flops(config, layers) / speed
    answers_words = (
        f"{num_answers:,} answers of at most {args.answer_tokens} tokens, about "
        f"{num_answers * args.answer_tokens / max(answering, 1e-9):,.0f} tokens/s"
    )
    hidden = f", hidden states kept ({_gib(kept_bytes)})" if kept else ""
    training_words = (
        f"{plan.iterations(num_train):,} iterations of {args.global_batch_size} x {args.seq_length} tokens over about "
        f"{num_train:,} samples{hidden}; learning rate {plan.learning_rate:g}, distillation {plan.distillation:g}"
    )
    reported = min(args.report_answers, max(num_answers * args.held_out, 1)) / num_answers
    report_tokens = 2 * reported * (args.answers_to_each * sum(lengths) + num_answers * args.answer_tokens)
    return {
        "base": Estimate(model_bytes / 2e8, model_bytes, model_bytes // layers),
        "exits": Estimate(model_bytes / 2e8, model_bytes + exit_bytes),
        "answers": Estimate(answering, tokens * 4, model_bytes, answers_words),
        "samples": Estimate(tokens / 1e6, of_text * 5),
        "training": Estimate(
            training_flops(config, plan, num_train, num_held_out) / speed, kept_bytes + exit_bytes * 8, memory,
            training_words,
        ),
        "report": Estimate(report_tokens * _evaluation_flops(config, layers) / speed, 0, model_bytes),
    }  # fmt: skip


def training_flops(config: ResolvedConfig, plan: TrainingPlan, num_train: int, num_held_out: int) -> float:
    """FLOPs of the whole training: layers forward, over each sample once if what they make is kept; every exit, and the
    final head that it follows, on its share of the tokens; and all heads forward in validations.

    num_train, num_held_out: samples of own answers."""
    distils, iterations = plan.distillation > 0, plan.iterations(num_train)
    drawn = iterations * plan.global_batch_size
    through_layers = plan.samples_kept(num_train) or drawn
    layers = config.model.num_layers if distils else config.exits.exit_layer_nums[-1]
    every, batches = plan.evaluation(num_train, num_held_out)
    validated = iterations // every * batches * plan.global_batch_size
    vocab = config.description.padded_vocab_size
    of_exits = sum(
        sizes.tuned_exit_flops_per_token(config, index, vocab, plan.distillation)
        for index in range(config.exits.num_exits)
    )
    of_layers = layers * sizes.layer_flops_per_token(config) / 3
    of_validation = _evaluation_flops(config, layers, has_final_head=distils)
    return plan.seq_length * (through_layers * of_layers + drawn * of_exits + validated * of_validation)


def _forward_flops(config: ResolvedConfig, num_layers: int, has_final_head: bool = True) -> float:
    """Of a forward pass, for one token: six FLOPs a weight are forward and backward."""
    output = sizes.output_flops_per_token(config, config.description.padded_vocab_size)
    return (num_layers * sizes.layer_flops_per_token(config) + has_final_head * output) / 3


def _evaluation_flops(config: ResolvedConfig, num_layers: int, has_final_head: bool = True) -> float:
    """Of a forward pass with all exits, for one token."""
    output = sizes.output_flops_per_token(config, config.description.padded_vocab_size)
    exits = sum(output + sizes.branch_flops_per_token(config, kind) for kind in config.exits.heads)
    return _forward_flops(config, num_layers, has_final_head) + exits / 3


def _num_samples(recipe: Recipe, rows: int) -> tuple[int, int]:
    """(for training, held out): as they were made, or of about `rows`."""
    if recipe.manifest.state("samples") == "done":
        made = recipe.manifest.facts("samples")
        return made["train"]["num_rows"] - 1, made["held_out"]["num_rows"] - 1
    num_held_out = max(round(rows * recipe.args.held_out), 1)
    return max(rows - num_held_out, 1), num_held_out


def resolved(recipe: Recipe) -> ResolvedConfig:
    """Settings of a training of this model with these exits, for the arithmetic of `model.sizes`."""
    description, _ = recipe.model
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
