"""Flags that say what to load and how, for all programs that generate. Imports neither torch nor core."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.early_exit.inference import checked
from megatron.early_exit.platform.world import check_num_ranks


def add_model_flags(
    parser: argparse.ArgumentParser, load: str = "folder of checkpoints (--save of the training)"
) -> None:
    """Add the group of flags that `engine_settings` reads. load: what --load names."""
    model = parser.add_argument_group("model")
    model.add_argument("--load", required=True, metavar="DIR", help=load)
    model.add_argument("--load-iteration", type=int, help="checkpoint to load; default: the last one")
    model.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, metavar="N",
        help="worker processes that share the weights of each stage; over several machines start the program with "
        "torchrun",
    )  # fmt: skip
    model.add_argument(
        "--pipeline-model-parallel-size", type=int, default=1, metavar="N",
        help="stages of worker processes, each with some of the layers",
    )  # fmt: skip
    model.add_argument(
        "--pipeline-layers", type=int, nargs="+", metavar="N",
        help="layers of each stage; default: as many on each, as far as that comes out even",
    )  # fmt: skip
    model.add_argument(
        "--fill-min-rows", type=int, metavar="N",
        help="rows of a request that must have exited on a stage before they go on to the next ones; default 1, or 8 "
        "on a CPU with more workers than cores",
    )  # fmt: skip
    model.add_argument(
        "--worker-timeout", type=float, default=60.0, metavar="SECONDS",
        help="without progress for so long, worker processes count as dead; default 60",
    )  # fmt: skip
    model.add_argument("--dtype", choices=("fp32", "bf16"), help="default: that of the training")
    model.add_argument("--quantize", type=_quantize, metavar="all", help="all linear layers in int8 (on a CPU)")
    model.add_argument(
        "--shortlist", action=argparse.BooleanOptionalAction,
        help="evaluate exits with frequent tokens first; default: if the checkpoint is calibrated",
    )  # fmt: skip
    model.add_argument(
        "--certified-head", choices=("auto", "on", "off"), default="auto",
        help="greedy tokens from output weights in int8, certified to be the exact head's, where no log-probabilities "
        "are wanted (on a CPU); default auto: where it is faster",
    )  # fmt: skip
    model.add_argument("--max-requests", type=int, metavar="N", help="prompts that run at once; default: at most 16")
    model.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="longest prompt and answer, whose last token takes no place; default: the model's, at most 4096",
    )
    model.add_argument(
        "--kv-cache-gib", type=float, metavar="F",
        help="memory of each rank for keys and values; default: 90%% of what the weights leave free on a GPU; on a "
        "CPU 4, or half of what is free",
    )  # fmt: skip
    model.add_argument("--no-cuda-graphs", action="store_true", help="start every kernel by itself (on one GPU)")


def _quantize(text: str) -> str:
    try:
        return checked.quantize(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load_engine` but for the path, by name."""
    return {
        "iteration": args.load_iteration,
        "tensor_parallel_size": args.tensor_model_parallel_size,
        "pipeline_parallel_size": args.pipeline_model_parallel_size,
        "pipeline_layers": args.pipeline_layers,
        "fill_min_rows": args.fill_min_rows,
        "dtype": args.dtype,
        "max_requests": args.max_requests,
        "max_length": args.max_length,
        "kv_cache_gib": args.kv_cache_gib,
        "quantize": args.quantize,
        "shortlist": args.shortlist,
        "certified_head": args.certified_head,
        "cuda_graphs": not args.no_cuda_graphs,
    }


def check_torchrun(args: argparse.Namespace) -> None:
    """Raise ValueError unless as many processes were started as the flags ask for, or one."""
    check_num_ranks({
        "--tensor-model-parallel-size": args.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size,
    })  # fmt: skip
