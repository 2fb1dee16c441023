"""What tuning exits costs: time and memory against a forward pass of the whole model and against training all of it.

    python -m benchmarks.tuning_cost --quick            (from the root of the repository)

Variants of one model, with 1, 2 and 8 exits (norm + MLP branch, the model's output weight):
- forward: a forward pass of the plain model with its loss, the cost that tuning is compared with;
- tune: EE-Tuning, forward through the layers up to the last exit and training of the exits (optimizer step included);
- train: training of all parameters with these exits;
- distil: as tune, following the final head (--tune-exit-distillation 1): all layers run, and with two stages what the
  final head reads travels back;
- distil_kept: the same on kept hidden states, which are there in memory: no layers run;
- heads: forward and backward of the exits' heads alone, on hidden states that are there.
With one stage exits are spread over the first half of the layers (one exit: at a quarter), so the second half is never
built; with two stages over all layers, so that both stages run.

Time is wall time of the slowest rank; every round runs each variant once, and ratios are medians over rounds. Memory:
bytes of tensors alive at the peak of one iteration, beyond parameters, gradient buffers and optimizer state, which are
given beside it. The last line is one JSON document, also written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.batches import Batch, random_batches
from benchmarks.ranks import gather, run_on_ranks, timed
from benchmarks.rounds import in_turn, progress
from benchmarks.timing import peak_bytes
from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import OptimizerConfig, TrainingConfig
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.settings import with_tuned_stages
from megatron.early_exit.platform.device import use_cuda


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    device: str = "cpu"
    num_layers: int = 16
    hidden_size: int = 384
    num_attention_heads: int = 6
    vocab_size: int = 32768
    exits: tuple[int, ...] = (1, 2, 8)
    pipeline_model_parallel_size: tuple[int, ...] = (1, 2)
    seq_length: int = 256
    micro_batch_size: int = 2
    num_microbatches: int = 2
    iterations: int = 3
    threads_per_rank: int = 1
    bf16: bool = False
    seed: int = 1234

    def exit_layers(self, num_exits: int, num_stages: int) -> tuple[int, ...]:
        if num_stages == 1:
            within = self.num_layers // 2
            return tuple(within * (i + 1) // num_exits for i in range(num_exits)) if num_exits > 1 else (within // 2,)
        if num_exits == 1:
            return (3 * self.num_layers // 4,)
        return tuple(self.num_layers * (2 * i + 1) // (2 * num_exits) for i in range(num_exits))


QUICK = Settings(num_layers=8, hidden_size=64, num_attention_heads=4, exits=(1, 2), seq_length=128, iterations=2)
"""Shows that everything runs; its times say nothing."""


class _Kept(NamedTuple):
    """One microbatch with what the layers make of it."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    attention_mask: None
    hidden_states: dict[str, Tensor]


