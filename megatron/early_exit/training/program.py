"""The program behind `pretrain_early_exit_gpt.py`: one rank from its flags to its exit status."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from megatron.early_exit.config.checkpoint_files import read_latest
from megatron.early_exit.config.flags import parse_run_config
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.validate import check_outputs
from megatron.early_exit.platform.command_line import STATUS_INTERRUPTED, output_is_closed, run_program
from megatron.early_exit.platform.failures import in_words, lost_loader, lost_peer
from megatron.early_exit.platform.processes import die_with_torchrun
from megatron.early_exit.training.plans import check_plan

# More than ranks that start together on a busy host lag behind each other.
SECONDS_FOR_RANK_0 = 15


def main() -> int:
    """Exit status: 0 done, 1 failed while running, 2 refused settings, 130 interrupted by Ctrl-C."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    die_with_torchrun()
    try:
        config = parse_run_config(sys.argv[1:], world_size=world_size)
        if rank == 0 and not config.training.dry_run:
            check_outputs(config)
        if config.pipeline.is_planned:
            check_plan(config, world_size)
    except (ValueError, OSError) as error:
        let_rank_zero_report_first(rank)
        print(message(rank, in_words(error)), file=sys.stderr, flush=True)
        return 2

    if config.training.dry_run:
        return dry_run(config, world_size) if rank == 0 else 0

    try:
        train(config, rank)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends a second one
        if rank == 0:
            print(f"interrupted; {last_checkpoint(config)}", file=sys.stderr, flush=True)
        abort(STATUS_INTERRUPTED)
    return 0


def dry_run(config: RunConfig, world_size: int) -> int:
    """Print what the run would be, or why it could not start; returns the exit status."""
    from megatron.early_exit.training.dry_run import describe

    try:
        text = describe(config, world_size)
    except (ValueError, OSError) as error:
        print(message(0, in_words(error)), file=sys.stderr, flush=True)
        return 2
    print(text, flush=True)
    return 0


def train(config: RunConfig, rank: int) -> None:
    """Train, or say why not and end this process."""
    try:
        from megatron.early_exit.training.pretrain import pretrain

        pretrain(config, is_checked=True)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        let_rank_zero_report_first(rank)
        text = in_words(error)
        if rank == 0 and isinstance(error, OSError) and output_is_closed():
            text = f"standard output is closed; {last_checkpoint(config)}"
        print(message(rank, text), file=sys.stderr, flush=True)
        abort()
    except Exception as error:
        if ended := lost_loader(error):
            print(message(rank, ended), file=sys.stderr, flush=True)
            abort()
        found = lost_peer(error, rank, config.parallel.distributed_timeout_minutes)
        text = f"error: {found}\n" if found else f"rank {rank} failed:\n"
        print(text + traceback.format_exc(), file=sys.stderr, flush=True)
        abort()


def last_checkpoint(config: RunConfig) -> str:
    """What a run that ends before its time can be resumed from, in words."""
    folder = config.checkpoint.save
    try:
        iteration = read_latest(Path(folder)) if folder else None
    except OSError:
        iteration = None
    return f"last checkpoint: iteration {iteration} in {folder}" if iteration else "no checkpoint was saved"


def let_rank_zero_report_first(rank: int) -> None:
    """Let one rank say what all ranks find.

    What the user can mend is mostly found by all ranks alike. Rank 0 says it and ends, upon which torchrun ends the
    others while they wait here; had they ended first, torchrun would have ended rank 0 before its word. An error of one
    rank alone comes out after the wait.
    """
    if rank > 0:
        time.sleep(SECONDS_FOR_RANK_0)


def message(rank: int, text: str) -> str:
    return f"error: {text}" if rank == 0 else f"error on rank {rank}: {text}"


def abort(status: int = 1) -> NoReturn:
    """Exit without waiting for other ranks, which lets torchrun end them; leave no process of our own behind."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


def run() -> int:
    """The whole program."""
    return run_program(main)
