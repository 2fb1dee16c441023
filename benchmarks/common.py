"""What all benchmarks share: facts about the machine, tables of ratios, one JSON document per run.

Knows nothing of what is measured. Unknown values are None, printed as `-` and written as `null`.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron.early_exit.evaluation.statistics.intervals import speed_ratio
from megatron.early_exit.platform.machine import commit, machine_info, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20
__all__ = ("commit", "machine_info", "versions")  # of the machine; used as `common.machine_info()`


def result_document(
    benchmark: str,
    machine: dict[str, Any],
    settings: dict[str, Any],
    seed: int,
    results: dict[str, Any],
    goals: dict[str, Any],
) -> dict[str, Any]:
    """The one JSON document of a run. machine: `machine_info()` from before the run; goals: name -> {"met": true, false
    or null, and the numbers behind it}."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join([_program(), *sys.argv[1:]]),
        "machine": machine,
        "versions": versions(),
        "settings": settings,
        "seed": seed,
        "results": results,
        "goals": goals,
    }


def _program() -> str:
    """Its file, or the folder of one that is a package."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def default_result_path(document: dict[str, Any]) -> Path:
    """benchmarks/results/NAME_MACHINE_DATE.json"""
    machine = document["machine"]
    name = machine["gpus"][0] if document["settings"].get("device") == "cuda" else machine["cpu"] or "unknown"
    name = re.sub(r"\((r|tm)\)|@.*|\bcpu\b|\bprocessor\b", " ", name.lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"
    return RESULTS / f"{document['benchmark']}_{name}_{machine['cpu_cores']}cores_{document['date'][:10]}.json"


def write_document(document: dict[str, Any], path: Path) -> None:
    """Write the document; also refuses NaN and infinity, which are not JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def finish(document: dict[str, Any], output: Path | None, is_written: bool = True) -> None:
    """End of a benchmark: write the document to `output` or its default place, and print it on the last line."""
    if is_written:
        path = output or default_result_path(document)
        write_document(document, path)
        print(f"written to {path}")
    print(json.dumps(document, allow_nan=False), flush=True)


def ratio(value: float | None, baseline: float | None) -> float | None:
    """value / baseline, or None where either is unknown or the baseline is 0."""
    return None if value is None or not baseline else value / baseline


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def median_ratio(values: Sequence[float], baselines: Sequence[float]) -> float | None:
    """Median of the ratios of pairs: what both of a pair suffer together (a slow moment of the machine) cancels."""
    return median([value / baseline for value, baseline in zip(values, baselines, strict=True)])


def mean_ratio(values: Sequence[float], baselines: Sequence[float]) -> dict[str, float]:
    """Geometric mean of the ratios of pairs, and its 95% interval: ratio, low, high. Student's t over their logarithms.

    Raises ValueError for less than two pairs."""
    ratio, interval = speed_ratio(baselines, values)
    return {"ratio": ratio, **interval._asdict()}


def all_met(checks: Sequence[Mapping[str, Any]]) -> bool | None:
    """Whether each check is met; None: there are none, as this run did not measure them."""
    return all(check["met"] for check in checks) if checks else None


def verdict(checks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A goal that is met if all of its checks are."""
    return {"met": all_met(checks), "checks": checks}


def cell(value: Any) -> str:
    """One cell of a table: `-` for None, yes/no for truths, three decimals for fractions."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    cells = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        others = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *others]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def table_of(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | Sequence[str]) -> str:
    """A table of some values of each row. columns: their keys by how they are headed, or the keys alone."""
    keys = columns.values() if isinstance(columns, Mapping) else columns
    return format_table(list(columns), [[row[key] for key in keys] for row in rows])


def goals_table(verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    """Which goals are met."""
    return format_table(["goal", "met"], [[name.replace("_", " "), goal["met"]] for name, goal in verdicts.items()])
