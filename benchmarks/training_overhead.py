"""What exits cost in training: time and memory of an early-exit GPT against plain GPT and against naive exits.

    python -m benchmarks.training_overhead --quick      (from the root of the repository)

Variants, all built from the same settings and seed:
- plain: the model with no exits; core: the same with core's own final head (full logits);
- early exit (ee): exits as this package trains them; naive: the same exits in plain autograd, with full logits kept
  from forward to backward (`naive_exits.py`). Exits sit after 1/4, 2/4 and 3/4 of the layers.

Time: an iteration is forward, backward and optimizer step over all microbatches. Every round runs each variant once, so
that a slow moment of the machine hits all; the order rotates. Added time is the median over rounds of
variant / plain - 1, wall time being that of the slowest rank and CPU time the sum over ranks. It is compared with the
added FLOPs of `flops.py`.

Memory: bytes of tensors alive at the peak of one untimed forward-backward, per pipeline stage, beyond parameters,
gradient buffers and optimizer state (CPU: `memory_tracker.py`; CUDA: PyTorch's allocator). `extra` is the difference
to plain. Its bound on a stage with exits is one chunk of fp32 logits and one fp32 weight gradient (and `TOKEN_BYTES` a
token, below a thousandth of its logits); training in 16 bits adds the 16-bit copies of both.

The last line of the output is one JSON document, also written to benchmarks/results/. It knows pipeline parallelism
only; TP and DP size are 1. On CUDA every rank needs a GPU of its own: layouts that do not fit are skipped.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common, flops
from benchmarks.memory_tracker import TensorMemoryTracker
from benchmarks.ranks import run_on_ranks
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig
from megatron.early_exit.config.optimization import OptimizerConfig, TrainingConfig
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.platform.device import use_cuda

LOSS_TOLERANCE = 1e-4
"""Largest relative difference of losses and gradient norm between variants that must compute the same."""

SCALARS_BYTES = 4096
"""Loss scales and the like that any iteration may hold; below this a difference in memory is none."""

TOKEN_BYTES = 64
"""Labels, mask, loss, sums and scales of one token while an exit's loss is computed: vectors beside its logits, which
take 4 bytes times the vocabulary. Part of the bound."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    device: str = "cpu"
    """cpu or cuda."""

    num_layers: int = 8
    hidden_size: int = 256
    num_attention_heads: int = 8

    vocab_size: tuple[int, ...] = (32768, 49152)
    """Vocabularies. The first is measured with all of `exits`, sequence lengths and numbers of microbatches, the others
    with the first of `exits`."""

    exits: tuple[int, ...] = (1, 2, 3)
    """Numbers of exits."""

    pipeline_model_parallel_size: tuple[int, ...] = (1, 2, 4)
    """Numbers of pipeline stages; one rank each."""

    seq_length: tuple[int, ...] = (256, 128, 512)
    """Sequence lengths (tokens). Time is measured with the first, memory with all."""

    micro_batch_size: int = 2
    """Sequences of one microbatch."""

    num_microbatches: int | None = None
    """Microbatches of an iteration; None: 8 with two stages, else 4. Memory is measured with both, or with twice as
    many as well."""

    iterations: int = 3
    """Timed rounds."""

    warmup_iterations: int = 0
    """Rounds before them, beside the iteration in which memory is measured."""

    threads_per_rank: int = 1
    """Threads of each rank (CPU)."""

    pre_exit: bool = False
    use_exit_norm: bool = False
    use_exit_mlp: bool = False
    use_exit_block: bool = False
    untie_exit_output_weights: bool = False
    untie_embeddings_and_output_weights: bool = False
    bf16: bool = False
    transformer_impl: str = "local"
    """As the flags of the training program."""

    seed: int = 1234
    """Seed of initial weights and tokens."""

    def microbatches(self, num_stages: int) -> int:
        return self.num_microbatches or (8 if num_stages == 2 else 4)

    def exits_with(self, vocab_size: int) -> tuple[int, ...]:
        """Numbers of exits that are measured with this vocabulary."""
        return self.exits if vocab_size == self.vocab_size[0] else self.exits[:1]


