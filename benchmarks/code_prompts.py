"""The prompts of `benchmarks/data/code_prompts.jsonl`, made from this project's own sources.

    python -m benchmarks.code_prompts

Half of them ask for a function to be edited, as a programmer asks a chat model: most of the answer stands in the
prompt. The others are beginnings of files, to be gone on with. The file is committed; sources change, it does not.
"""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import common

PATH = Path(__file__).resolve().parent / "data" / "code_prompts.jsonl"
NUM_OF_KIND, SEED = 25, 1234
EDITS = (
    "Rewrite this function with type hints removed. Answer with code alone.",
    "Rename the first parameter of this function to `value`. Answer with the whole function.",
    "Add one comment line that explains this function. Answer with the whole function.",
    "Add a print of the arguments at the beginning of this function. Answer with the whole function.",
    "Replace the docstring of this function with a shorter one. Answer with the whole function.",
)
GO_ON = "Go on with this file where it ends. Answer with the code that follows."
_LINES, _CHARACTERS = range(7, 19), range(250, 800)


def functions() -> Iterator[tuple[str, str]]:
    """(where, text) of functions of a middling size, in a fixed order."""
    for path in sorted((common.ROOT / "megatron/early_exit").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                text = ast.get_source_segment(source, node)
                if len(text.splitlines()) in _LINES and len(text) in _CHARACTERS:
                    yield f"{path.relative_to(common.ROOT)}:{node.name}", text


def beginnings() -> Iterator[tuple[str, str]]:
    """(where, text) of about the first third of files, cut behind a whole line."""
    for path in sorted((common.ROOT / "megatron/early_exit").rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        text = "".join(lines[: len(lines) // 3])
        while len(text) > 1200:
            lines = text.splitlines(keepends=True)
            text = "".join(lines[:-1])
        if len(text) >= 600:
            yield str(path.relative_to(common.ROOT)), text


def _chat(what: str, text: str, domain: str, where: str) -> dict[str, Any]:
    content = f"{what}\n\n```python\n{text.rstrip()}\n```"
    return {"messages": [{"role": "user", "content": content}], "domain": domain, "source": where}


def prompts() -> list[dict[str, Any]]:
    chance = random.Random(SEED)
    edits = [
        _chat(EDITS[number % len(EDITS)], text, "edit", where)
        for number, (where, text) in enumerate(chance.sample(list(functions()), NUM_OF_KIND))
    ]
    completions = [
        _chat(GO_ON, text, "completion", where) for where, text in chance.sample(list(beginnings()), NUM_OF_KIND)
    ]
    return [one for pair in zip(edits, completions, strict=True) for one in pair]


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in prompts()), encoding="utf-8")
    print(f"{PATH}: {2 * NUM_OF_KIND} prompts")
