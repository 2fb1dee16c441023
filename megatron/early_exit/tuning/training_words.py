"""The settings of the tuning as flags of the training program."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.early_exit.config.data import parse_blend

LEARNING_RATE, LEARNING_RATE_OF_OUTPUTS = 5e-3, 1e-3
"""Which bring most in the study of docs/tuning.md; the latter for exits with output projections of their own."""

OWN_FLAGS = frozenset(
    "--load --save --pretrained-checkpoint --train-iters --train-samples --seq-length --micro-batch-size "
    "--global-batch-size --lr --seed --bf16 --tune-exit-distillation --exit-loss-token-fraction --data-path "
    "--train-data-path --valid-data-path --cache-hidden-states --cache-samples --exit-layer-nums".split()
)
"""Of the training program: what they say is said by flags of the recipe, or is its own affair."""

MOST_EVALUATIONS, LEAST_ITERATIONS_FOR_ONE = 20, 100
"""Global batches of one validation, and iterations of the training for each of them: all ten validations together have
at most a tenth of the training's batches, which run the layers again and the heads on all answers."""


@dataclass(frozen=True)
class TrainingPlan:
    """What the user has asked of the training."""

    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    passes: float
    """Over the samples, if `train_iters` is not given."""
    train_iters: int | None
    learning_rate: float
    distillation: float
    """Share of each exit's loss that is its divergence from the final head."""
    keeps_hidden_states: bool | None
    """None: where samples are drawn more than once."""
    bf16: bool
    blend: tuple[str, ...]
    """Other token files with their weights, against 1 for the own answers: WEIGHT PREFIX ..."""
    token_fraction: float
    """Of the tokens whose loss is computed."""
    seed: int
    more: tuple[str, ...]
    """Further flags of the training program."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> TrainingPlan:
        """Raises ValueError for numbers that cannot be, and for a blend that is none."""
        outputs = args.untie_exit_output_weights  # no value: of all exits
        has_outputs = outputs is not None and (not outputs or any(outputs))
        rate = LEARNING_RATE_OF_OUTPUTS if has_outputs else LEARNING_RATE
        twice = sorted({word.partition("=")[0] for word in args.more} & OWN_FLAGS)
        if twice:
            raise ValueError(f"{', '.join(twice)} behind -- is for this program to set: give its own flags before --")
        blend = tuple(args.blend or ())
        if blend and parse_blend(blend)[1] is None:
            raise ValueError(
                f"--blend {' '.join(blend)}: give WEIGHT PREFIX WEIGHT PREFIX ...; own answers have weight 1"
            )
        return cls(
            args.seq_length, args.micro_batch_size, args.global_batch_size, args.passes, args.train_iters,
            rate if args.lr is None else args.lr, args.tune_exit_distillation, args.keep_hidden_states, args.bf16,
            blend, args.exit_loss_token_fraction, args.seed, tuple(args.more),
        )  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on. Keeping hidden states changes no bit of it, and may be changed in between."""
        fraction = {"exit_loss_token_fraction": self.token_fraction} if self.token_fraction < 1 else {}
        return fraction | {
            "batch": [self.seq_length, self.micro_batch_size, self.global_batch_size], "passes": self.passes,
            "train_iters": self.train_iters, "lr": self.learning_rate, "tune_exit_distillation": self.distillation,
            "bf16": self.bf16, "blend": list(self.blend), "seed": self.seed,
            "more": list(self.more),
        }  # fmt: skip

    @property
    def cache_key(self) -> str:
        """What kept hidden states depend on beside the samples."""
        order = [self.iterations_text, self.global_batch_size] if self.blend else []
        return f"{self.bf16} {self.seed} {self.blend} {order} {'--fp16' in self.more}"

    @property
    def iterations_text(self) -> str:
        return f"{self.train_iters or f'{self.passes} passes'}"

    def iterations(self, num_samples: int) -> int:
        """Of `num_samples` samples of own answers; passes are over these, a blend's others come beside them."""
        own = 1 / (1 + sum(float(weight) for weight in self.blend[0::2]))
        return self.train_iters or max(math.ceil(self.passes * num_samples / own / self.global_batch_size), 1)

    def samples_kept(self, num_samples: int) -> int:
        """Of how many samples hidden states are kept; 0: of none. num_samples: of own answers."""
        drawn = self.iterations(num_samples) * self.global_batch_size
        keeps = drawn > num_samples if self.keeps_hidden_states is None else self.keeps_hidden_states
        in_pass = drawn if self.blend else min(num_samples, drawn)
        return in_pass if keeps else 0

    def evaluation(self, num_samples: int, num_held_out: int) -> tuple[int, int]:
        """(iterations from one validation to the next, global batches of one)."""
        iterations, batches = self.iterations(num_samples), num_held_out // self.global_batch_size
        most = min(batches, MOST_EVALUATIONS, iterations // LEAST_ITERATIONS_FOR_ONE)
        return max(iterations // 10, 1), max(most, 1)

    def words(
        self,
        *,
        exits: Path,
        tuned: Path,
        samples: Path,
        cache: Path,
        num_train: int,
        num_held_out: int,
        world_size: int,
    ) -> list[str]:
        """num_train, num_held_out: samples."""
        iterations = self.iterations(num_train)
        every, validation = self.evaluation(num_train, num_held_out)
        own = str(samples / "train")
        data = ["1", own, *self.blend] if self.blend else [own]
        words: list[Any] = [
            "--tune-exit", "--pretrained-checkpoint", exits, "--use-checkpoint-args", "--load", tuned, "--save", tuned,
            "--save-interval", every, "--keep-last", 2, "--exit-signal-handler",
            "--seq-length", self.seq_length, "--micro-batch-size", self.micro_batch_size,
            "--global-batch-size", self.global_batch_size, "--train-iters", iterations,
            "--lr", self.learning_rate, "--min-lr", self.learning_rate / 10, "--lr-decay-style", "cosine",
            "--lr-warmup-iters", iterations // 20, "--adam-beta2", 0.95, "--seed", self.seed,
            "--train-data-path", *data, "--valid-data-path", samples / "held_out",
            "--data-cache-path", samples / "cache", "--reset-attention-mask", "--num-workers", 0,
            "--eval-interval", every, "--eval-iters", validation,
            "--log-interval", max(iterations // 50, 1), "--tune-exit-distillation", self.distillation,
            "--exit-loss-token-fraction", self.token_fraction,  # 1 as well: the checkpoint's would be taken over
        ]  # fmt: skip
        words += ["--bf16"] if self.bf16 else []
        if kept := self.samples_kept(num_train):
            unit = self.micro_batch_size * world_size  # a multiple for every layout of so many ranks
            words += ["--cache-hidden-states", cache, "--cache-samples", max(kept // unit, 1) * unit]
        return [*map(str, words), *self.more]