QUICK = Settings(
    num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=(32768,), exits=(1, 2),
    pipeline_model_parallel_size=(1, 2), seq_length=(128, 256), iterations=2,
)  # fmt: skip
"""Shows that everything runs; its times say nothing."""


class Batch(NamedTuple):
    """One microbatch of random tokens: what the training step reads of a batch."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    attention_mask: None = None


@dataclass(frozen=True)
class Variant:
    """One of the models that are compared."""

    kind: str
    """plain, core, ee or naive."""

    num_exits: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.num_exits}" if self.num_exits else self.kind


def variants(exits: tuple[int, ...]) -> list[Variant]:
    return [Variant("plain"), Variant("core"), *(Variant(kind, n) for n in exits for kind in ("ee", "naive"))]


def exit_layer_nums(settings: Settings, num_exits: int) -> tuple[int, ...]:
    """After 1/4, 2/4, 3/4 of the layers; with pre-exit the same places under the number of the next layer."""
    after = [settings.num_layers * (index + 1) // 4 for index in range(num_exits)]
    return tuple(layer + 1 if settings.pre_exit else layer for layer in after)


def run_config(settings: Settings, num_stages: int, num_exits: int) -> RunConfig:
    exits = ExitConfig()
    if num_exits:
        exits = ExitConfig(
            exit_layer_nums=exit_layer_nums(settings, num_exits),
            pre_exit=settings.pre_exit,
            use_exit_norm=settings.use_exit_norm,
            use_exit_mlp=settings.use_exit_mlp,
            use_exit_block=settings.use_exit_block,
            untie_exit_output_weights=settings.untie_exit_output_weights,
        )
    model = ModelConfig(
        num_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        num_attention_heads=settings.num_attention_heads,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        untie_embeddings_and_output_weights=settings.untie_embeddings_and_output_weights,
        transformer_impl=settings.transformer_impl,
    )
    training = TrainingConfig(
        seq_length=settings.seq_length[0],
        micro_batch_size=settings.micro_batch_size,
        seed=settings.seed,
        bf16=settings.bf16,
    )
    parallel = ParallelConfig(pipeline_model_parallel_size=num_stages)
    return RunConfig(model, training, OptimizerConfig(lr=1e-4), exits, parallel)


# --- On the ranks ---


class BuiltVariant:
    """One variant on this rank: its share of the model and its optimizer."""

    def __init__(self, variant: Variant, settings: Settings, num_stages: int, vocab_size: int) -> None:
        # Core must be imported on the ranks only, after it was adapted to the device.
        from benchmarks.naive_exits import make_exits_naive, use_core_head
        from megatron.early_exit.model.build import build_model
        from megatron.early_exit.platform.distributed import seed_generators
        from megatron.early_exit.training.core_config import connect_core_config
        from megatron.early_exit.training.optimizer import build_optimizer

        self.variant = variant
        self.config = run_config(settings, num_stages, variant.num_exits)
        seed_generators(settings.seed)
        self.model = build_model(self.config, vocab_size)
        if variant.kind == "naive":
            make_exits_naive(self.model)
        if variant.kind == "core":
            use_core_head(self.model)
        self.optimizer = build_optimizer(self.config, self.model)
        connect_core_config(self.model, self.optimizer)

    @property
    def chunk(self) -> torch.nn.Module:
        return self.model.chunks[0]

    def persistent_bytes(self) -> dict[str, int]:
        parameters = list(self.chunk.parameters())
        return {
            "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "gradient_bytes": sum(p.numel() * p.main_grad.element_size() for p in parameters),
        }

    def _iterators(self, batches: list[Batch]) -> list[Iterator[Batch] | None]:
        chunk = self.chunk
        return [iter(batches) if chunk.pre_process or chunk.post_process or chunk.exit_heads() else None]

    def _sizes(self, batches: list[Batch]) -> dict[str, int]:
        micro_batch_size, seq_length = batches[0].tokens.shape
        return {
            "num_microbatches": len(batches), "micro_batch_size": micro_batch_size, "seq_length": seq_length,
        }  # fmt: skip

    def forward_backward(self, batches: list[Batch]) -> None:
        """Gradients of one batch, without the optimizer step."""
        from megatron.early_exit.model.exit_strategies import Deferred
        from megatron.early_exit.training.step import run_schedule

        self.model.wrapped[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        weights = self.config.exits.weights_at(0)
        losses = self.model.exit_losses
        losses.begin_iteration(len(batches), weights)
        run_schedule(self.model, self._iterators(batches), Deferred(losses), **self._sizes(batches))

    def optimizer_step(self) -> float:
        """Use the gradients; returns their norm."""
        return float(self.optimizer.step()[1])

    def train_step(self, batches: list[Batch]) -> None:
        """One iteration."""
        from megatron.early_exit.training.step import train_step

        weights = self.config.exits.weights_at(0)
        train_step(self.model, self.optimizer, self._iterators(batches), exit_weights=weights, **self._sizes(batches))

    def mean_losses(self) -> list[float]:
        """Loss of every exit and of the final head (nats per token) since the last call, over all stages."""
        from megatron.core import parallel_state

        statistics = self.model.exit_losses.statistics.clone()
        torch.distributed.all_reduce(statistics, group=parallel_state.get_pipeline_model_parallel_group())
        self.model.exit_losses.reset_statistics()
        return (statistics[:, 0] / statistics[:, 1]).tolist()


def random_batches(
    micro_batch_size: int, vocab_size: int, seq_length: int, num_microbatches: int, seed: int
) -> list[Batch]:
    """The same on all ranks."""
    from megatron.early_exit.platform.device import device

    generator = torch.Generator().manual_seed(seed)
    shape = (micro_batch_size, seq_length)
    batches = []
    for _ in range(num_microbatches):
        tokens = torch.randint(vocab_size, (shape[0], shape[1] + 1), generator=generator)
        positions = torch.arange(seq_length).expand(shape)
        fields = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(shape), positions)
        batches.append(Batch(*(field.to(device()) for field in fields)))
    return batches


def peak_bytes(action: Callable[[list[Batch]], object], batches: list[Batch]) -> int:
    """Most bytes of tensors alive at once that one `action` creates on this rank."""
    gc.collect()
    if use_cuda():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action(batches)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with TensorMemoryTracker() as tracker:
        action(batches)
    return tracker.peak_bytes


def chunk_tokens(vocab_size: int, batches: list[Batch]) -> int:
    """Tokens of the largest chunk that the cross-entropy makes of one microbatch."""
    from megatron.early_exit.model.cross_entropy import chunk_size

    return min(chunk_size(vocab_size, is_gpu=use_cuda()), batches[0].tokens.numel())


def timed(action: Callable[[list[Batch]], object], batches: list[Batch]) -> tuple[float, float]:
    """(wall seconds, CPU seconds) on this rank of one `action` that all ranks start together."""
    if use_cuda():
        torch.cuda.synchronize()
    torch.distributed.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    action(batches)
    if use_cuda():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def progress(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)


def measure_layout(settings: Settings, num_stages: int) -> dict[str, list[dict[str, Any]]]:
    """All measurements with `num_stages` pipeline stages. Runs on every rank; all return the same."""
    from megatron.early_exit.platform.distributed import initialize_model_parallel

    parallel = ParallelConfig(pipeline_model_parallel_size=num_stages)
    initialize_model_parallel(parallel, settings.num_layers, settings.seed)
    cases, memory = [], []
    for index, vocab_size in enumerate(settings.vocab_size):
        progress(f"PP {num_stages}, vocabulary {vocab_size}: building")
        wanted = variants(settings.exits_with(vocab_size))
        built = [BuiltVariant(variant, settings, num_stages, vocab_size) for variant in wanted]
        cases.append(measure_case(settings, num_stages, vocab_size, built))
        if index == 0:
            memory = measure_memory(settings, num_stages, vocab_size, built)
        del built
        gc.collect()
    return {"cases": cases, "memory": memory}


def measure_case(settings: Settings, num_stages: int, vocab_size: int, built: list[BuiltVariant]) -> dict[str, Any]:
    """Memory, losses and times of all variants, raw."""
    seq_length, num_microbatches = settings.seq_length[0], settings.microbatches(num_stages)
    batches = random_batches(settings.micro_batch_size, vocab_size, seq_length, num_microbatches, settings.seed)
    measured: dict[str, dict[str, Any]] = {}
    for one in built:
        progress(f"  memory of {one.variant.name}")
        peak = peak_bytes(one.forward_backward, batches)
        stage = {**one.persistent_bytes(), "peak_bytes": peak, "num_exits": len(one.chunk.exit_heads())}
        measured[one.variant.name] = {
            "num_exits": one.variant.num_exits,
            "exit_layer_nums": list(one.config.exits.exit_layer_nums),
            "losses": one.mean_losses(),
            "grad_norm": one.optimizer_step(),
            "stages": gather(stage),
        }
    times: dict[str, list[tuple[float, float]]] = {one.variant.name: [] for one in built}
    for round_number in range(settings.warmup_iterations + settings.iterations):
        progress(f"  round {round_number + 1} of {settings.warmup_iterations + settings.iterations}")
        first = round_number % len(built)
        for one in built[first:] + built[:first]:
            times[one.variant.name].append(timed(one.train_step, batches))
    for name, mine in times.items():
        ranks = gather(mine)
        counted = slice(settings.warmup_iterations, None)
        measured[name]["wall_sec"] = [max(rank[0] for rank in step) for step in zip(*ranks, strict=True)][counted]
        measured[name]["cpu_sec"] = [sum(rank[1] for rank in step) for step in zip(*ranks, strict=True)][counted]
    return {
        "vocab_size": vocab_size,
        "num_stages": num_stages,
        "seq_length": seq_length,
        "num_microbatches": num_microbatches,
        "chunk_tokens": chunk_tokens(vocab_size, batches),
        "variants": measured,
    }


def measure_memory(
    settings: Settings, num_stages: int, vocab_size: int, built: list[BuiltVariant]
) -> list[dict[str, Any]]:
    """Peaks of plain, and of early and naive exits (the most of them), over sequence length and microbatches."""
    most = max(settings.exits)
    chosen = {one.variant.kind: one for one in built if one.variant.num_exits in (0, most)}
    chosen.pop("core")
    full = settings.microbatches(num_stages)
    sizes = [(seq_length, full) for seq_length in settings.seq_length]
    sizes.append((settings.seq_length[0], 4 if full == 8 else 2 * full))
    rows = []
    for seq_length, num_microbatches in sizes:
        progress(f"  memory with sequences of {seq_length}, {num_microbatches} microbatches")
        batches = random_batches(settings.micro_batch_size, vocab_size, seq_length, num_microbatches, settings.seed)
        peaks = {kind: peak_bytes(one.forward_backward, batches) for kind, one in chosen.items()}
        stages = gather({**peaks, "num_exits": len(chosen["ee"].chunk.exit_heads())})
        rows.append({
            "vocab_size": vocab_size,
            "num_stages": num_stages,
            "num_exits": most,
            "seq_length": seq_length,
            "num_microbatches": num_microbatches,
            "chunk_tokens": chunk_tokens(vocab_size, batches),
            "stages": stages,
        })  # fmt: skip
    return rows


# --- What it means ---


def extra_bound_bytes(settings: Settings, case: dict[str, Any], num_exits: int) -> int:
    """What exits may add to the peak of a stage that owns `num_exits` of them: one chunk of logits and one weight
    gradient, however many exits (bytes)."""
    if num_exits == 0:
        return SCALARS_BYTES
    elements = (case["chunk_tokens"] + settings.hidden_size) * case["vocab_size"]
    tokens = settings.micro_batch_size * case["seq_length"]
    return elements * (4 + 2 if settings.bf16 else 4) + TOKEN_BYTES * tokens + SCALARS_BYTES


def compare(settings: Settings, case: dict[str, Any], num_exits: int) -> dict[str, Any]:
    """The ratios of one case with `num_exits` exits."""
    config = run_config(settings, case["num_stages"], num_exits)
    measured = case["variants"]
    plain, ee, naive = measured["plain"], measured[f"ee_{num_exits}"], measured[f"naive_{num_exits}"]
    added_flops = flops.added_flops_share(config.model, config.exits, case["vocab_size"], case["seq_length"])
    added_time = common.median_ratio(ee["wall_sec"], plain["wall_sec"]) - 1
    stages = [
        {
            "extra_bytes": e["peak_bytes"] - p["peak_bytes"],
            "naive_extra_bytes": n["peak_bytes"] - p["peak_bytes"],
            "bound_bytes": extra_bound_bytes(settings, case, e["num_exits"]),
            "exit_parameter_bytes": e["parameter_bytes"] - p["parameter_bytes"],
            "exit_gradient_bytes": e["gradient_bytes"] - p["gradient_bytes"],
            "num_exits": e["num_exits"],
        }
        for p, e, n in zip(plain["stages"], ee["stages"], naive["stages"], strict=True)
    ]
    return {
        **{key: case[key] for key in ("vocab_size", "num_stages", "seq_length", "num_microbatches")},
        "num_exits": num_exits,
        "exits_on_first_stage": ee["stages"][0]["num_exits"],
        "added_flops_share": added_flops,
        "added_time_share": added_time,
        "added_time_over_added_flops": common.ratio(added_time, added_flops),
        "naive_added_time_share": common.median_ratio(naive["wall_sec"], plain["wall_sec"]) - 1,
        "added_cpu_time_share": common.median_ratio(ee["cpu_sec"], plain["cpu_sec"]) - 1,
        "naive_added_cpu_time_share": common.median_ratio(naive["cpu_sec"], plain["cpu_sec"]) - 1,
        "core_head_added_time_share": common.median_ratio(measured["core"]["wall_sec"], plain["wall_sec"]) - 1,
        "largest_difference_to_naive": largest_difference(ee, naive),
        "stages": stages,
    }


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest relative difference of losses and gradient norm between two variants with equal weights."""
    pairs = zip([*one["losses"], one["grad_norm"]], [*other["losses"], other["grad_norm"]], strict=True)
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def compare_memory(settings: Settings, row: dict[str, Any]) -> dict[str, Any]:
    """Extra memory of one row of `measure_memory`."""
    stages = [
        {
            "plain_bytes": stage["plain"],
            "extra_bytes": stage["ee"] - stage["plain"],
            "naive_extra_bytes": stage["naive"] - stage["plain"],
            "bound_bytes": extra_bound_bytes(settings, row, stage["num_exits"]),
            "microbatches_in_flight": min(row["num_stages"] - index, row["num_microbatches"]),
            "num_exits": stage["num_exits"],
        }
        for index, stage in enumerate(row["stages"])
    ]
    return {**row, "stages": stages}


