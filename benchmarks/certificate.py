"""A certificate of a real model, and what it costs: the time of `evaluate.py calibrate` over that of the same answers
by the full model, without exits.

    python -m benchmarks.certificate --name demo --load runs/demo/checkpoints \\
        --data-path runs/demo/data/stdlib_text_document --prompts 700 --levels 0.9 0.95

Flags are those of `tools/evaluate.py calibrate`, and some more. First, blocks of prompts are answered by turns with and
without exits observed; then the whole calibration runs (records that the checkpoint's folder has are not taken again).
What taking records costs is measured by turns; what comes behind, for the level that takes longest, by the clock.

The last line is one JSON document, also written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import common
from megatron.early_exit.evaluation.calibration import calibrate
from megatron.early_exit.evaluation.calibration_settings import CalibrationSettings
from megatron.early_exit.evaluation.commands import calibrate as command
from megatron.early_exit.evaluation.commands.common import load
from megatron.early_exit.evaluation.prompts import EvalPrompt
from megatron.early_exit.evaluation.recording import full_params, outputs_as_they_end, take_records
from megatron.early_exit.evaluation.statistics.intervals import speed_ratio
from megatron.early_exit.inference.certificates import AnswerSettings, add_certificates
from megatron.early_exit.inference.engine_loading import LoadedEngine
from megatron.early_exit.inference.exit_records import AboutRecords, RecordsFolder
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import ExitScore
from megatron.early_exit.platform.command_line import show_progress

GOAL = 2.0
"""Times the full model's time, at most."""


def time_by_turns(
    llm: LLM, loaded: LoadedEngine, prompts: Sequence[EvalPrompt], answers: AnswerSettings, block: int, score: ExitScore
) -> dict[str, list[float]]:
    """Seconds of every block of prompts: answered by the full model, and with records taken."""
    seconds: dict[str, list[float]] = {"full": [], "records": []}
    blocks = [prompts[start : start + block] for start in range(0, len(prompts), block)]
    progress = show_progress("blocks by turns")
    for number, some in enumerate([blocks[0], *blocks]):  # the first one warms up
        start = time.perf_counter()
        list(outputs_as_they_end(llm, [one.ids for one in some], full_params(answers)))
        full = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            about = AboutRecords(
                loaded.checkpoint.exit_fingerprint(loaded.tokenizer, score), answers, "none", len(some)
            )
            _, records = take_records(llm, some, RecordsFolder(Path(folder), about), lambda done, total: None)
        if number:
            seconds["full"].append(full)
            seconds["records"].append(records)
        progress(number, len(blocks))
    return seconds


def measure(
    llm: LLM, loaded: LoadedEngine, args: argparse.Namespace, settings: CalibrationSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(results, goals)"""
    prompts = command.prompts_of(args, llm, loaded)
    settings.check_prompts(len(prompts.prompts))
    answers = AnswerSettings(settings.answer_tokens, settings.ignore_eod, prompts.template_digest)
    seconds = time_by_turns(llm, loaded, prompts.prompts[: args.cost_prompts], answers, args.block, settings.exit_score)
    ratio, interval = speed_ratio(seconds["full"], seconds["records"])  # how many times as long records take
    found = calibrate(llm, loaded, prompts, settings, show_progress)
    of_parts = found.results["cost"]
    rest = of_parts["rounding_seconds"] + max(of_parts["level_seconds"].values())
    test = max(of_parts["test_seconds"].values())
    add_certificates(loaded.checkpoint.folder, found.certificates)
    print(found.text())
    num_prompts = len(prompts.prompts)
    full_seconds = sum(seconds["full"]) / min(args.cost_prompts, num_prompts) * num_prompts
    cost = {
        "raw_seconds": seconds,
        "records_over_full": {"ratio": ratio, "low": interval.low, "high": interval.high},
        "full_seconds": full_seconds,
        "rounding_seconds": of_parts["rounding_seconds"],
        "level_seconds": of_parts["level_seconds"],
        "test_seconds": of_parts["test_seconds"],
        "certificate_over_full": ratio + rest / full_seconds,
        "certificate_and_test_over_full": ratio + (rest + test) / full_seconds,
    }
    print(
        f"\nrecords take {ratio:.2f} times as long as full ({interval.low:.2f} to {interval.high:.2f}); with all that "
        f"comes behind, the certificate takes {cost['certificate_over_full']:.2f} times as long, and "
        f"{cost['certificate_and_test_over_full']:.2f} times with early exit's own answers on the test split"
    )
    results = {name: value for name, value in found.results.items() if name != "cost"}
    certified = [card for card in results["certificates"] if card["status"] == "certified"]
    goals = {
        "certificate_at_most_twice_full": {
            "met": cost["certificate_over_full"] <= GOAL,
            "ratio": cost["certificate_over_full"],
        },
        "test_split_does_not_contradict": _goal({card["level"]: card for card in certified}),
        "free_running_test_does_not_contradict": _goal({card["level"]: card["free_running"] for card in certified}),
    }
    return {"cost": cost, "num_prompts": num_prompts, "data": prompts.data, **results}, goals


def _goal(measured: dict[float, dict[str, Any]]) -> dict[str, Any]:
    """Whether the test split's interval of the risk reaches what was promised. measured: by level."""
    levels = {
        f"{level:g}": {
            "risk": one["test_risk"],
            "interval": one["test_risk_interval"],
            "is_met": one["test_risk_interval"][0] <= 1.0 - level,
        }
        for level, one in measured.items()
    }
    return {"met": all(one["is_met"] for one in levels.values()) if levels else None, "levels": levels}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="certificate", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    command.add_command(commands)
    calibrating = commands.choices["calibrate"]
    calibrating.add_argument("--name", required=True, help="of the model, in the result's name")
    calibrating.add_argument("--cost-prompts", type=int, default=128, help="that are answered by turns")
    calibrating.add_argument("--block", type=int, default=32, help="prompts of a turn")
    args = calibrating.parse_args(argv, argparse.Namespace(command="calibrate"))
    machine, settings = common.machine_info(), command.settings_of(args)
    llm, loaded = load(args)
    with llm:
        results, goals = measure(llm, loaded, args, settings)
    shared = {**asdict(settings), "batch": llm.engine.description.num_slots}
    document = common.result_document(
        f"certificate_{args.name}", machine, shared, settings.seed, results, goals
    )  # fmt: skip
    common.finish(document, args.output)


if __name__ == "__main__":
    main()
