"""SmolLM2-135M under lm-eval's own model `hf`, under `early-exit` in this process, and under `local-completions` over
HTTP: the same likelihoods, answers and scores on the offline tasks.

    python -m benchmarks.lm_eval_parity --load CHECKPOINTS --gguf runs/smollm2 --data-folder DIR --limit 6 --answers 3

CHECKPOINTS: converted from the model in the folder --gguf (`benchmarks/smollm2.py`). All in fp32; `hf` has batches of
one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.serving_processes import serve
from benchmarks.smollm2 import load

GOAL = 1e-4
"""Nats a token."""
OURS, THEIRS, OVER_HTTP = "early-exit", "hf", "local-completions"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="checkpoint of the model")
    parser.add_argument("--gguf", type=Path, required=True, help="folder of benchmarks/smollm2.py")
    parser.add_argument("--data-folder", type=Path, required=True, help="packages of data (evaluate.py tasks --fetch)")
    parser.add_argument("--tasks", nargs="+", default=["all"])
    parser.add_argument("--limit", type=int, default=6, help="questions that are scored")
    parser.add_argument("--answers", type=int, default=3, help="questions that are answered")
    parser.add_argument("--output", type=Path)
    return parser


@contextmanager
def three_models(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """By the name that lm-eval has for them."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from megatron.early_exit.evaluation.lm_eval.adapter import EarlyExitLM

    model, tokenizer = load(args.gguf)
    ours = EarlyExitLM.create_from_arg_obj({"pretrained": args.load, "dtype": "fp32"})
    # Its cache of logits mixes up positions of requests that, context and continuation together, begin alike.
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=1, logits_cache=False)
    assert theirs.max_length == ours.max_length, f"{theirs.max_length} positions, and {ours.max_length}"
    flags = ("--dtype", "fp32", "--max-length", ours.max_length, "--served-model-name", "model")
    with tempfile.TemporaryDirectory() as folder, serve(args.load, *flags) as server:
        tokenizer.save_pretrained(folder)
        over_http = LocalCompletionsAPI(
            base_url=f"{server.running.url}/v1/completions", model="model", tokenizer=folder, num_concurrent=4,
            tokenizer_backend="huggingface", max_length=ours.max_length + 1, seed=1,
        )  # fmt: skip
        yield {THEIRS: theirs, OURS: ours, OVER_HTTP: over_http}


def compare(tasks: Any, name: str, models: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One task under all three models."""
    from megatron.early_exit.evaluation.lm_eval.task_runs import TaskSettings, evaluate

    likelihoods = tasks.uses_likelihoods(name)
    settings = TaskSettings(limit=args.limit if likelihoods else args.answers)
    runs = {}
    for model, lm in models.items():
        print(f"{name}, {model}", flush=True)
        runs[model] = evaluate(lm, tasks, name, settings)
    result: dict[str, Any] = {
        "n": runs[OURS]["n"],
        "metrics": {
            metric: {model: run["metrics"][metric]["value"] for model, run in runs.items()}
            for metric in runs[OURS]["metrics"]
        },
    }
    responses = {model: [one["responses"] for one in run["per_prompt"]] for model, run in runs.items()}
    pairs = ((OURS, THEIRS), (OVER_HTTP, OURS))
    if not likelihoods:
        same = lambda a, b: sum(x == y for x, y in zip(responses[a], responses[b], strict=True))
        return result | {"identical_answers": {f"{a} and {b}": same(a, b) for a, b in pairs}}
    tokens = _num_tokens(models[OURS], tasks.task(name).instances)
    values = {model: [value for one in of_model for value in _values(one)] for model, of_model in responses.items()}
    apart = lambda a, b: max(abs(x - y) / n for x, y, n in zip(values[a], values[b], tokens, strict=True))
    return result | {
        "requests": len(tokens),
        "tokens": sum(tokens),
        "largest_difference_per_token": {f"{a} and {b}": apart(a, b) for a, b in pairs},
    }


def _values(response: Any) -> list[float]:
    """Likelihoods of one question: of its choices, of its one continuation, or of its text."""
    if isinstance(response, float):
        return [response]
    return [one[0] for one in response] if isinstance(response[0], list) else [response[0]]


def _num_tokens(lm: Any, instances: list[Any]) -> list[int]:
    """Tokens that each request scores, in the order of questions and choices."""
    ordered = sorted(instances, key=lambda one: (one.doc_id, one.idx))
    return [
        len(lm._encode_pair(*one.args)[1]) if len(one.args) == 2 else len(lm.tok_encode(*one.args)) for one in ordered
    ]


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DISABLE_MULTIPROC", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    from megatron.early_exit.evaluation.lm_eval.offline_tasks import check_data, chosen_tasks
    from megatron.early_exit.evaluation.lm_eval.task_runs import Tasks

    machine = common.machine_info()
    names = chosen_tasks(args.tasks, (), allows_code=False)
    check_data(names, args.data_folder, may_fetch=False)
    tasks = Tasks(None, args.data_folder)
    with three_models(args) as models:
        results = {name: compare(tasks, name, models, args) for name in names}
    rows = [
        (name, one["n"], metric, *values.values())
        for name, one in results.items()
        for metric, values in one["metrics"].items()
    ]
    print(common.format_table(("task", "questions", "metric", THEIRS, OURS, OVER_HTTP), rows))
    settings = {"limit": args.limit, "answers": args.answers, "dtype": "fp32", "device": "cpu"}
    common.finish(
        common.result_document("lm_eval_parity", machine, settings, 1234, results, goals(results)), args.output
    )


def goals(results: dict[str, Any]) -> dict[str, Any]:
    differences = [value for one in results.values() for value in one.get("largest_difference_per_token", {}).values()]
    answers = [(same, one["n"]) for one in results.values() for same in one.get("identical_answers", {}).values()]
    scores = [
        max(values.values()) - min(values.values()) <= 1e-3 * max(1.0, *map(abs, values.values()))
        for one in results.values()
        for values in one["metrics"].values()
    ]
    return {
        "likelihoods within 1e-4 nats a token": {
            "met": max(differences) <= GOAL if differences else None, "largest": max(differences, default=None),
        },
        "identical answers": {
            "met": all(same == n for same, n in answers) if answers else None,
            "identical": sum(same for same, _ in answers), "compared": sum(n for _, n in answers),
        },
        "equal metrics": {"met": all(scores), "equal": sum(scores), "compared": len(scores)},
    }  # fmt: skip


if __name__ == "__main__":
    main()
