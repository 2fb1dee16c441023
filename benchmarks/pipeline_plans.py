"""What plans of the pipeline bring when they run: exits in idle time, filled bubbles, and what was predicted.

    python -m benchmarks.pipeline_plans            (from the root of the repository)

A small model on 2 and 4 pipeline ranks of this machine. Its passes are padded with sleeps, the same on every stage,
and exits with a shorter one: ranks that sleep do not compete for the processor, so that what is measured is how passes
overlap, not how fast this machine computes. (With `--no-padding` they compute only; more ranks than cores then share
the cores, and the time of an iteration follows the sum of all work, whatever its order.) Per variant, in turn:
- plain: the model without exits, core's 1F1B;
- in_backward: exits in the backward, core's 1F1B;
- in_idle_time: `--exits-in-bubbles`;
- filled: the same with `--fill-explicit-bubbles`, as many microbatches as fit.
Time is wall time of an iteration without the optimizer, of the slowest rank; ratios are medians over rounds.
*predicted* is the simulation of the plan with the medians of the passes that were measured before it was made. The
last line is one JSON document.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.batches import Batch, random_batches
from benchmarks.ranks import gather, run_on_ranks, timed
from benchmarks.rounds import in_turn, progress
from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import OptimizerConfig, TrainingConfig
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.config.pipeline import PipelineConfig
from megatron.early_exit.config.run import RunConfig


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    num_stages: tuple[int, ...] = (2, 4)
    layers_per_stage: int = 2
    hidden_size: int = 64
    vocab_size: int = 512
    seq_length: int = 32
    micro_batch_size: int = 1
    num_microbatches: int = 12
    forward_ms: float = 30.0
    """Sleep in every stage's forward; 0: none. The last stage's is longer by `head_ms`."""
    backward_forward_ratio: float = 2.0
    head_ms: float = 6.0
    """Sleep for the final head, a third of it in the forward."""
    exit_ms: float = 6.0
    """Sleep for all exits of a stage."""
    rounds: int = 5
    seed: int = 1234

    @property
    def variants(self) -> dict[str, PipelineConfig | None]:
        """None: core's schedule."""
        return {
            "plain": None,
            "in_backward": None,
            "in_idle_time": PipelineConfig(exits_in_bubbles=True),
            "filled": PipelineConfig(exits_in_bubbles=True, fill_explicit_bubbles=True),
        }


QUICK = Settings(num_stages=(2,), num_microbatches=4, rounds=1)
"""Shows that everything runs; its times say nothing."""


