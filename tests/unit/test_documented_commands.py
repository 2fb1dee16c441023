"""The commands on the pages of the documentation are ones that our programs take: scripts, make targets, flags and
their values exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_check import ROOT, problem_of
from tests.shell_blocks import commands_of

PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md",
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_pages_are_taken(page: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    problems = []
    for command in commands_of(page.read_text(encoding="utf-8")):
        problem = problem_of(command, monkeypatch, capsys)
        problems += [f"{command}\n    {problem}"] if problem else []
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(("text", "expected"), [
    ("python tools/generate.py --load C --early-exit-thres 0.5", None),
    ("python tools/generate.py --load C --early-exit-threshold 0.5", "unrecognized arguments: --early-exit-threshold"),
    ("python tools/generate.py --load C --mode exit_early", "invalid choice: 'exit_early'"),
    ("python tools/generate.py --prompt a", "required: --load"),
    ("python tools/generate.py ... --prompt a > file", None),
    ("python tools/convert_checkpoint.py from-hf --input M", "required: --save"),
    ("python tools/generates.py --load C", "tools/generates.py is not here"),
    ("python -m benchmarks.nothing", "No module named 'benchmarks.nothing'"),
    ("python -m benchmarks.tuning_study --foldr a", "unrecognized arguments: --foldr"),
    ("torchrun --nproc_per_nodes 2 pretrain_early_exit_gpt.py ...", "unrecognized arguments"),
    ("torchrun --nproc_per_node 2 pretrain_early_exit_gpt.py ... --exit-layers 2", "unknown flag --exit-layers"),
    ("torchrun --nproc_per_node 2 pretrain_early_exit_gpt.py ... --fp8-format e4m3", "is refused"),
    ("torchrun --nproc_per_node 2 pretrain_early_exit_gpt.py ... --seed x", "--seed: expected an integer"),
    ("python pretrain_early_exit_gpt.py --config run.yaml --save", "--save: a value is missing"),
    ("torchrun --nproc_per_node 3 pretrain_early_exit_gpt.py ... --tensor-model-parallel-size 2", "3"),
    ("python tools/tune_exits.py --load M --output O -- --tensor-model-parallel 2", "unknown flag"),
    ("python tools/plan_pipeline.py --case 7B --chose", "unknown flag --chose"),
    ("bash examples/demo_tunes.sh", "examples/demo_tunes.sh is not here"),
    ("bash examples/compare_with_plain_gpt.sh runs/demo --train-iter 3", "unknown flag --train-iter"),
    ("bash examples/ee_inference/serve.sh --hosts 0.0.0.0", "unrecognized arguments: --hosts"),
    ("make demo test-fats", "the Makefile has no test-fats"),
    ("early-exit-serve --load C", "no console command"),
    ("early-exit-server --load C --ports 1", "unrecognized arguments: --ports"),
    ("evaluates --load C", "evaluates: neither ours nor a program that is known here"),
])  # fmt: skip
def test_wrong_commands_are_found(text: str, expected: str | None, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (command,) = commands_of(f"```sh\n{text}\n```\n")
    problem = problem_of(command, monkeypatch, capsys)
    assert problem is None if expected is None else expected in (problem or "")


def test_commands_are_found_as_they_are_written() -> None:
    page = """Text with `make demo`, `a word`, and `generate.py --chat`.
```sh
A=1 python a.py --flag 'b c' \\
    ... > d | head -1   # a remark
curl -d '{
  "e": 1}' && make $TARGET
```
```
words
python f.py
```
```yaml
python: g.py
```
"""
    commands = list(commands_of(page))
    assert [command.words for command in commands] == [
        ("python", "a.py", "--flag", "b c"), ("head", "-1"), ("curl", "-d", '{\n  "e": 1}'), ("make", "1"),
        ("python", "f.py"), ("make", "demo"), ("generate.py", "--chat"),
    ]  # fmt: skip
    assert [command.is_fragment for command in commands] == [True, False, False, False, False, True, True]
    assert commands[0].environment == {"A": "1"}
