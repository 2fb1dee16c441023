"""Seconds of iterations, gradients over drawn tokens, and losses of runs from scratch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.batches import Batch, random_batches
from benchmarks.ranks import timed
from benchmarks.rounds import in_turn, progress
from benchmarks.token_fraction.settings import HEADS, Settings, exits_of, fractions_of, variant_name
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import OptimizerConfig, TrainingConfig
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.platform.device import use_cuda


class Built:
    """One variant on this rank. Core is imported on ranks alone, after it was adapted to the device."""

    def __init__(self, settings: Settings, exits: ExitConfig) -> None:
        from megatron.early_exit.model.build import build_model
        from megatron.early_exit.platform.distributed import seed_generators
        from megatron.early_exit.training.core_config import connect_core_config
        from megatron.early_exit.training.optimizer import build_optimizer

        model = ModelConfig(
            num_layers=settings.num_layers, hidden_size=settings.hidden_size,
            num_attention_heads=settings.num_attention_heads, position_embedding_type="rope", normalization="RMSNorm",
            swiglu=True, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        )  # fmt: skip
        training = TrainingConfig(
            seq_length=settings.seq_length, micro_batch_size=settings.micro_batch_size, bf16=settings.bf16
        )
        self.config = RunConfig(model, training, OptimizerConfig(lr=1e-4), exits)
        seed_generators(1)
        self.model = build_model(self.config, settings.vocab_size)
        self.optimizer = build_optimizer(self.config, self.model)
        connect_core_config(self.model, self.optimizer)
        self._iteration = 0

    def step(self, batches: list[Batch]) -> None:
        from megatron.early_exit.training.step import train_step

        train_step(
            self.model, self.optimizer, [iter(batches)], exit_weights=self.config.exits.weights_at(0),
            num_microbatches=len(batches), micro_batch_size=self.config.training.micro_batch_size,
            seq_length=self.config.training.seq_length, iteration=self._iteration,
        )  # fmt: skip
        self._iteration += 1


def measure_time(settings: Settings) -> dict[str, list[float]]:
    """Seconds of an iteration of every variant in every round, after one that does not count. Of the wall on CUDA, of
    the processor on CPU."""
    from megatron.early_exit.config.parallel import ParallelConfig
    from megatron.early_exit.platform.distributed import initialize_model_parallel

    initialize_model_parallel(ParallelConfig(), settings.num_layers, seed=1)
    built = {"plain": Built(settings, ExitConfig())}
    for head in HEADS:
        for fraction in settings.fractions:
            built[variant_name(head, fraction)] = Built(settings, exits_of(settings, head, fraction))
    sizes = (settings.micro_batch_size, settings.vocab_size, settings.seq_length, settings.num_microbatches)
    batches = random_batches(*sizes, seed=1)
    clock = 0 if use_cuda() else 1
    steps = {name: (lambda one=one: timed(one.step, batches)[clock]) for name, one in built.items()}
    return in_turn(steps, settings.rounds)


# The demo's model.


def demo_flags(demo: Path, work: Path) -> list[str]:
    """Its settings and data, of examples/demo.yaml and `make demo`."""
    return [
        "--config", "examples/demo.yaml", "--tokenizer-model", str(demo / "tokenizer"),
        "--data-path", str(demo / "data/stdlib_text_document"), "--data-cache-path", str(work / "cache"),
    ]  # fmt: skip


DEMO_EXITS = ("--exit-layer-nums", "2", "4", "--exit-layer-weight", "0.25", "0.5", "--use-exit-norm")


def measure_variance(settings: Settings, demo: Path, work: Path) -> dict[str, Any]:
    """Squared distances between gradients; see the module's text. Of the rank's trained demo."""
    from megatron.early_exit.config.flags import parse_run_config
    from megatron.early_exit.model.exit_strategies import Deferred
    from megatron.early_exit.training.pretrain import _iterators, build_run
    from megatron.early_exit.training.step import run_schedule

    flags = [*demo_flags(demo, work), "--load", str(demo / "checkpoints"), "--use-checkpoint-args", "--finetune"]
    run = build_run(parse_run_config(flags, world_size=1, warn=lambda message: None))
    training, losses = run.config.training, run.model.exit_losses
    per_batch = training.global_batch_size // training.micro_batch_size
    (iterator,) = _iterators(run, run.training_data, 0)

    def gradient(batches: list[Any], fraction: float, iteration: int) -> Tensor:
        losses.exits = replace(run.config.exits, exit_loss_token_fraction=(fraction,))
        (chunk,) = run.model.wrapped
        chunk.zero_grad_buffer()
        losses.begin_iteration(per_batch, losses.exits.weights_at(10**9), iteration=iteration)
        sizes = {"micro_batch_size": training.micro_batch_size, "seq_length": training.seq_length}
        run_schedule(run.model, [iter(batches)], Deferred(losses), num_microbatches=per_batch, **sizes)
        return torch.cat([parameter.main_grad.flatten() for parameter in chunk.parameters()]).clone()

    whole, distances = [], {fraction: [] for fraction in fractions_of(settings)}
    for number in range(settings.batches):
        progress(f"variance: batch {number + 1} of {settings.batches}")
        batches = [next(iterator) for _ in range(per_batch)]
        whole.append(gradient(batches, 1.0, 0))
        for fraction, found in distances.items():
            draws = range(number * settings.draws, (number + 1) * settings.draws)
            found += [float((gradient(batches, fraction, draw) - whole[-1]).square().sum()) for draw in draws]
    run.close()
    gradients = torch.stack(whole)
    return {
        "squared_norms": gradients.square().sum(1).tolist(),
        "batch_variance": float(gradients.var(0).sum()),
        "squared_distances": {str(fraction): found for fraction, found in distances.items()},
    }


def train(settings: Settings, demo: Path, work: Path, fraction: float | None, seed: int) -> dict[str, float]:
    """Losses over held-out text at the end of a run from scratch; fraction None: plain GPT."""
    name = f"{'plain' if fraction is None else format(fraction, 'g')}_{seed}_{settings.train_iters}.jsonl"
    metrics = work / name
    if not metrics.is_file():
        progress(f"losses: {name}")
        exits = () if fraction is None else (*DEMO_EXITS, "--exit-loss-token-fraction", str(fraction))
        unfinished = metrics.with_suffix(".part")
        unfinished.unlink(missing_ok=True)
        iterations = str(settings.train_iters)
        command = [
            "pretrain_early_exit_gpt.py", *demo_flags(demo, work), *exits, "--seed", str(seed),
            "--train-iters", iterations, "--eval-interval", iterations, "--eval-iters", "24", "--log-interval", "10",
            "--metrics-file", str(unfinished.resolve()), "--lr-warmup-iters", str(min(20, settings.train_iters - 1)),
        ]  # fmt: skip
        quiet = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, *command], check=True, cwd=common.ROOT, env={**os.environ, **quiet}, stdout=sys.stderr
        )
        unfinished.rename(metrics)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    (last,) = [line for line in lines if line["kind"] == "valid" and line["iteration"] == settings.train_iters]
    return {name: value for name, value in last.items() if "loss" in name}


def measure_losses(settings: Settings, demo: Path, work: Path) -> list[dict[str, Any]]:
    return [
        {"fraction": fraction, "seed": seed, **train(settings, demo, work, fraction, seed)}
        for seed in settings.seeds
        for fraction in (*settings.fractions, None)
    ]
