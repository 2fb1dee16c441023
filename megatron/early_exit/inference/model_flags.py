"""Flags that say what to load and how, for all programs that generate. Imports neither torch nor core."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from megatron.early_exit.inference import checked
from megatron.early_exit.platform.program_flags import Spelling, add_group
from megatron.early_exit.platform.world import check_num_ranks


def _quantize(text: str) -> str:
    try:
        return checked.quantize(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """model"""

    load: Annotated[str, "DIR"]
    """folder of checkpoints (--save of the training)"""

    load_iteration: int | None = None
    """checkpoint to load; default: the last one"""

    tensor_model_parallel_size: Annotated[int, "N"] = 1
    """worker processes that share the weights of each stage; over several machines start the program with torchrun"""

    pipeline_model_parallel_size: Annotated[int, "N"] = 1
    """stages of worker processes, each with some of the layers"""

    pipeline_layers: Annotated[tuple[int, ...], "N"] | None = None
    """layers of each stage; default: as many on each, as far as that comes out even"""

    fill_min_rows: Annotated[int, "N"] | None = None
    """rows of a request that must have exited on a stage before they go on to the next ones; default 1, or 8 on a CPU
    with more workers than cores"""

    worker_timeout: Annotated[float, "SECONDS"] = 60.0
    """without progress for so long, worker processes count as dead; default 60"""

    dtype: Literal["fp32", "bf16"] | None = None
    """default: that of the training"""

    quantize: Annotated[str, "all", Spelling(type=_quantize)] | None = None
    """all linear layers in int8 (on a CPU)"""

    shortlist: bool | None = None
    """evaluate exits with frequent tokens first; default: if the checkpoint is calibrated"""

    certified_head: Literal["auto", "on", "off"] = "auto"
    """greedy tokens from output weights in int8, certified to be the exact head's, where no log-probabilities are
    wanted (on a CPU); default auto: where it is faster"""

    max_requests: Annotated[int, "N"] | None = None
    """prompts that run at once; default: at most 16"""

    max_length: Annotated[int, "N"] | None = None
    """longest prompt and answer, whose last token takes no place; default: the model's, at most 4096"""

    kv_cache_gib: Annotated[float, "F"] | None = None
    """memory of each rank for keys and values; default: 90% of what the weights leave free on a GPU; on a CPU 4, or
    half of what is free"""

    no_cuda_graphs: bool = False
    """start every kernel by itself (on one GPU)"""


def add_model_flags(parser: argparse.ArgumentParser, flags: type[ModelFlags] = ModelFlags) -> None:
    """Add these flags, as a group, to a parser that is not made of a class."""
    add_group(parser, flags)


def engine_settings(flags: ModelFlags) -> dict[str, Any]:
    """Arguments of `load_engine` but for the path, by name."""
    return {
        "iteration": flags.load_iteration,
        "tensor_parallel_size": flags.tensor_model_parallel_size,
        "pipeline_parallel_size": flags.pipeline_model_parallel_size,
        "pipeline_layers": flags.pipeline_layers,
        "fill_min_rows": flags.fill_min_rows,
        "dtype": flags.dtype,
        "max_requests": flags.max_requests,
        "max_length": flags.max_length,
        "kv_cache_gib": flags.kv_cache_gib,
        "quantize": flags.quantize,
        "shortlist": flags.shortlist,
        "certified_head": flags.certified_head,
        "cuda_graphs": not flags.no_cuda_graphs,
    }


def check_torchrun(flags: ModelFlags) -> None:
    """Raise ValueError unless as many processes were started as the flags ask for, or one."""
    check_num_ranks({
        "--tensor-model-parallel-size": flags.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": flags.pipeline_model_parallel_size,
    })  # fmt: skip
