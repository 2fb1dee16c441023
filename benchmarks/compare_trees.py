"""Whether decoding became slower from one commit to another: two source trees, timed in turn.

    git worktree add ../old COMMIT
    python -m benchmarks.compare_trees --old ../old --new . --demo runs/demo

One process for each tree holds the same checkpoint; every pair of runs decodes the same prompts in both, and the order
within a pair alternates. For each mode the geometric mean of the ratios of times (new to old) with its 95% interval
over pairs; a mode passes if the interval excludes that the new tree takes 5% longer. Both processes start anew several
times on the way, as a process may be slower by a few per cent for as long as it lives (where its memory lies, for
instance). `--old` and `--new` may be the same tree: then every interval should hold 1, but for one in twenty.

Models: `tiny` (two layers of 16 channels: a step of it is Python, nearly all of it, and its time per step is shown),
`demo` (the one of `make demo`), `smollm2` (SmolLM2-135M with an untrained exit; 93 MB from PyPI, once). CPU, one
thread. The same costs of layers and heads, those measured in the old tree, plan exits and drafts in both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.trees import checkpoints
from benchmarks.trees.checkpoints import Model

LIMIT = 1.05
"""A mode must not take longer by this factor."""
PROMPT_TOKENS = 24
CLOCKS = ("wall", "cpu")


class Tree:
    """A process that runs the engine of one source tree. Use as a context manager."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root.resolve()
        engine = self.root / "megatron/early_exit/inference"
        if not engine.is_dir():
            raise ValueError(f"--{name} {root} is not a source tree: it has no megatron/early_exit/inference")
        self.adapter = "with_workers" if (engine / "worker/worker.py").is_file() else "before_workers"

    def __enter__(self) -> Tree:
        program = Path(__file__).parent / "trees/process.py"
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONWARNINGS": "ignore", "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, program, self.adapter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=self.root, env=environment,
        )  # fmt: skip
        try:
            files = self("about")["files"]
            if files is None or not Path(files).is_relative_to(self.root):
                raise RuntimeError(f"the process of {self.root} runs {files}, which is not of that tree")
        except RuntimeError:
            self.__exit__()
            raise
        return self

    def __call__(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Raises RuntimeError if the process has ended; it has said why on standard error."""
        try:
            print(json.dumps({"command": command, **arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            line = ""
        else:
            line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the {self.name} tree ended in {command!r}")
        return json.loads(line)

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def describe(self) -> dict[str, Any]:
        return {"commit": common.commit(self.root), "adapter": self.adapter}


@dataclass
class Case:
    """One mode of one model, with what was measured of it in both trees."""

    mode: str
    batch: int
    params: dict[str, Any]
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"old": [], "new": []})

    @property
    def name(self) -> str:
        return f"{self.mode}, batch {self.batch}"

    def row(self) -> dict[str, Any]:
        old, new = self.runs["old"], self.runs["new"]
        seconds = lambda runs, clock: [run[clock] for run in runs]
        raw = {name: {clock: seconds(runs, clock) for clock in CLOCKS} for name, runs in self.runs.items()}
        steps = lambda runs: common.median([run["steps"] for run in runs])
        per_step = lambda runs: 1e6 * common.median([run["cpu"] / run["steps"] for run in runs])
        return {
            "mode": self.mode,
            "batch": self.batch,
            "pairs": len(old),
            **{clock: common.mean_ratio(seconds(new, clock), seconds(old, clock)) for clock in CLOCKS},
            "steps": [steps(old), steps(new)],
            "step_microseconds": [per_step(old), per_step(new)],
            "same_tokens": old[-1]["ids"] == new[-1]["ids"],
            "layer_runs": [old[-1]["layer_runs"], new[-1]["layer_runs"]],
            "exit_layers": [old[-1]["exit_layers"], new[-1]["exit_layers"]],
            "raw_seconds": raw,
        }


def make_cases(model: Model, batches: list[int]) -> list[Case]:
    base = {"max_tokens": model.num_tokens, "ignore_eod": True}
    exits = {"mode": "early_exit", "exit_thresholds": [model.threshold]}
    modes = {
        "full": {},
        "full, sampled": {"sampling": {"temperature": 1.0, "top_p": 0.9}},
        "early_exit": exits,
        "early_exit, planned": {**exits, "plan_exits": True},
        "self_speculative": {"mode": "self_speculative"},
    }
    return [Case(mode, batch, {**base, **settings}) for mode, settings in modes.items() for batch in batches]


def measure(trees: list[Tree], model: Model, batches: list[int], pairs: int, launches: int) -> list[dict[str, Any]]:
    """One row for each mode and batch size: `pairs` of runs in each of so many launches."""
    cases = make_cases(model, batches)
    with trees[0]:
        costs = load(trees[0], model, None)
    for launch in range(launches):
        print(f"{model.name}: launch {launch + 1} of {launches}", file=sys.stderr, flush=True)
        with ExitStack() as stack:
            for tree in in_turn(trees, launch):
                load(stack.enter_context(tree), model, costs)
            ids = trees[0]("encode", text=Path(__file__).with_name("README.md").read_text()[:8000])["ids"]
            measure_launch(trees, cases, ids, pairs)
    return [case.row() for case in cases]


def measure_launch(trees: list[Tree], cases: list[Case], ids: list[int], pairs: int) -> None:
    """All cases take turns, after a first round that warms up. Every run has other prompts: what a tree remembers of
    earlier ones is of no use."""
    starts = itertools.count(step=PROMPT_TOKENS // 2)
    for turn in range(pairs + 1):
        for case in cases:
            starts_now = [next(starts) % (len(ids) - PROMPT_TOKENS) for _ in range(case.batch)]
            prompts = [ids[start : start + PROMPT_TOKENS] for start in starts_now]
            for tree in in_turn(trees, turn):
                run = tree("decode", prompts=prompts, params=case.params)
                if turn > 0:
                    case.runs[tree.name].append(run)


def in_turn(trees: list[Tree], turn: int) -> list[Tree]:
    return trees if turn % 2 else trees[::-1]


def load(tree: Tree, model: Model, costs: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the costs that the tree plans with: the given ones, or those that it measures."""
    return tree(
        "load", folder=str(model.folder), num_slots=16, num_positions=model.num_positions, costs=costs
    )["costs"]  # fmt: skip


def measure_prefill(trees: list[Tree], model: Model) -> list[dict[str, Any]]:
    """Steps until a prompt of 2,000 tokens has its first token."""
    rows = [{"prompt": "alone"}, {"prompt": "with a prompt of 300 tokens every step"}]
    for tree in trees:
        with tree:
            load(tree, model, None)
            for row, arriving in zip(rows, (None, 300), strict=True):
                row[tree.name] = tree("prefill_steps", length=2000, arriving=arriving, limit=1000)["steps"]
    return rows


def goals(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By the processor's seconds, as other programs may take turns with these; both are reported."""
    verdicts = {}
    for name, rows in results.items():
        if name == "prefill":
            alone, traffic = rows
            verdicts["a long prompt in traffic takes at most twice its steps alone"] = {
                "met": traffic["new"] <= 2 * alone["new"], "steps": [alone["new"], traffic["new"]]
            }  # fmt: skip
            continue
        checks = [
            {"mode": row["mode"], "batch": row["batch"], "met": row["cpu"]["high"] < LIMIT, "high": row["cpu"]["high"],
             "wall_high": row["wall"]["high"]}
            for row in rows
        ]  # fmt: skip
        verdicts[f"{name}: excludes a loss of 5%"] = {"met": all(check["met"] for check in checks), "checks": checks}
    return verdicts


def print_report(results: dict[str, list[dict[str, Any]]], verdicts: dict[str, Any]) -> None:
    between = lambda interval: f"{interval['ratio']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
    shown = lambda pair: f"{pair[0]:g} / {pair[1]:g}"
    for name, rows in results.items():
        print(f"\n{name}\n")
        if name == "prefill":
            print(common.format_table(["steps to the first token", "old", "new"], [list(row.values()) for row in rows]))
            continue
        header = ["new / old", "wall", "cpu", "loss of 5% excluded", "us a step", "steps", "layer runs", "same tokens"]
        print(common.format_table(header, [
            [f"{row['mode']}, batch {row['batch']}", between(row["wall"]), between(row["cpu"]),
             row["cpu"]["high"] < LIMIT, " / ".join(f"{value:.0f}" for value in row["step_microseconds"]),
             shown(row["steps"]), shown(row["layer_runs"]), row["same_tokens"]]
            for row in rows
        ]))  # fmt: skip
    print("\nGoals\n\n" + common.goals_table(verdicts))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, metavar="DIR", help="source tree to compare with")
    parser.add_argument("--new", type=Path, default=common.ROOT, metavar="DIR", help="default: this one")
    parser.add_argument("--models", nargs="+", choices=("tiny", "demo", "smollm2"), default=["tiny", "demo", "smollm2"])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder of `make demo`")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="for everything that is made")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="N", help="up to 16")
    parser.add_argument("--pairs", type=int, default=8, help="of runs of each mode in each launch; default 8")
    parser.add_argument("--launches", type=int, default=4, help="of the two processes, for each model; default 4")
    parser.add_argument("--output", type=Path)
    settings = parser.parse_args(argv)
    if min(settings.pairs, settings.launches) < 1 or settings.pairs * settings.launches < 2:
        parser.error("--pairs and --launches must be positive, and give at least 2 pairs")
    if not all(1 <= batch <= 16 for batch in settings.batches):
        parser.error("--batches must lie between 1 and 16")
    machine = common.machine_info()
    folder = settings.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], Model]] = {
        "tiny": lambda: checkpoints.tiny(settings.old.resolve(), folder),
        "demo": lambda: checkpoints.demo(settings.old.resolve(), settings.demo.resolve()),
        "smollm2": lambda: checkpoints.smollm2(settings.old.resolve(), folder),
    }
    try:
        trees = [Tree("old", settings.old), Tree("new", settings.new)]
        models = [makers[name]() for name in settings.models]
    except (ValueError, subprocess.CalledProcessError) as error:
        parser.error(str(error))
    results: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        results[model.name] = measure(trees, model, settings.batches, settings.pairs, settings.launches)
        if model.name == "tiny":
            results["prefill"] = measure_prefill(trees, model)
    verdicts = goals(results)
    print_report(results, verdicts)
    described = {
        "models": [{**asdict(model), "folder": model.folder.name, "threshold": model.threshold} for model in models],
        "trees": {tree.name: tree.describe() for tree in trees},
        "batches": settings.batches,
        "pairs": settings.pairs,
        "launches": settings.launches,
        "order": "alternates from pair to pair",
        "device": "cpu",
        "threads": 1,
    }
    document = common.result_document("compare_trees", machine, described, 0, results, verdicts)
    common.finish(document, settings.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