class Built:
    """One variant on this rank."""

    def __init__(
        self, settings: Settings, num_stages: int, num_exits: int, tunes: bool, distillation: float = 0.0
    ) -> None:
        from megatron.early_exit.model.build import build_model
        from megatron.early_exit.training.core_config import connect_core_config
        from megatron.early_exit.training.optimizer import build_optimizer
        from megatron.early_exit.training.planned_pipeline import PlannedPipeline
        from megatron.early_exit.training.plans import follows_plan

        has_exits = num_exits > 0
        self.config = RunConfig(
            model=ModelConfig(
                num_layers=settings.num_layers, hidden_size=settings.hidden_size,
                num_attention_heads=settings.num_attention_heads, max_position_embeddings=settings.seq_length,
                position_embedding_type="rope", normalization="RMSNorm", swiglu=True, add_bias_linear=False,
                hidden_dropout=0.0, attention_dropout=0.0,
            ),
            exits=ExitConfig(
                exit_layer_nums=settings.exit_layers(num_exits, num_stages) if has_exits else (),
                use_exit_norm=has_exits, use_exit_mlp=has_exits,
            ),
            parallel=ParallelConfig(pipeline_model_parallel_size=num_stages),
            training=TrainingConfig(
                seq_length=settings.seq_length, micro_batch_size=settings.micro_batch_size, bf16=settings.bf16,
                tune_exit=tunes, tune_exit_distillation=distillation, train_iters=1,
            ),
            optimizer=OptimizerConfig(lr=1e-4),
            data=DataConfig(mock_data=True, vocab_size=settings.vocab_size),
        )  # fmt: skip
        if tunes:
            self.config = with_tuned_stages(self.config)
        self.model = build_model(self.config, settings.vocab_size)
        self.optimizer = build_optimizer(self.config, self.model)
        connect_core_config(self.model, self.optimizer)
        self.planned = PlannedPipeline(self.config, self.model, progress) if follows_plan(self.config) else None
        self.sizes = {"micro_batch_size": settings.micro_batch_size, "seq_length": settings.seq_length}

    def _iterators(self, batches: list[Batch]) -> list[Any]:
        (chunk,) = self.model.chunks
        return [iter(batches) if chunk.pre_process or chunk.post_process or chunk.exit_heads() else None]

    def forward(self, batches: list[Batch]) -> None:
        from megatron.early_exit.model.exit_strategies import Evaluation
        from megatron.early_exit.training.step import run_schedule

        self.model.eval()
        with torch.no_grad():
            losses = self.model.exit_losses
            losses.begin_iteration(len(batches))
            run_schedule(
                self.model, self._iterators(batches), Evaluation(losses), num_microbatches=len(batches), **self.sizes
            )

    def step(self, batches: list[Batch]) -> None:
        from megatron.early_exit.training.step import train_step

        train_step(
            self.model, self.optimizer, self._iterators(batches), exit_weights=self.config.exits.weights_at(0),
            num_microbatches=len(batches), planned=self.planned, **self.sizes,
        )  # fmt: skip

    def step_on_kept(self, batches: list[Batch]) -> None:
        """A step on hidden states that are there; their values do not matter."""
        from megatron.early_exit.training.step import train_step

        (chunk,) = self.model.chunks
        points = chunk.tuning_points()
        shape = (self.sizes["micro_batch_size"], self.sizes["seq_length"], self.config.model.hidden_size)
        hidden = torch.zeros(shape, dtype=chunk.config.params_dtype, device=batches[0].tokens.device)
        kept = (_Kept(*batch, dict.fromkeys(points, hidden)) for batch in batches)
        train_step(
            self.model, self.optimizer, [kept if points else None], exit_weights=self.config.exits.weights_at(0),
            num_microbatches=len(batches), has_hidden_states=True, **self.sizes,
        )  # fmt: skip

    def heads(self, batches: list[Batch]) -> None:
        """Training of the heads alone."""
        (chunk,) = self.model.chunks
        layers = [layer for layer in chunk.decoder.layers if hasattr(layer, "exit_head")]
        for batch in batches:
            shape = (batch.tokens.size(1), batch.tokens.size(0), self.config.model.hidden_size)
            hidden = torch.zeros(shape, dtype=chunk.config.params_dtype, device=batch.tokens.device)
            for layer in layers:
                one = torch.ones((), device=batch.tokens.device)
                sums = layer.exit_head.loss(hidden, batch.labels, batch.loss_mask, one, layer.pre_mlp_layernorm)
                sums.objective.backward()

    def standing_bytes(self) -> dict[str, int]:
        from megatron.early_exit.platform.optimizer_state import optimizer_parts

        parameters = [parameter for chunk in self.model.chunks for parameter in chunk.parameters()]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        states = [state for part in optimizer_parts(self.optimizer) for state in part.optimizer.state.values()]
        state = [value for one in states for value in one.values() if torch.is_tensor(value)]
        return {
            "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "trained_parameter_bytes": sum(p.numel() * p.element_size() for p in trained),
            "gradient_bytes": sum(p.numel() * p.main_grad.element_size() for p in trained),
            "optimizer_bytes": sum(value.numel() * value.element_size() for value in state),
        }


def measure_layout(settings: Settings, num_stages: int) -> list[dict[str, Any]]:
    """One row for each number of exits. Runs on every rank."""
    from megatron.early_exit.platform.distributed import initialize_model_parallel

    initialize_model_parallel(
        ParallelConfig(pipeline_model_parallel_size=num_stages), settings.num_layers, settings.seed
    )
    batches = random_batches(
        settings.micro_batch_size, settings.vocab_size, settings.seq_length, settings.num_microbatches, settings.seed
    )
    rows = []
    for num_exits in settings.exits:
        progress(f"PP {num_stages}, {num_exits} exits")
        plain, tune = Built(settings, num_stages, 0, False), Built(settings, num_stages, num_exits, True)
        train = Built(settings, num_stages, num_exits, False)
        distil = Built(settings, num_stages, num_exits, True, distillation=1.0)
        actions = {
            "forward": plain.forward, "tune": tune.step, "train": train.step, "distil": distil.step,
            "distil_kept": distil.step_on_kept,
        }  # fmt: skip
        if num_stages == 1:
            actions["heads"] = tune.heads
        built = {
            "forward": plain, "tune": tune, "train": train, "heads": tune, "distil": distil, "distil_kept": distil
        }  # fmt: skip
        for action in actions.values():  # warm up, and let optimizers make their state
            action(batches)
        memory = {
            name: gather({"peak_bytes": peak_bytes(action, batches), **built[name].standing_bytes()})
            for name, action in actions.items()
        }
        slowest = lambda action: max(gather(timed(action, batches)[0]))
        seconds = in_turn(
            {name: (lambda a=action: slowest(a)) for name, action in actions.items()}, settings.iterations, warmup=0
        )
        rows.append({
            "num_stages": num_stages, "num_exits": num_exits,
            "exit_layers": list(tune.config.exits.exit_layer_nums),
            "built_layers": tune.config.build.num_built_layers, "seconds": seconds, "memory": memory,
        })  # fmt: skip
        del plain, tune, train, distil, actions, built
        gc.collect()
    return rows


