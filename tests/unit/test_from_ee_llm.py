"""docs/from_ee_llm.md: the flags, files and fields that it names are here, and what is said to be the same, ignored or
refused is so. (Its commands are checked with those of all pages.)"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest

from megatron.early_exit.checkpoint.convert_command import build_parser as converter
from megatron.early_exit.config.flag_notes import note_of
from megatron.early_exit.config.flag_parser import known_flags
from megatron.early_exit.data.preprocess import build_parser as preprocessing
from megatron.early_exit.server.command_line import build_parser as server
from megatron.early_exit.server.megatron_api import GenerateRequest, GenerateResponse
from tests.command_check import ROOT

DOCS = ROOT / "docs"
PAGE = (DOCS / "from_ee_llm.md").read_text(encoding="utf-8")
EE_LLM_FLAGS = [
    line
    for line in (ROOT / "tests/fixtures/ee_llm_flags.txt").read_text(encoding="utf-8").splitlines()
    if line.startswith("--")
]
OWN_FLAGS = """exit-layer-nums exit-layer-weight exit-layer-weight-warmup-iters exit-layer-weight-warmup-style
    exit-layer-weight-init exit-layer-temperature use-exit-mlp use-exit-block use-exit-norm untie-exit-output-weights
    pre-exit fill-explicit-bubbles num-fill-warmup-microbatches num-fill-cooldown-microbatches backward-forward-ratio
    use-dynamic-exit-layer-weight tune-exit tune-exit-pipeline-parallel-size"""
REQUEST_FIELDS = """prompts tokens_to_generate logprobs echo_prompts early_exit_thres use_early_exit print_max_prob
    exit_layers top_k top_p top_p_decay top_p_bound temperature add_BOS stop_sequences prevent_newline_after_colon
    random_seed no_log beam_width length_penalty"""


def rows(heading: str) -> Iterator[list[str]]:
    """Cells of all rows of the tables below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("|") and not line.startswith("|--"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def flags_in(text: str) -> list[str]:
    return re.findall(r"`(--[\w-]+)", text)


def fate(flag: str) -> str:
    """What the training program does with a flag."""
    if flag in known_flags():
        return "same"
    note = note_of(flag)
    assert note is not None, f"{flag} is not known by name"
    return "refused" if note.refused else "ignored"


def test_flags_of_training_have_the_fate_that_the_page_says() -> None:
    told = {flag: here for theirs, here, *_ in rows("Flags of training") for flag in flags_in(theirs)}
    assert {f"--{name}" for name in OWN_FLAGS.split()} <= told.keys() <= set(EE_LLM_FLAGS)
    assert {flag: fate(flag) for flag in told} == told


def test_every_flag_of_ee_llm_is_known_by_name() -> None:
    counts = Counter(map(fate, EE_LLM_FLAGS))
    text = " ".join(PAGE.split())
    assert f"knows all {len(EE_LLM_FLAGS)} flags" in text
    assert f"takes over {counts['same']}, ignores {counts['ignored']} that" in text
    assert f"refuses {counts['refused']} with the reason" in text


def subcommand(parser, name: str):
    return next(action.choices[name] for action in parser._actions if isinstance(action.choices, dict))


@pytest.mark.parametrize(("heading", "parser", "least"), [
    ("Flags of the converter", lambda: subcommand(converter(), "add-exits"), 9),
    ("Flags of preprocessing", preprocessing, 9),
    ("Starting the server", server, 10),
])  # fmt: skip
def test_flags_of_other_programs_exist(heading: str, parser, least: int) -> None:
    here = [flag for _, cell, *_ in rows(heading) for flag in flags_in(cell)]
    known = {option for action in parser()._actions for option in action.option_strings}
    assert len(here) >= least and set(here) <= known


def test_files_of_the_page_are_there() -> None:
    here = " ".join(" ".join(cells[1:]) for cells in rows("Scripts and programs"))
    paths = re.findall(r"`((?:[\w.]+/)*[\w.-]+\.(?:py|sh))", here)
    assert len(paths) > 12
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_fields_of_requests_and_answers_exist() -> None:
    names = lambda cell: re.findall(r"`(\w+)`", cell)
    asked, answered = list(rows("Requests")), []
    middle = next(number for number, cells in enumerate(asked) if cells[0] == "answer")
    asked, answered = asked[1:middle], asked[middle + 1 :]
    fields = {name for cells in asked for name in names(cells[0])}
    assert fields == set(REQUEST_FIELDS.split()) <= GenerateRequest.model_fields.keys()
    assert {
        name for cells in answered for cell in cells for name in names(cell)
    } == GenerateResponse.model_fields.keys()


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([\w.]*)(?:#([\w-]+))?\)", PAGE)
    assert len(links) > 10
    for file, anchor in links:
        text = (DOCS / file).read_text(encoding="utf-8") if file else PAGE
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{file}#{anchor}"
