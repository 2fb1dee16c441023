"""Training runs that are killed, for `test_killed_runs.py`: one program that imports core once and forks each run.

python -m tests.integration.killed_runs FOLDER KIND      (prints one JSON object)
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.settings import with_tuned_stages
from tests.configs import VOCAB_SIZE, make_training_config
from tests.data_files import write_token_files
from tests.distributed.training_runs import training_run

SECONDS_FOR_ORPHANS = 5
TRACKER = "latest_checkpointed_iteration.tmp"
KINDS = {
    "synchronous": {},
    "asynchronous": {"async_save": True, "num_workers": 2},
    "tuning": {"tune_exit": True, "use_exit_mlp": True, "untie_embeddings_and_output_weights": True},
}


@dataclass(frozen=True)
class Kill:
    """When a run ends itself: with SIGKILL, or with the signal of a timer, which nothing handles either."""

    rename: str | None = None
    """Before this file or folder in the folder of its checkpoints gets another name."""
    removal: str | None = None
    """Before this folder in it is removed."""
    nth: int = 1
    """The how-manieth time that it is about to do that."""
    seconds: float | None = None
    """After its start."""


# Every point between the steps by which a checkpoint gets its name, for the first one, a later one, and one that
# replaces another (a run that was killed before it made its checkpoint the latest comes there again); and while the
# next run clears up.
AT_RENAMES = [
    Kill(rename="iter_0000002.partial"),
    Kill(rename=TRACKER),
    Kill(rename="iter_0000004.partial"),
    Kill(rename=TRACKER),
    Kill(rename="iter_0000004"),
    Kill(rename="iter_0000004.partial"),
    Kill(rename="iter_0000004.replaced"),
    Kill(rename=TRACKER),
    Kill(removal="iter_0000004.replaced"),
    Kill(removal="iter_0000004.replaced", nth=2),
]


def main(folder: Path, kind: str) -> None:
    data = write_token_files(folder, VOCAB_SIZE)
    start = {}
    if kind == "tuning":
        settings = {**KINDS[kind], "tune_exit": False, "save": str(folder / "base"), "train_iters": 1}
        _run(make_training_config(data, folder / "base", **settings))
        start = {"pretrained_checkpoint": str(folder / "base")}

    def config(name: str) -> RunConfig:
        path = folder / name
        checkpoints = {"save": str(path / "ck"), "load": str(path / "ck"), "save_interval": 2, **start}
        return make_training_config(data, path, train_iters=8, lr_decay_iters=8, hidden_dropout=0.1, **checkpoints,
                                    **KINDS[kind])  # fmt: skip

    started = time.monotonic()
    whole = _run(config("whole"))
    seconds = time.monotonic() - started
    moments = sorted(random.Random(kind).uniform(0.15, 0.7) * seconds for _ in range(3))
    lives = {"renames": AT_RENAMES, "moments": [Kill(seconds=moment) for moment in moments]}
    result: dict[str, Any] = {"orphans": whole["orphans"], "lives": {}}
    expected = _records(folder / "whole")
    for name, kills in lives.items():
        killed = []
        for kill in kills:
            outcome = _run(config(name), kill)
            killed.append(outcome["killed"])
            result["orphans"] += outcome["orphans"]
        last = _run(config(name))
        seen = _records(folder / name)
        result["lives"][name] = {
            "killed": killed,
            "same_parameters": last["digest"] == whole["digest"],
            "other_iterations": [n for n, records in seen.items() if any(r != expected[n][0] for r in records)],
            "iterations": sorted(seen),
            "left": sorted(path.name for path in (folder / name / "ck").iterdir() if not path.name.startswith("iter")),
            "checkpoints": sorted(path.name for path in (folder / name / "ck").glob("iter_*")),
        }
    print(json.dumps(result))


def _records(folder: Path) -> dict[int, list[dict]]:
    """What every run logged of each iteration, without what depends on the machine. A killed run may tear its line."""
    records: dict[int, list[dict]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        kept = {key: value for key, value in record.items() if "loss" in key or key in ("grad_norm", "learning_rate")}
        records.setdefault(record["iteration"], []).append(kept)
    return records


def _run(config: RunConfig, kill: Kill | None = None) -> dict[str, Any]:
    """A run in a session of its own. Returns whether it was killed, its parameters, and what outlives it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _train(config, kill, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        digest = pipe.read()  # processes that outlive it would keep this open, as they do with `| tee log`
    _, status = os.waitpid(child, 0)
    is_killed = os.WIFSIGNALED(status)
    if not is_killed and os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"a run failed: {digest}")
    deadline = time.monotonic() + SECONDS_FOR_ORPHANS
    while (orphans := in_session(child)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return {"killed": is_killed, "digest": digest, "orphans": orphans}


def _train(config: RunConfig, kill: Kill | None, writer: int) -> None:
    os.setsid()
    status = 0
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if kill is not None:
            _arrange(kill, Path(config.checkpoint.save))
        _initialize()
        text = training_run(with_tuned_stages(config) if config.training.tune_exit else config)
    except BaseException:
        text, status = traceback.format_exc(), 1
    os.write(writer, text.encode())
    os._exit(status)


def _initialize() -> None:
    import torch

    from megatron.early_exit.platform.distributed import initialize_distributed

    os.environ.pop("RANK", None)
    initialize_distributed()
    assert torch.distributed.get_world_size() == 1


def _arrange(kill: Kill, save: Path) -> None:
    if kill.seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, kill.seconds)
    wanted = {"os.rename": kill.rename, "shutil.rmtree": kill.removal}
    times = 0

    def look(event: str, arguments: tuple) -> None:
        nonlocal times
        if wanted.get(event) is not None and Path(os.fspath(arguments[0])) == save / wanted[event]:
            times += 1
            if times == kill.nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def in_session(session: int) -> list[str]:
    """Processes of a session that still run, by what they are."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of_session = (path / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            if int(of_session) == session and state != "Z":
                found.append((path / "cmdline").read_text().replace("\0", " ").strip())
        except OSError:
            continue
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