def compare(settings: Settings, row: dict[str, Any]) -> dict[str, Any]:
    seconds, memory = row["seconds"], row["memory"]
    tokens = settings.num_microbatches * settings.micro_batch_size * settings.seq_length
    ratio = lambda name, base: common.median_ratio(seconds[name], seconds[base])
    busiest = lambda name: max(stage["peak_bytes"] for stage in memory[name])
    chunk = chunk_bytes(settings)
    one = {key: row[key] for key in ("num_stages", "num_exits", "exit_layers", "built_layers")} | {
        "tune_tokens_per_second": tokens / common.median(seconds["tune"]),
        "tune_over_forward": ratio("tune", "forward"),
        "tune_over_train": ratio("tune", "train"),
        "distil_over_tune": ratio("distil", "tune"),
        "distil_kept_over_tune": ratio("distil_kept", "tune"),
        "heads_over_forward": ratio("heads", "forward") if "heads" in seconds else None,
        "backbone_over_forward": None,
        "tune_peak_mib": busiest("tune") / common.MIB,
        "distil_peak_mib": busiest("distil") / common.MIB,
        "distil_kept_peak_mib": busiest("distil_kept") / common.MIB,
        "train_peak_mib": busiest("train") / common.MIB,
        "forward_peak_mib": busiest("forward") / common.MIB,
        "chunk_mib": chunk / common.MIB,
        "standing_mib": _standing(memory["tune"]) / common.MIB,
        "train_standing_mib": _standing(memory["train"]) / common.MIB,
    }
    if "heads" in seconds:
        pairs = zip(seconds["tune"], seconds["heads"], seconds["forward"], strict=True)
        one["backbone_over_forward"] = common.median([(tune - heads) / forward for tune, heads, forward in pairs])
    return one


def _standing(stages: list[dict[str, int]]) -> int:
    """Gradients and optimizer state, and the exits' own parameters, on the stage that has most."""
    return max(s["trained_parameter_bytes"] + s["gradient_bytes"] + s["optimizer_bytes"] for s in stages)


def chunk_bytes(settings: Settings) -> int:
    from megatron.early_exit.model.cross_entropy import chunk_size

    tokens = min(chunk_size(settings.vocab_size, is_gpu=use_cuda()), settings.micro_batch_size * settings.seq_length)
    return tokens * settings.vocab_size * 4


def goals(comparisons: list[dict[str, Any]]) -> dict[str, Any]:
    time_checks = [
        {"exits": one["num_exits"], "backbone_over_forward": one["backbone_over_forward"], "limit": 0.45,
         "met": one["backbone_over_forward"] < 0.45}
        for one in comparisons if one["num_stages"] == 1 and one["num_exits"] == 1
    ]  # fmt: skip
    # Beyond a forward pass: the logits of one chunk and their gradient, and what an MLP branch keeps for its backward.
    memory_checks = [
        {"num_stages": one["num_stages"], "exits": one["num_exits"],
         "beyond_forward_mib": one["tune_peak_mib"] - one["forward_peak_mib"], "limit_mib": one["chunk_mib"],
         "met": one["tune_peak_mib"] - one["forward_peak_mib"] <= one["chunk_mib"]}
        for one in comparisons
    ]  # fmt: skip
    return {
        "one exit at a quarter: less than 0.45 of a forward pass beside its head": common.verdict(time_checks),
        "memory beyond a forward pass is at most one chunk": common.verdict(memory_checks),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--exits", type=int, nargs="+", help="numbers of exits; default 1 2 8")
    parser.add_argument("--num-microbatches", type=int)
    parser.add_argument("--threads-per-rank", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if use_cuda() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--no-write", action="store_true", help="print the document only")
    args = parser.parse_args()
    settings = replace(QUICK if args.quick else Settings(), device=args.device, bf16=args.bf16)
    if args.exits:
        settings = replace(settings, exits=tuple(args.exits))
    for name in ("iterations", "threads_per_rank", "num_microbatches"):
        if getattr(args, name):
            settings = replace(settings, **{name: getattr(args, name)})
    machine = common.machine_info()
    rows: list[dict[str, Any]] = []
    for num_stages in settings.pipeline_model_parallel_size:
        if settings.device == "cuda" and num_stages > torch.cuda.device_count():
            print(f"PP {num_stages} skipped: it needs as many GPUs, this machine has {torch.cuda.device_count()}.")
            continue
        rows += run_on_ranks(
            num_stages, measure_layout, settings, num_stages, threads_per_rank=settings.threads_per_rank
        )
    comparisons = [compare(settings, row) for row in rows]
    verdicts = goals(comparisons)
    names = [
        "num_stages", "num_exits", "built_layers", "tune_tokens_per_second", "tune_over_forward", "heads_over_forward",
        "backbone_over_forward", "tune_over_train", "distil_over_tune", "distil_kept_over_tune", "forward_peak_mib",
        "tune_peak_mib", "distil_peak_mib", "distil_kept_peak_mib", "train_peak_mib",
        "standing_mib", "train_standing_mib",
    ]  # fmt: skip
    print(common.table_of(comparisons, names))
    print("\n" + common.goals_table(verdicts))
    results = {"comparisons": comparisons, "raw": rows}
    document = common.result_document("tuning_cost", machine, asdict(settings), settings.seed, results, verdicts)
    common.finish(document, args.output, is_written=not args.no_write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
