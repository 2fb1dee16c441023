"""Training on one GPU: time of an iteration and memory, with and without exits, in bf16.

Each case is a model of one shape with one kind of exits. Cases of a shape are built one after the other, since two
models of 1.3B with their optimizer state do not fit beside each other; `time / plain` compares medians.
"""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import common, flops
from benchmarks.batches import random_batches
from benchmarks.gpu.record import Record
from benchmarks.ranks import timed
from benchmarks.timing import peak_bytes
from benchmarks.training_overhead.measure import BuiltVariant
from benchmarks.training_overhead.settings import Settings, Variant
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.platform.device import use_cuda


@dataclass(frozen=True)
class Case:
    """One model."""

    shape: str
    variant: Variant
    transformer_impl: str = "local"
    use_exit_norm: bool = True
    use_exit_mlp: bool = False

    @property
    def name(self) -> str:
        kind = f"{self.variant.name}{'_mlp' if self.use_exit_mlp else ''}"
        return f"{self.shape} {kind}{' TE' if self.transformer_impl == 'transformer_engine' else ''}"


SHAPES = {
    # GPT-3's medium and XL (arXiv:2005.14165, table 2.1), EE-LLM's 1.3B, with a Llama's layers.
    "350M": Settings(num_layers=24, hidden_size=1024, num_attention_heads=16, seq_length=(2048,), micro_batch_size=8),
    "1.3B": Settings(num_layers=24, hidden_size=2048, num_attention_heads=32, seq_length=(2048,), micro_batch_size=4),
}
TOY = Settings(num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=(32,), micro_batch_size=1)
VOCAB_SIZE, TOY_VOCAB_SIZE = 50304, 512
NUM_MICROBATCHES, WARMUP_ITERATIONS, ITERATIONS = 4, 3, 10


def cases() -> list[Case]:
    """Most informative first: what one and two exits cost a 1.3B model, then how plain autograd does."""
    plain, one, two = Variant("plain"), Variant("ee", 1), Variant("ee", 2)
    wanted = [Case("1.3B", plain), Case("1.3B", one), Case("1.3B", two)]
    if importlib.util.find_spec("transformer_engine") is not None:
        wanted += [Case("1.3B", variant, "transformer_engine") for variant in (plain, two)]
    wanted += [Case("1.3B", Variant("naive", 2)), Case("1.3B", Variant("core")), Case("1.3B", two, use_exit_mlp=True)]
    wanted += [Case("350M", variant) for variant in (plain, one, two, Variant("naive", 2))]
    return wanted


def measure(record: Record, is_toy: bool) -> None:
    """Add a row for every case that there is time for."""
    from megatron.early_exit.platform.distributed import (
        destroy_distributed,
        initialize_distributed,
        initialize_model_parallel,
    )

    initialize_distributed()
    initialize_model_parallel(ParallelConfig(), TOY.num_layers if is_toy else 24, TOY.seed)
    for case in cases():
        if record.wants(case.name):
            print(f"{case.name} ...", flush=True)
            record.add(case.name, _measured(case, record, is_toy))
            record.finish(case.name)
    destroy_distributed()


def _measured(case: Case, record: Record, is_toy: bool) -> dict[str, Any]:
    try:
        row = _measure_case(case, is_toy)
    except torch.cuda.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error).splitlines()[0]}"}
    finally:
        gc.collect()
        if use_cuda():
            torch.cuda.empty_cache()
    plain_name = replace(case, variant=Variant("plain"), use_exit_mlp=False).name
    plain = row if case.variant.kind == "plain" else record.rows.get(plain_name)
    if plain is not None and "error" not in plain:
        row["time_over_plain"] = common.ratio(row["iteration_ms"], plain["iteration_ms"])
        row["added_peak_mib"] = row["peak_mib"] - plain["peak_mib"]
    return row


def _measure_case(case: Case, is_toy: bool) -> dict[str, Any]:
    settings = replace(
        TOY if is_toy else SHAPES[case.shape], device="cuda" if use_cuda() else "cpu", bf16=True,
        use_exit_norm=case.use_exit_norm, use_exit_mlp=case.use_exit_mlp, transformer_impl=case.transformer_impl,
    )  # fmt: skip
    vocab_size, seq_length = TOY_VOCAB_SIZE if is_toy else VOCAB_SIZE, settings.seq_length[0]
    built = BuiltVariant(case.variant, settings, 1, vocab_size)
    batches = random_batches(settings.micro_batch_size, vocab_size, seq_length, NUM_MICROBATCHES, settings.seed)
    peak = peak_bytes(built.forward_backward, batches)
    losses = built.mean_losses()
    built.optimizer_step()
    warmup, rounds = (0, 1) if is_toy else (WARMUP_ITERATIONS, ITERATIONS)
    seconds = [timed(built.train_step, batches)[0] for _ in range(warmup + rounds)][warmup:]
    tokens = settings.micro_batch_size * seq_length * NUM_MICROBATCHES
    model, exits = built.config.model, built.config.exits
    per_token = flops.model_flops_per_token(model, vocab_size, seq_length)
    added = flops.added_flops_share(model, exits, vocab_size, seq_length)
    median = common.median(seconds)
    return {
        "iteration_ms": 1e3 * median,
        "tokens_per_second": tokens / median,
        "tflops": per_token * (1 + added) * tokens / median / 1e12,
        "added_flops": added,
        "peak_mib": peak / common.MIB,
        "standing_mib": sum(built.persistent_bytes().values()) / common.MIB,
        "allocated_mib": torch.cuda.memory_allocated() / common.MIB if use_cuda() else None,
        "final_loss": losses[-1],
        "raw_seconds": seconds,
    }
