"""Pre-train a GPT or Llama with early exits.

    torchrun --nproc_per_node 8 pretrain_early_exit_gpt.py --num-layers 24 ... --exit-layer-nums 6 12
    python pretrain_early_exit_gpt.py --config run.yaml          (one process)

All flags: docs/flags.md. Recipes: examples/ee_training/.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
import traceback
from typing import NoReturn

from megatron.early_exit.platform.processes import die_with_torchrun

# More than ranks that start together on a busy host lag behind each other.
SECONDS_FOR_RANK_0 = 15


def main() -> int:
    """Exit status: 0 done, 1 failed while running, 2 refused settings."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    die_with_torchrun()
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="%(levelname)s: %(message)s")
    from megatron.early_exit.config.flags import parse_run_config

    try:
        config = parse_run_config(sys.argv[1:], world_size=world_size)
        if config.pipeline.is_planned:
            from megatron.early_exit.training.plans import check_plan

            check_plan(config, world_size)
    except ValueError as error:
        leave_the_word_to_rank_0(rank)
        print(message(rank, error), file=sys.stderr, flush=True)
        return 2

    if config.training.dry_run:
        if rank == 0:
            from megatron.early_exit.training.dry_run import describe

            print(describe(config, world_size), flush=True)
        return 0

    from megatron.early_exit.training.pretrain import pretrain

    try:
        pretrain(config)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        leave_the_word_to_rank_0(rank)
        print(message(rank, error), file=sys.stderr, flush=True)
        end_at_once()
    except BaseException:
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        end_at_once()
    return 0


def leave_the_word_to_rank_0(rank: int) -> None:
    """Let one rank say what all ranks find.

    What the user can mend is mostly found by all ranks alike. Rank 0 says it and ends, upon which torchrun ends the
    others while they wait here; had they ended first, torchrun would have ended rank 0 before its word. An error of one
    rank alone comes out after the wait.
    """
    if rank > 0:
        time.sleep(SECONDS_FOR_RANK_0)


def message(rank: int, error: Exception) -> str:
    return f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}"


def end_at_once() -> NoReturn:
    """Exit without waiting for other ranks, which lets torchrun end them; leave no process of our own behind."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
