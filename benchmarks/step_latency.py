"""What it costs to carry a step to workers in other processes and its outputs back, without any computation.

    python -m benchmarks.step_latency

A worker that echoes tokens, called in this process, and in one or two processes of its own. The numbers are medians
over steps, in microseconds, to stand beside what a step of a model takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import common
from megatron.early_exit.inference.costs import StepCosts
from megatron.early_exit.inference.executor.distributed import start_workers
from megatron.early_exit.inference.executor.layout import Layout
from megatron.early_exit.inference.executor.messages import WorkerFactory
from megatron.early_exit.inference.protocol import (
    FINAL_HEAD,
    DrawnToken,
    ExitThreshold,
    Prediction,
    Rows,
    RowsOutput,
    Step,
    WorkerDescription,
)
from megatron.early_exit.inference.worker.placement import Placement

ROW_COUNTS = (1, 16, 64)


class EchoWorker:
    """Gives every row's token back, with what two evaluated exits would have said."""

    description = WorkerDescription(24, 1024, 50_000, (), 64, 4096)

    def execute(self, step: Step) -> list[RowsOutput]:
        predictions = (Prediction(0, 7, 0.5), Prediction(FINAL_HEAD, 7, 0.9))
        return [
            RowsOutput(
                rows.request_id, rows.slot, rows.generation, rows.epoch, rows.stop,
                tokens=(DrawnToken(rows.tokens[-1], -0.1, 0.9, FINAL_HEAD, predictions),),
            )
            for rows in step.rows
        ]  # fmt: skip

    def measure_costs(self) -> StepCosts:
        raise NotImplementedError


def make_echo(placement: Placement) -> tuple[EchoWorker, str]:
    """A factory for `WorkerFactory`."""
    return EchoWorker(), "none"


def decode_step(number: int, num_rows: int) -> Step:
    """A step in which every request decodes one token and evaluates one exit."""
    thresholds = (ExitThreshold(0, 0.8),)
    rows = (Rows(slot, slot, 1, 0, "decode", number, (slot,), thresholds, number) for slot in range(num_rows))
    return Step(number, (), tuple(rows))


def microseconds(run: Callable[[Step], object], num_rows: int, repetitions: int) -> dict[str, float]:
    """Median and ninth decile of the time of a step."""
    times = []
    for number in range(repetitions):
        step = decode_step(number, num_rows)
        start = time.perf_counter()
        run(step)
        times.append((time.perf_counter() - start) * 1e6)
    return {"median": statistics.median(times), "ninth_decile": statistics.quantiles(times, n=10)[-1]}


def measure(num_processes: int, repetitions: int) -> dict[int, dict[str, float]]:
    """By number of rows. num_processes: 0: the worker is called in this process."""
    if num_processes == 0:
        return {count: microseconds(EchoWorker().execute, count, repetitions) for count in ROW_COUNTS}
    executor = start_workers(WorkerFactory(f"{make_echo.__module__}:make_echo"), Layout(num_processes))

    def run(step: Step) -> None:
        executor.submit(step)
        assert len(executor.poll(10)) == len(step.rows)

    try:
        microseconds(run, 1, 50)  # warm up
        return {count: microseconds(run, count, repetitions) for count in ROW_COUNTS}
    finally:
        executor.close()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=2000, metavar="N", help="steps of each kind; default 2000")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: a file in benchmarks/results")
    args = parser.parse_args(argv)
    machine = common.machine_info()
    results = {num_processes: measure(num_processes, args.repetitions) for num_processes in (0, 1, 2)}
    print("microseconds a step, median (ninth decile), by rows of the step")
    for num_processes, by_rows in results.items():
        name = f"{num_processes} worker processes" if num_processes else "in this process"
        cells = (f"{rows}: {one['median']:.0f} ({one['ninth_decile']:.0f})" for rows, one in by_rows.items())
        print(f"{name:20}", "   ".join(cells))
    settings = {"repetitions": args.repetitions, "row_counts": list(ROW_COUNTS)}
    document = common.result_document("step_latency", machine, settings, 0, {"microseconds": results}, {})
    common.finish(document, args.output)


if __name__ == "__main__":
    from benchmarks.step_latency import main  # workers import this module by its name

    main()
