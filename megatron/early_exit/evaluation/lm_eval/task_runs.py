"""Runs of lm-eval's tasks: each task in each mode, on one loaded model; what is finished is kept.

`lm_eval.evaluate` does the work. (`simple_evaluate` asks the machine for its environment each time, which takes longer
than small tasks.)"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.early_exit.evaluation.documents import write_document
from megatron.early_exit.evaluation.lm_eval.offline_tasks import TASKS_FOLDER, offline_tasks
from megatron.early_exit.evaluation.statistics.intervals import Interval, bootstrap, mcnemar, paired_bootstrap

Run = dict[str, Any]
"""Of one task in one mode: n, metrics, per_prompt, documents (a hash of the questions)."""

_STDERR_RESAMPLES = 1000
_TARGET_CHARACTERS = 200
_SLOW_RESAMPLES = 2000
"""Of a metric that is no mean: lm-eval aggregates it in Python."""


@dataclass(frozen=True)
class TaskSettings:
    """The same for all tasks and modes of a command."""

    limit: int | None = None
    """Questions of each task, the first ones; None: all."""
    num_fewshot: int | None = None
    """Examples before each question; None: what the task says."""
    answer_tokens: int | None = None
    """Longest answer; None: what the task says."""
    chat: bool = False
    """Whether questions are turns of a chat."""
    seed: int = 1234
    """Of examples that are drawn, and of the intervals."""
    allows_code: bool = False


class Tasks:
    """lm-eval's tasks: the offline ones, and those of a folder of the user's."""

    def __init__(self, include_path: Path | None, data_folder: Path | None) -> None:
        """Raises ModuleNotFoundError if lm-eval is not installed."""
        from lm_eval.tasks import TaskManager

        paths = [TASKS_FOLDER, *([include_path] if include_path else [])]
        metadata = {"data_folder": str(data_folder)} if data_folder else {}
        # lm-eval's own thousands of tasks come from the network, and take half a minute to find.
        self._manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
        self.own = sorted(set(self._manager.all_tasks) - set(offline_tasks()))
        """Names of those in the user's folder."""
        self._loaded: dict[str, Any] = {}
        self.digests: dict[str, str] = {}
        """Of how each loaded task asks and measures, by its file."""

    def load(self, name: str) -> dict[str, Any]:
        """What `evaluate` takes, with the one task `name`. Raises ValueError if its questions cannot be read."""
        if name not in self._loaded:
            self._loaded[name] = self._manager.load([name])
            if list(self._loaded[name]["tasks"]) != [name]:
                raise ValueError(f"{name} is a group of tasks; name them one by one")
            self.digests[name] = _digest(json.dumps(self.task(name).dump_config(), sort_keys=True, default=str))
        loaded: dict[str, Any] = self._loaded[name]
        return loaded

    def task(self, name: str) -> Any:
        return self.load(name)["tasks"][name]

    def generation_arguments(self, name: str, settings: TaskSettings) -> dict[str, Any] | None:
        """How the task asks for answers; None: it compares likelihoods."""
        if self.uses_likelihoods(name):
            return None
        longest = {} if settings.answer_tokens is None else {"max_gen_toks": settings.answer_tokens}
        return {**self.task(name).get_config("generation_kwargs"), **longest}

    def uses_likelihoods(self, name: str) -> bool:
        """Whether answers are compared by their likelihoods, rather than generated."""
        return bool(self.task(name).OUTPUT_TYPE != "generate_until")

    def main_metric(self, name: str, run: Run) -> str:
        """The metric that modes are compared by: what the task says, or its first."""
        offline = offline_tasks()
        return offline[name].metric if name in offline else next(iter(run["metrics"]))


def evaluate(lm: Any, tasks: Tasks, name: str, settings: TaskSettings) -> Run:
    """One task with one `EarlyExitLM`. Raises ValueError if a request cannot be answered."""
    from lm_eval.evaluator import evaluate as evaluate_tasks

    task = tasks.task(name)
    if settings.num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", settings.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    arguments = tasks.generation_arguments(name, settings)
    if arguments is not None:
        task.set_config("generation_kwargs", arguments)
    task.set_fewshot_seed(settings.seed)  # the same examples in all modes
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    with contextlib.redirect_stdout(sys.stderr):  # what it says of its progress
        found = evaluate_tasks(
            lm,
            tasks.load(name),
            limit=settings.limit,
            bootstrap_iters=_STDERR_RESAMPLES,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
            confirm_run_unsafe_code=settings.allows_code,
        )
    samples = found["samples"][name]
    return {
        "n": found["n-samples"][name]["effective"],
        "num_fewshot": task.get_config("num_fewshot"),
        "metrics": _metrics(found["results"][name]),
        "documents": _digest("".join(one["doc_hash"] for one in samples)),
        "per_prompt": _per_prompt(samples),
    }


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """By "metric,filter"."""
    metrics = {}
    for key, value in results.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = results.get(f"{metric}_stderr,{chosen}")
            metrics[key] = {"value": _number(value), "stderr": _number(stderr)}
    return metrics