class _Sleep(torch.autograd.Function):
    """Identity that takes time, forward and backward."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, forward_sec: float, backward_sec: float) -> torch.Tensor:
        time.sleep(forward_sec)
        ctx.backward_sec = backward_sec
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.backward_sec)
        return grad_output, None, None


def run_config(settings: Settings, num_stages: int, has_exits: bool, pipeline: PipelineConfig | None) -> RunConfig:
    """Exits at the beginning of the second and, of four stages, of the third stage, as EE-LLM has them."""
    first_layers = [settings.layers_per_stage * stage + 1 for stage in range(1, max(num_stages - 1, 2))]
    return RunConfig(
        model=ModelConfig(
            num_layers=settings.layers_per_stage * num_stages, hidden_size=settings.hidden_size,
            num_attention_heads=4, max_position_embeddings=settings.seq_length, position_embedding_type="rope",
            normalization="RMSNorm", swiglu=True, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        ),
        exits=ExitConfig(
            exit_layer_nums=tuple(first_layers[:2]) if num_stages > 2 else (1,), pre_exit=num_stages > 2,
            use_exit_norm=True,
        ) if has_exits else ExitConfig(),
        parallel=ParallelConfig(pipeline_model_parallel_size=num_stages),
        pipeline=pipeline or PipelineConfig(),
        training=TrainingConfig(
            seq_length=settings.seq_length, micro_batch_size=settings.micro_batch_size, train_iters=1
        ),
        optimizer=OptimizerConfig(lr=1e-4),
        data=DataConfig(mock_data=True, vocab_size=settings.vocab_size),
    )  # fmt: skip


class Built:
    """One variant on this rank."""

    def __init__(self, settings: Settings, num_stages: int, name: str, pipeline: PipelineConfig | None) -> None:
        from megatron.early_exit.model.build import build_model
        from megatron.early_exit.training.core_config import connect_core_config
        from megatron.early_exit.training.planned_pipeline import PlannedPipeline

        self.settings = settings
        self.config = run_config(settings, num_stages, name != "plain", pipeline)
        self.model = build_model(self.config, settings.vocab_size)
        connect_core_config(self.model)
        if settings.forward_ms:
            self._pad()
        self.planned = PlannedPipeline(self.config, self.model, progress) if pipeline is not None else None

    def _pad(self) -> None:
        (chunk,) = self.model.chunks
        head = self.settings.head_ms / 1000 if chunk.post_process else 0.0
        forward = self.settings.forward_ms / 1000
        backward = forward * self.settings.backward_forward_ratio
        layer = chunk.decoder.layers[-1]
        run = layer.forward

        def padded(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return run(_Sleep.apply(hidden_states, forward + head / 3, backward + head * 2 / 3), *args, **kwargs)

        layer.forward = padded
        for exit_head in chunk.exit_heads():
            loss = exit_head.loss

            def padded_loss(*args: Any, loss: Any = loss, **kwargs: Any) -> Any:
                time.sleep(self.settings.exit_ms / 1000 / len(chunk.exit_heads()))
                return loss(*args, **kwargs)

            exit_head.loss = padded_loss

    def iteration(self, batches: list[Batch]) -> None:
        from megatron.early_exit.training.step import accumulate_gradients

        for chunk in self.model.wrapped:
            chunk.zero_grad_buffer()
        (chunk,) = self.model.chunks
        accumulate_gradients(
            self.model, [iter(batches) if chunk.pre_process or chunk.post_process or chunk.exit_heads() else None],
            exit_weights=self.config.exits.weights_at(0), num_microbatches=self.settings.num_microbatches,
            micro_batch_size=self.settings.micro_batch_size, seq_length=self.settings.seq_length, planned=self.planned,
        )  # fmt: skip


def measure(settings: Settings, num_stages: int, pictures: str | None) -> dict[str, Any]:
    """All variants on `num_stages` ranks. Runs on every rank."""
    from megatron.early_exit.platform.distributed import initialize_model_parallel, seed_generators

    initialize_model_parallel(
        ParallelConfig(pipeline_model_parallel_size=num_stages), settings.layers_per_stage * num_stages, settings.seed
    )
    count = settings.num_microbatches + 2 * num_stages
    batches = random_batches(settings.micro_batch_size, settings.vocab_size, settings.seq_length, count, settings.seed)
    built = {}
    for name, pipeline in settings.variants.items():
        progress(f"PP {num_stages}: {name}")
        if pipeline is not None and pictures is not None:
            pipeline = replace(pipeline, profile_pipeline=f"{pictures}_pp{num_stages}_{name}.png")
        seed_generators(settings.seed)
        built[name] = Built(settings, num_stages, name, pipeline)
    for one in built.values():
        for _ in range(11):  # warm up, measure stages, and profile the plan that follows
            one.iteration(batches)
    slowest = lambda one: max(gather(timed(one.iteration, batches)[0]))
    seconds = in_turn({name: (lambda one=one: slowest(one)) for name, one in built.items()}, settings.rounds, warmup=0)
    plans = {name: one.planned.plan(settings.num_microbatches) for name, one in built.items() if one.planned}
    return {
        "seconds": seconds,
        "fill": {name: [plan.num_fill_warmup, plan.num_fill_cooldown] for name, plan in plans.items()},
        "predicted_sec": {name: predict(one, settings) for name, one in built.items() if one.planned},
        "plans": {name: str(plan) for name, plan in plans.items()},
    }


def predict(built: Built, settings: Settings) -> float:
    """Iteration time of the plan by simulation, with the costs that were measured before the plan was made."""
    from megatron.early_exit.schedules.simulate import simulate

    return simulate(built.planned.plan(settings.num_microbatches), built.planned.costs).iteration_sec


def compare(num_stages: int, measured: dict[str, Any], settings: Settings) -> list[list[Any]]:
    """Rows: variant, milliseconds, time and microbatches against plain, predicted against measured."""
    seconds = measured["seconds"]
    rows = []
    for name, values in seconds.items():
        fill = measured["fill"].get(name, [0, 0])
        predicted = measured["predicted_sec"].get(name)
        rows.append([
            f"PP {num_stages} {name}", common.median(values) * 1000,
            common.median_ratio(values, seconds["plain"]), f"{fill[0]} + {fill[1]}",
            (settings.num_microbatches + sum(fill)) / settings.num_microbatches,
            common.ratio(predicted, common.median(values)),
        ])  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--no-padding", action="store_true", help="computation alone, without sleeps")
    parser.add_argument("--pictures", metavar="PREFIX", help="draw predicted and measured timelines there")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--no-write", action="store_true", help="print the document only")
    args = parser.parse_args()
    settings = QUICK if args.quick else Settings()
    if args.rounds:
        settings = replace(settings, rounds=args.rounds)
    if args.no_padding:
        settings = replace(settings, forward_ms=0.0, hidden_size=256, seq_length=256, vocab_size=4096)
    machine = common.machine_info()
    results = {}
    rows = []
    for num_stages in settings.num_stages:
        results[f"PP {num_stages}"] = run_on_ranks(num_stages, measure, settings, num_stages, args.pictures)
        rows += compare(num_stages, results[f"PP {num_stages}"], settings)
    header = ["variant", "ms", "time / plain", "fill", "microbatches / plain", "predicted / measured"]
    print(common.format_table(header, rows))
    document = common.result_document(
        "pipeline_plans", machine, asdict(settings), settings.seed,
        {"rows": [dict(zip(header, row, strict=True)) for row in rows], "raw": results}, goals={},
    )  # fmt: skip
    common.finish(document, args.output, is_written=not args.no_write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