def goals(
    settings: Settings, comparisons: list[dict[str, Any]], memory: list[dict[str, Any]], cpu_cores: int
) -> dict[str, Any]:
    """Verdicts: true, false, or null where this run did not measure it."""
    single = [one for one in comparisons if one["num_stages"] == 1]
    double = [
        one
        for one in comparisons
        if one["num_stages"] == 2
        and one["num_exits"] == one["exits_on_first_stage"] == 1
        and one["num_microbatches"] >= 8
        and (settings.device == "cuda" or (settings.threads_per_rank == 1 and cpu_cores >= 2))
    ]
    memory_checks = [
        {
            **{key: row[key] for key in ("vocab_size", "num_stages", "num_exits", "seq_length", "num_microbatches")},
            "stage": index,
            "extra_bytes": stage["extra_bytes"],
            "limit_bytes": stage["bound_bytes"],
            "met": stage["extra_bytes"] <= stage["bound_bytes"],
        }
        for row in [*comparisons, *memory]
        for index, stage in enumerate(row["stages"])
    ]
    same = [one["largest_difference_to_naive"] for one in comparisons]
    return {
        "same_losses_and_gradients_as_naive": {
            "met": max(same) <= LOSS_TOLERANCE, "largest_difference": max(same), "limit": LOSS_TOLERANCE,
        },
        "time_added_at_pp1_within_added_flops": _time_goal(single, 1.0),
        "time_added_at_pp2_below_half_of_added_flops": _time_goal(double, 0.5),
        "extra_memory_within_one_chunk_and_one_weight_gradient": {
            "met": _all_met(memory_checks), "checks": memory_checks,
        },
    }  # fmt: skip