def _number(value: Any) -> float | None:
    """lm-eval writes N/A for what is unknown."""
    return float(value) if isinstance(value, int | float | np.number) and np.isfinite(value) else None


def _per_prompt(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was answered and how it was scored, once for each question; lm-eval has it once for each filter."""
    prompts: dict[int, dict[str, Any]] = {}
    for one in samples:
        prompt = prompts.setdefault(one["doc_id"], {
            "question": one["doc_id"], "hash": one["prompt_hash"], "target": _begin(_plain(one["target"])),
            "responses": _plain(one["resps"]), "scores": {},
        })  # fmt: skip
        prompt["scores"] |= {f"{metric},{one['filter']}": _plain(one[metric]) for metric in one["metrics"]}
    return [prompts[number] for number in sorted(prompts)]


def _begin(target: Any) -> Any:
    """Not all of a long text: the hash says which question it is."""
    if not isinstance(target, str) or len(target) <= _TARGET_CHARACTERS:
        return target
    return f"{target[:_TARGET_CHARACTERS]}..."


def _plain(value: Any) -> Any:
    """Numbers and texts that JSON has. Responses of one sample lie in lists of one."""
    if isinstance(value, list | tuple):
        return _plain(value[0]) if isinstance(value, list) and len(value) == 1 else [_plain(one) for one in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    return _number(value)


# Two modes beside each other.


def compare(tasks: Tasks, name: str, full: Run, other: Run, settings: TaskSettings) -> dict[str, Any]:
    """How the main metric of a run differs from that of the full model, question by question: mode minus full."""
    metric = tasks.main_metric(name, full)
    pairs = [
        (ours["scores"][metric], theirs["scores"][metric])
        for ours, theirs in zip(other["per_prompt"], full["per_prompt"], strict=True)
    ]
    aggregate = tasks.task(name).aggregation()[metric.partition(",")[0]]
    values = np.asarray(pairs, dtype=float)  # [questions, 2], or with what a value is divided by [questions, 2, 2]
    is_mean = values.ndim == 2 and aggregate.__name__ == "mean"
    interval = _interval(values, aggregate, is_mean, settings.seed)
    is_binary = is_mean and bool(np.isin(values, (0.0, 1.0)).all())
    return {
        "metric": metric,
        "difference": _difference(values, aggregate),
        "interval": None if interval is None else list(interval),
        "mcnemar_p": mcnemar(*_counts(values)) if is_binary else None,
    }


Aggregate = Callable[[list[Any]], float]
"""Of lm-eval: a task's metric of the scores of its questions."""


def _difference(values: np.ndarray, aggregate: Aggregate) -> float:
    ours, theirs = (aggregate(values[:, side].tolist()) for side in (0, 1))
    return float(ours - theirs)


def _interval(values: np.ndarray, aggregate: Aggregate, is_mean: bool, seed: int) -> Interval | None:
    if len(values) < 2:
        return None
    if is_mean:
        return paired_bootstrap(values[:, 0], values[:, 1], seed=seed)
    return bootstrap(values, lambda resampled: _difference(resampled, aggregate), _SLOW_RESAMPLES, seed)


def _counts(values: np.ndarray) -> tuple[int, int]:
    """Questions that the mode alone, and the full model alone, answers rightly."""
    ours, theirs = values[:, 0] == 1, values[:, 1] == 1
    return int((ours & ~theirs).sum()), int((theirs & ~ours).sum())


# What is finished.


class FinishedRuns:
    """Runs of an interrupted command, in a file beside its output: the same command goes on behind them."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """identity: of the model and the settings. Raises ValueError if the file holds runs of others."""
        self._path, self._identity = path, dict(identity)
        self._runs: dict[str, Run] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kept, self._runs = content["identity"], content["runs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no finished runs ({error}); delete it") from None
        differing = [name for name in self._identity if kept.get(name) != self._identity[name]]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{path} holds finished runs with another {name}: {kept.get(name)}, and not {self._identity[name]}. "
                "Delete it to begin anew, or choose another --output"
            )

    def get(self, name: str, mode: str, digest: str) -> Run | None:
        """A run of the task as it is now, in a mode as it is now."""
        return self._runs.get(f"{name} {mode} {digest}")

    def keep(self, name: str, mode: str, digest: str, run: Run) -> None:
        self._runs[f"{name} {mode} {digest}"] = run
        write_document({"identity": self._identity, "runs": self._runs}, self._path)

    def remove(self) -> None:
        """The document holds them now."""
        self._path.unlink(missing_ok=True)


def identity(model: Mapping[str, Any], settings: TaskSettings) -> dict[str, Any]:
    """What runs must have in common. model: of the result document."""
    names = ("fingerprint", "tokenizer", "dtype", "quantize", "max_length")
    return {
        **{name: model[name] for name in names},
        **asdict(settings),
        "lm_eval": importlib.metadata.version("lm-eval"),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
