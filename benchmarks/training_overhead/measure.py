"""Runs on the ranks of one layout: builds all variants, and measures their memory, losses and times."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.batches import Batch, random_batches
from benchmarks.ranks import gather, timed
from benchmarks.rounds import in_turn, progress
from benchmarks.timing import peak_bytes
from benchmarks.training_overhead.settings import Settings, Variant, run_config, variants
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.platform.device import use_cuda


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


def chunk_tokens(vocab_size: int, batches: list[Batch]) -> int:
    """Tokens of the largest chunk that the cross-entropy makes of one microbatch."""
    from megatron.early_exit.model.cross_entropy import chunk_size

    return min(chunk_size(vocab_size, is_gpu=use_cuda()), batches[0].tokens.numel())


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
    steps = {one.variant.name: functools.partial(timed, one.train_step, batches) for one in built}
    for name, mine in in_turn(steps, settings.iterations, settings.warmup_iterations).items():
        ranks = gather(mine)
        measured[name]["wall_sec"] = [max(rank[0] for rank in step) for step in zip(*ranks, strict=True)]
        measured[name]["cpu_sec"] = [sum(rank[1] for rank in step) for step in zip(*ranks, strict=True)]
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