def _time_goal(comparisons: list[dict[str, Any]], factor: float) -> dict[str, Any]:
    checks = [
        {
            **{key: one[key] for key in ("vocab_size", "num_exits", "num_microbatches")},
            "added_time_share": one["added_time_share"],
            "limit": factor * one["added_flops_share"],
            "met": one["added_time_share"] <= factor * one["added_flops_share"],
        }
        for one in comparisons
    ]
    return {"met": _all_met(checks), "checks": checks}


def _all_met(checks: list[dict[str, Any]]) -> bool | None:
    return all(check["met"] for check in checks) if checks else None


# --- Output ---


def mib(num_bytes: int) -> str:
    return f"{num_bytes / common.MIB:.1f}"


def time_table(comparisons: list[dict[str, Any]]) -> str:
    header = ["PP", "vocabulary", "exits", "FLOPs added", "time added", "time/FLOPs", "naive", "CPU added", "naive CPU",
              "core head"]  # fmt: skip
    keys = ["num_stages", "vocab_size", "num_exits", "added_flops_share", "added_time_share",
            "added_time_over_added_flops", "naive_added_time_share", "added_cpu_time_share",
            "naive_added_cpu_time_share", "core_head_added_time_share"]  # fmt: skip
    return common.format_table(header, [[one[key] for key in keys] for one in comparisons])


