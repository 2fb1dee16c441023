"""What exits that learn from a fraction of the tokens save, and what that does to gradients and losses.

    python -m benchmarks.token_fraction --quick                        (from the root of the repository)
    python -m benchmarks.token_fraction --parts time                   (on a machine that does nothing else)
    python -m benchmarks.token_fraction --parts variance losses        (after `make demo`)

time: an iteration of plain GPT and of the same with two exits (after 1/4 and 2/4 of the layers) at
`--exit-loss-token-fraction` 1, 1/2, 1/4; every round runs each once, in rotating order. The time added by exits is that
of an iteration less that of plain GPT in the same round; of exits that are norm and output projection all of it is the
head's. An MLP branch sees all tokens, so its exits save less; the share that is expected then is that of the FLOPs. On
CPU, where all of it is one thread, seconds are those of the processor, which other programs do not use up; on CUDA they
are the wall's.

variance: the model of `make demo` with its exits, gradients of whole batches of its text. Noise of the draw: mean of
|g_f - g|^2 over batches and draws, g over all tokens, g_f over those drawn of the same batch. Noise of the batch:
variance of g over batches. What training feels is the first beside the second.

losses: that model trained from scratch with each fraction, from several seeds; losses of all heads over held-out text,
which are over all tokens. The runs stay in `--work`, and what is there is not run again. A fraction of nearly 1 shows
how far two runs drift apart by themselves.

The last line is one JSON document, also written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, flops
from benchmarks.ranks import run_on_ranks
from benchmarks.training_overhead import Batch, progress, random_batches, timed
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import OptimizerConfig, TrainingConfig
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.platform.device import use_cuda

PARTS = ("time", "variance", "losses")
HEADS: dict[str, dict[str, bool]] = {
    "norm": {"use_exit_norm": True},
    "MLP": {"use_exit_norm": True, "use_exit_mlp": True},
}
SHARE_TOLERANCE = 1.15
"""The time that exits add at fraction f is at most this times f of what they add at 1, where it is all the head's."""

LOSS_TOLERANCE = 0.01
"""The final head's held-out loss at a fraction is at most so much (relative) above that at fraction 1."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    parts: tuple[str, ...] = PARTS
    device: str = "cpu"
    fractions: tuple[float, ...] = (1.0, 0.5, 0.25)
    """With 1 first, which the others are compared with."""
    num_layers: int = 4
    hidden_size: int = 192
    num_attention_heads: int = 6
    vocab_size: int = 16384
    seq_length: int = 512
    micro_batch_size: int = 4
    num_microbatches: int = 1
    rounds: int = 9
    bf16: bool = False
    batches: int = 12
    """Of the demo's text, for the variance."""
    draws: int = 4
    """Of each of these batches."""
    train_iters: int = 250
    seeds: tuple[int, ...] = (1234, 5, 6)
    """Of the runs from scratch."""


QUICK = Settings(
    num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=8192, seq_length=128, rounds=2, batches=2, draws=2,
    train_iters=4, seeds=(1234,),
)  # fmt: skip
"""Shows that everything runs; its numbers say nothing."""


def fractions_of(settings: Settings) -> tuple[float, ...]:
    """Below 1."""
    return settings.fractions[1:]


# --- Time ---


