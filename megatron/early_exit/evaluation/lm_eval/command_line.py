"""lm-eval's own program with the model `early-exit` and the offline tasks known to it:

    early-exit-lm-eval run --model_args pretrained=CHECKPOINTS,mode=early_exit,exit_thresholds=0.9 --tasks hellaswag_100

`python -m megatron.early_exit.evaluation.lm_eval` is the same. All flags are lm-eval's. Unless they say something else,
`--model early-exit` is chosen and the offline tasks are included; where their packages lie, `--metadata
data_folder=DIR` says.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron.early_exit.evaluation.lm_eval.offline_tasks import TASKS_FOLDER, as_value_error
from megatron.early_exit.platform.command_line import run_program

_COMMANDS_WITH_TASKS = ("run", "ls", "validate")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a worker failed. Raises ValueError and OSError for what cannot be evaluated."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise as_value_error(error) from None
    from megatron.early_exit.evaluation.lm_eval import adapter  # noqa: F401, it registers the model
    from megatron.early_exit.inference.executor.base import ExecutorError

    sys.argv[1:] = with_defaults(sys.argv[1:] if argv is None else argv)  # which lm-eval reads
    try:
        cli_evaluate()
    except ExecutorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def with_defaults(argv: Sequence[str]) -> list[str]:
    """The same command line with our model, if it runs one, and our tasks."""
    argv, flags = list(argv), {word.partition("=")[0] for word in argv}
    is_run = "run" in argv[:1] or bool(flags & {"--tasks", "-t"})
    if is_run and not flags & {"--model", "-M", "--config", "-C"}:
        argv += ["--model", "early-exit"]
    if (is_run or (argv[:1] and argv[0] in _COMMANDS_WITH_TASKS)) and "--include_path" not in flags and len(argv) > 1:
        argv += ["--include_path", str(TASKS_FOLDER)]
    return argv


def run() -> int:
    """The console command."""
    return run_program(main)