def memory_table(rows: list[dict[str, Any]]) -> str:
    header = ["PP", "stage", "vocabulary", "exits here", "sequence", "microbatches", "extra", "bound", "extra/bound",
              "naive extra"]  # fmt: skip
    cells = [
        [
            row["num_stages"], index, row["vocab_size"], stage["num_exits"], row["seq_length"], row["num_microbatches"],
            mib(stage["extra_bytes"]), mib(stage["bound_bytes"]), stage["extra_bytes"] / stage["bound_bytes"],
            mib(stage["naive_extra_bytes"]),
        ]
        for row in rows
        for index, stage in enumerate(row["stages"])
        if stage["num_exits"]
    ]  # fmt: skip
    return common.format_table(header, cells)


def print_report(comparisons: list[dict[str, Any]], memory: list[dict[str, Any]], verdicts: dict[str, Any]) -> None:
    print("\nTime of an iteration over that of plain GPT (0.100: 10% longer), and the FLOPs that the exits add\n")
    print(time_table(comparisons))
    print("\nPeak of tensors over that of plain GPT, per stage with exits (MiB, without parameters and their state)\n")
    print(memory_table(comparisons))
    print("\nThe same over sequence length and microbatches\n")
    print(memory_table(memory))
    print("\nGoals\n")
    rows = [[name.replace("_", " "), goal["met"]] for name, goal in verdicts.items()]
    print(common.format_table(["goal", "met"], rows))
    print(flush=True)


