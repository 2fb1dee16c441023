"""A torchrun job with fake workers, for tests of executors: python torchrun_engine.py CODE STAGES RANKS.
RANKS: of each stage. CODE finds `executor`, and `answer` and `step` of `test_executor.py`."""

from __future__ import annotations

import os
import sys

from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.executor.distributed import join_torchrun
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.executor.messages import WorkerFactory
from megatron.early_exit.inference.executor.worker_process import serve_torchrun_rank
from tests.distributed.test_executor import FACTORY, QUICK, answer, pids_of, step


def main() -> int:
    # One write for each line: with PYTHONUNBUFFERED, print() makes two, and the other rank's may come between.
    sys.stdout.write(f"rank {os.environ['RANK']} is {os.getpid()}\n")
    sys.stdout.flush()
    if os.environ["RANK"] != "0":
        return serve_torchrun_rank()
    num_stages, size = map(int, sys.argv[2:])
    arguments = {"uses_collectives": size > 1, "num_stages": num_stages}
    try:
        executor = join_torchrun(WorkerFactory(FACTORY, arguments), Layout(size, num_stages), QUICK)
    except OSError as error:
        print(f"error: {error}", flush=True)
        return 1
    sys.stdout.write(f"worker is {' '.join(map(str, pids_of(executor)))}\n")
    sys.stdout.flush()
    try:
        exec(sys.argv[1], {"executor": executor, "answer": answer, "step": step})
    except ExecutorError as error:
        print(f"error: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