def exits_of(settings: Settings, head: str, fraction: float) -> ExitConfig:
    layers = (settings.num_layers // 4, settings.num_layers // 2)
    return ExitConfig(exit_layer_nums=layers, exit_loss_token_fraction=(fraction,), **HEADS[head])


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
    seconds: dict[str, list[float]] = {name: [] for name in built}
    names = list(built)
    for number in range(settings.rounds + 1):
        progress(f"time: round {number} of {settings.rounds}")
        first = number % len(names)
        gc.collect()
        for name in names[first:] + names[:first]:
            wall, processor = timed(built[name].step, batches)
            seconds[name].append(wall if use_cuda() else processor)
    return {name: values[1:] for name, values in seconds.items()}


def variant_name(head: str, fraction: float) -> str:
    return f"{head} {fraction:g}"


def compare_time(settings: Settings, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row for each kind of head and fraction."""
    rows = []
    for head in HEADS:
        added = {
            fraction: [
                with_exits - plain
                for with_exits, plain in zip(seconds[variant_name(head, fraction)], seconds["plain"], strict=True)
            ]
            for fraction in settings.fractions
        }
        for fraction in settings.fractions:
            shares = sorted(part / whole for part, whole in zip(added[fraction], added[1.0], strict=True))
            rows.append({
                "head": head,
                "fraction": fraction,
                "iteration_sec": common.median(seconds[variant_name(head, fraction)]),
                "added_time_over_plain": common.median_ratio(added[fraction], seconds["plain"]),
                "share_of_added_time": common.median(shares),
                "share_quartiles": [shares[len(shares) // 4], shares[-1 - len(shares) // 4]],
                "share_of_added_flops": share_of_flops(settings, head, fraction),
            })  # fmt: skip
    return rows


def share_of_flops(settings: Settings, head: str, fraction: float) -> float:
    """FLOPs of an exit at this fraction over those at 1: the output projection's shrink."""
    kind = exits_of(settings, head, fraction).head_of(0)
    projection = 6 * settings.hidden_size * settings.vocab_size
    model = ModelConfig(settings.num_layers, settings.hidden_size, settings.num_attention_heads, swiglu=True)
    branch = flops.exit_flops_per_token(model, kind, settings.vocab_size, settings.seq_length) - projection
    return (fraction * projection + branch) / (projection + branch)


# --- The demo's model ---


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


def compare_variance(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each fraction. Drawing a fraction f of many tokens has a variance in proportion to (1 - f) / f."""
    rows = []
    for fraction, found in measured["squared_distances"].items():
        mean = sum(found) / len(found)
        rows.append({
            "fraction": float(fraction),
            "draw_variance": mean,
            "draw_over_batch_variance": mean / measured["batch_variance"],
            "over_1_minus_f_by_f": mean / ((1 - float(fraction)) / float(fraction)),
        })  # fmt: skip
    return rows


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


# --- What it means ---


def goals(settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    """Verdicts: true, false, or null where this run did not measure it."""
    shares = [row for row in results.get("time", []) if row["head"] == "norm" and row["fraction"] < 1]
    time_checks = [
        {
            "fraction": row["fraction"],
            "share_of_added_time": row["share_of_added_time"],
            "limit": SHARE_TOLERANCE * row["fraction"],
            "met": row["share_of_added_time"] <= SHARE_TOLERANCE * row["fraction"],
        }
        for row in shares
    ]
    final = {(row["fraction"], row["seed"]): row["lm_loss"] for row in results.get("losses", [])}

    def loss_checks(baseline: float | None) -> list[dict[str, Any]]:
        """baseline: fraction of the runs that the others are compared with; None: plain GPT."""
        checks = []
        for fraction in fractions_of(settings) if final else ():
            ratios = [final[fraction, seed] / final[baseline, seed] - 1 for seed in settings.seeds]
            worse = sum(ratios) / len(ratios)
            checks.append({
                "fraction": fraction, "mean_relative_increase": worse, "of_seeds": ratios, "limit": LOSS_TOLERANCE,
                "met": worse <= LOSS_TOLERANCE,
            })  # fmt: skip
        return checks

    over_all, over_plain = loss_checks(1.0), loss_checks(None)
    met = lambda checks: all(check["met"] for check in checks) if checks else None
    return {
        "time_added_by_the_head_is_the_fraction": {"met": met(time_checks), "checks": time_checks},
        "final_head_is_not_worse_than_at_fraction_1": {"met": met(over_all), "checks": over_all},
        "final_head_is_not_worse_than_of_plain_gpt": {"met": met(over_plain), "checks": over_plain},
    }


def print_report(results: dict[str, Any], verdicts: dict[str, Any]) -> None:
    if "time" in results:
        print("\nTime that two exits add to an iteration, over that of plain GPT and over that of fraction 1\n")
        header = ["head", "fraction", "added / plain", "of fraction 1", "of its FLOPs"]
        keys = ["head", "fraction", "added_time_over_plain", "share_of_added_time", "share_of_added_flops"]
        print(common.format_table(header, [[row[key] for key in keys] for row in results["time"]]))
    if "variance" in results:
        print("\nVariance of the gradient by drawing tokens, over that between batches\n")
        rows = [[f"{row['fraction']:g}", row["draw_over_batch_variance"]] for row in results["variance"]]
        print(common.format_table(["fraction", "draw / batch"], rows))
    if "losses" in results:
        print("\nLosses over held-out text (nats per token), all tokens\n")
        names = [name for name in results["losses"][0] if "loss" in name]
        rows = [
            ["plain" if row["fraction"] is None else f"{row['fraction']:g}", row["seed"], *(row.get(n) for n in names)]
            for row in results["losses"]
        ]
        print(common.format_table(["fraction", "seed", *names], rows))
    print("\nGoals\n")
    print(common.format_table(["goal", "met"], [[name, goal["met"]] for name, goal in verdicts.items()]))
    print(flush=True)


# --- Command line ---


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="small and few: shows that everything runs")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="what `make demo` has made")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/token_fraction"), help="folder of the runs from scratch"
    )
    for name in ("rounds", "batches", "draws", "train-iters"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--fractions", type=float, nargs="+", help="below 1; default: 0.5 0.25")
    parser.add_argument("--output", type=Path, help="JSON file. Default: benchmarks/results/NAME_MACHINE_DATE.json, "
                        "and none with --quick")  # fmt: skip
    given = parser.parse_args(arguments)
    names = ("parts", "rounds", "batches", "draws", "train_iters", "seeds")
    changes = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    settings = replace(QUICK if given.quick else Settings(), device="cuda" if use_cuda() else "cpu", **changes)
    if given.fractions:
        if not all(0 < fraction < 1 for fraction in given.fractions):
            parser.error(f"--fractions {given.fractions}: each lies between 0 and 1")
        settings = replace(settings, fractions=(1.0, *given.fractions))
    for name, least in (("rounds", 2), ("batches", 2), ("draws", 1), ("train_iters", 2)):
        if getattr(settings, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(settings, name)}: at least {least}")
    tokenizer = given.demo / "tokenizer"
    if set(settings.parts) != {"time"} and not tokenizer.is_dir():
        parser.error(f"--demo {given.demo}: no {tokenizer}; run `make demo` first, or use --parts time")
    return settings, given


def main() -> int:
    settings, given = parse_arguments()
    machine = common.machine_info()  # with the load before the run
    results: dict[str, Any] = {}
    given.work.mkdir(parents=True, exist_ok=True)
    if "time" in settings.parts:
        results["seconds"] = run_on_ranks(1, measure_time, settings)
        results["time"] = compare_time(settings, results["seconds"])
    if "variance" in settings.parts:
        results["gradients"] = run_on_ranks(1, measure_variance, settings, given.demo, given.work)
        results["variance"] = compare_variance(results["gradients"])
    if "losses" in settings.parts:
        results["losses"] = measure_losses(settings, given.demo, given.work)
    verdicts = goals(settings, results)
    print_report(results, verdicts)
    name = "token_fraction" if settings.parts == PARTS else f"token_fraction_{'-'.join(settings.parts)}"
    document = common.result_document(name, machine, asdict(settings), settings.seeds[0], results, verdicts)
    common.finish(document, given.output, is_written=given.output is not None or not given.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