# --- Command line ---


def parse_arguments(arguments: list[str] | None = None) -> tuple[Settings, Path | None, bool]:
    """(settings, where to write the result or None for the default place, whether not to write it at all)"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small model and few rounds: shows that everything runs")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    for name in ("vocab-size", "exits", "pipeline-model-parallel-size", "seq-length"):
        parser.add_argument(f"--{name}", type=int, nargs="+", help="one or more; see Settings")
    for name in ("num-layers", "hidden-size", "num-attention-heads", "micro-batch-size", "num-microbatches",
                 "iterations", "warmup-iterations", "threads-per-rank", "seed"):  # fmt: skip
        parser.add_argument(f"--{name}", type=int)
    for name in ("pre-exit", "use-exit-norm", "use-exit-mlp", "use-exit-block", "untie-exit-output-weights",
                 "untie-embeddings-and-output-weights", "bf16"):  # fmt: skip
        parser.add_argument(f"--{name}", action="store_true", default=None)
    parser.add_argument("--transformer-impl", choices=["local", "transformer_engine"])
    parser.add_argument("--output", type=Path, help="JSON file. Default: benchmarks/results/NAME_MACHINE_DATE.json, "
                        "and none with --quick")  # fmt: skip
    given = vars(parser.parse_args(arguments))
    is_quick, output = given.pop("quick"), given.pop("output")
    if given["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # inherited by the ranks
    if given["device"] == "cuda" and not use_cuda():
        parser.error("--device is cuda, but this process sees no GPU; use --device cpu.")
    given["device"] = "cuda" if use_cuda() else "cpu"
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    settings = replace(
        QUICK if is_quick else Settings(), **{key: value for key, value in given.items() if value is not None}
    )
    if issues := problems(settings):
        parser.error("\n".join(issues))
    return settings, output, output is None and is_quick


def problems(settings: Settings) -> list[str]:
    """What is wrong with the settings, in words."""
    found = []
    if not set(settings.exits) <= {1, 2, 3}:
        found.append(f"--exits is {settings.exits}; choose among 1, 2 and 3.")
    if settings.num_layers < 4 or any(settings.num_layers % size for size in settings.pipeline_model_parallel_size):
        found.append(
            f"--num-layers is {settings.num_layers}; it must be at least 4 and a multiple of every "
            f"--pipeline-model-parallel-size {settings.pipeline_model_parallel_size}."
        )
    if settings.num_attention_heads > 0 and settings.hidden_size % settings.num_attention_heads:
        found.append(
            f"--hidden-size is {settings.hidden_size}; it must be a multiple of --num-attention-heads "
            f"{settings.num_attention_heads}."
        )
    if settings.use_exit_mlp and (settings.pre_exit or settings.use_exit_block):
        found.append("--use-exit-mlp goes neither with --pre-exit nor with --use-exit-block.")
    for name in ("hidden_size", "num_attention_heads", "micro_batch_size", "iterations", "threads_per_rank"):
        if getattr(settings, name) < 1:
            found.append(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must be at least 1.")
    return found


def main() -> int:
    settings, output, is_not_written = parse_arguments()
    machine = common.machine_info()  # with the load before the run
    comparisons, memory, cases = [], [], []
    for num_stages in settings.pipeline_model_parallel_size:
        if settings.device == "cuda" and num_stages > torch.cuda.device_count():
            print(f"PP {num_stages} skipped: it needs as many GPUs, this machine has {torch.cuda.device_count()}.")
            continue
        measured = run_on_ranks(
            num_stages, measure_layout, settings, num_stages, threads_per_rank=settings.threads_per_rank
        )
        cases += measured["cases"]
        comparisons += [
            compare(settings, case, num_exits)
            for case in measured["cases"]
            for num_exits in settings.exits_with(case["vocab_size"])
        ]
        memory += [compare_memory(settings, row) for row in measured["memory"]]
    if not comparisons:
        print("Nothing was measured: no layout fits this machine.", file=sys.stderr)
        return 1
    verdicts = goals(settings, comparisons, memory, machine["cpu_cores"])
    print_report(comparisons, memory, verdicts)
    results = {"comparisons": comparisons, "memory": memory, "raw": cases}
    document = common.result_document("training_overhead", machine, asdict(settings), settings.seed, results, verdicts)
    common.finish(document, output, is_written=not is_not_written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
