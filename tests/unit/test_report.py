"""The page of `evaluate.py report`: what stands in it, what is refused, and its pictures as files."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron.early_exit.evaluation.command_line import main
from tests.unit import report_documents as made

ROOT = Path(__file__).parents[2]
KINDS = ("exits", "probes", "calibrate", "sweep", "correctness", "benchmark", "tasks")
NASTY = '<script>alert("x")</script>&amp;\'"'


class Page(HTMLParser):
    """Elements of a page in order, with attributes and the text inside of them."""

    WITHOUT_END = {"meta", "img", "br"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[list[str]] = []
        self._open: list[int] = []
        self.feed(html)
        assert self._open == [], "every element ends"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append([])
        if tag not in self.WITHOUT_END:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.texts[index].append(data)

    def all(self, tag: str, **attributes: str) -> Iterator[tuple[dict[str, str | None], str]]:
        for (name, found), text in zip(self.elements, self.texts):
            if name == tag and all(found.get(key.rstrip("_")) == value for key, value in attributes.items()):
                yield found, "".join(text)

    def values(self) -> list[Any]:
        """Exact numbers of the tables."""
        return [json.loads(found["value"]) for found, _ in self.all("data")]


def make(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["report", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["report", *map(str, words)]) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    made.write_all(folder, made.all_documents())
    return folder


@pytest.fixture(scope="module")
def report(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert main(["report", "--results", str(results), "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "report.html").read_text(encoding="utf-8"))


def test_needs_nothing_from_elsewhere(report: Path, page: Page) -> None:
    sources = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert sources and all(value.startswith(("#", "data:image/png;base64,")) for value in sources)
    html = (report / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import|<script|<iframe|<link|\son\w+=|\sstyle=", html)
    (policy,) = (found["content"] for found, _ in page.all("meta") if "http-equiv" in found)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy and "base-uri 'none'" in policy and "form-action 'none'" in policy
    anchors = {found["id"] for _, found in page.elements if "id" in found}
    links = [found["href"][1:] for found, _ in page.all("a")]
    assert len(links) > 8 and set(links) <= anchors


def test_every_figure_says_what_it_shows(page: Page) -> None:
    images = list(page.all("img"))
    assert len(images) == len(list(page.all("figure"))) == len(list(page.all("figcaption"))) > 7
    for found, _ in images:
        assert len(found["alt"]) > 30 and re.search(r"\d", found["alt"]), "the finding, in numbers"
    assert any("1.45 times the full model's speed with 71.0% agreement" in found["alt"] for found, _ in images)


def test_tables_can_be_followed_without_seeing_them(page: Page) -> None:
    tables = list(page.all("table"))
    assert len(tables) == len(list(page.all("caption"))) > 10
    headings = [found.get("scope") for found, _ in page.all("th")]
    assert set(headings) == {"col", "row"}
    assert len(list(page.all("h1"))) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert all(deeper - level <= 2 for level, deeper in pairwise(levels))


def test_tables_hold_the_numbers_of_the_documents(page: Page, results: Path) -> None:
    values = page.values()
    numbers = {kind: json.loads((results / f"{kind}.json").read_text())["results"] for kind in KINDS}
    wanted: list[float] = []
    for head in numbers["exits"]["heads"]:
        keys = ("loss", "perplexity", "accuracy", "agreement", "ece", "auroc", "cost_in_layers")
        wanted += [head[key] for key in keys if head[key] is not None]
        low, high = head["agreement_interval"]
        wanted += [low, high] if low < high else []
    for heads in numbers["exits"]["by_domain"].values():
        wanted += [head["agreement"] for head in heads if not head["is_final"]]
    for card in numbers["calibrate"]["certificates"]:
        wanted += [card["p_value"], card["calibration_risk"], card["test_risk"], *card["test_risk_interval"]]
        wanted += [card["prompts"]["calibration"], *(card["thresholds"] or {}).values()]
        wanted += [] if card["free_running"] is None else [card["free_running"]["test_risk"]]
    for row in numbers["sweep"]["rows"] + numbers["benchmark"]["rows"] + numbers["benchmark"]["beside"]:
        wanted += [row["batch"], row["tokens_per_second"], row["speedup"], *(row["speedup_interval"] or [])]
        wanted += [row["first_token_seconds"], row["seconds_per_token"]]
        if "layer_run_speedup" in row:
            wanted += [row["layer_run_speedup"], 1 - row["speedup"] / row["layer_run_speedup"]]
            wanted += [row["agreement"], row["identical_answers"], row["perplexity"], row["loop_rate"]]
    for task in numbers["tasks"]["tasks"].values():
        for scores in task["metrics"].values():
            wanted += [number for score in scores.values() for number in score.values()]
        wanted += [one[key] for one in task["paired"].values() for key in ("mcnemar_p", "difference")]
    wanted += [part["seconds"] for part in numbers["benchmark"]["step"]]
    wanted += [one["margin"] for row in numbers["correctness"]["rows"] for one in row["first_differences"]]
    wanted += [*numbers["calibrate"]["text"].values(), *numbers["calibrate"]["rounding"].values()]
    assert len(wanted) > 400
    assert [number for number in wanted if number not in values] == []


def test_modes_of_tasks_are_told_and_pairs_stand_at_their_metric(page: Page) -> None:
    assert "mode: early_exit, thresholds: (8: 0.8)" in {text for _, text in page.all("td")}
    rows = [text for _, text in page.all("tr") if text.startswith("hellaswag") and "early exit 0.8" in text]
    assert ["-0.012" in row for row in rows] == [True, False], "of acc, not of acc_norm"


def test_numbers_are_rounded_as_readers_expect(page: Page) -> None:
    shown = {(found["value"], text) for found, text in page.all("data")}
    exact = lambda value, text: (repr(value), text) in shown
    assert exact(1.13, "1.13×") and exact(0.952, "95.2%") and exact(0.0004, "0.04%")
    assert exact(8.03, "8.0") and exact(0.081, "81.0 ms") and exact(3e-05, "3e-05")


def test_cards_say_what_is_promised_and_what_is_not(page: Page) -> None:
    cards = [(found["class"], " ".join(text.split())) for found, text in page.all("article")]
    assert [name for name, _ in cards] == ["card certified", "card certified", "card refused"]
    assert "at most 5% of the decisions along the full model's own greedy answer differ" in cards[0][1]
    assert "wrong promise in at most 5% of the draws" in cards[0][1] and "Not promised" in cards[0][1]
    assert "accepted at 0.025 or less" in cards[0][1], "two tests share delta"
    assert "with only some of the certified exits" in cards[0][1]
    assert "held_out_text_document.bin (SHA-256 beefbeefbeef)" in cards[1][1]
    assert "2,875 more are needed" in cards[2][1] and "Not promised" not in cards[2][1]


@pytest.mark.parametrize("risk, words", [
    ("B", "at most 5% of the answers differ"),
    ("C", "averaged over prompts, 1 − ROUGE-L of the answer to the full model's answer is at most 5%"),
    ("odd <risk>", "the risk “odd <risk>” is at most 5%"),
])  # fmt: skip
def test_promises_of_other_risks(tmp_path: Path, capsys: pytest.CaptureFixture[str], risk: str, words: str) -> None:
    card = made.card(made.model(), 0.95) | {"risk": risk, "free_running": None, "path": []}
    document = made.document("calibrate", made.calibrate_results(made.model(), made.random.Random(0)))
    document["results"] |= {"certificates": [card], "coverage_risk": {}, "exit_share_by_position": []}
    (path,) = made.write_all(tmp_path, [document])
    make(capsys, "--results", str(path), "--output", str(tmp_path))
    ((_, text),) = Page((tmp_path / "report.html").read_text()).all("article")
    assert words in text
    assert "measured, not promised, unless --free-running" in text


def test_pictures_lie_beside_the_page(report: Path, page: Page) -> None:
    files = {path.read_bytes(): path for path in report.glob("*.png")}
    shown = [base64.b64decode(found["src"].partition(",")[2]) for found, _ in page.all("img")]
    assert sorted(files) == sorted(shown)
    names = {path.stem for path in files.values()}
    assert names == {
        "sweep_pareto", "sweep_draft_heat_map", "benchmark_pareto", "benchmark_throughput_latency", "coverage_risk",
        "reliability", "exit_share", "step_parts", "certificate_path_9500", "certificate_path_9900",
    }  # fmt: skip
    for content in shown:
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
        assert pixels.std() > 10 and len(content) < 120_000
    assert (report / "report.html").stat().st_size < 1_000_000


def test_pictures_of_an_earlier_page_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But not what somebody else has put there, nor a picture that was changed."""
    exits, calibrate = map(str, made.write_all(tmp_path / "results", made.all_documents()[0:3:2]))
    folder = tmp_path / "report"
    make(capsys, "--results", exits, calibrate, "--output", str(folder))
    own = {"coverage_risk copy.png": (folder / "coverage_risk.png").read_bytes(), "exit_share.png": b"changed"}
    for name, content in own.items():
        (folder / name).write_bytes(content)
    make(capsys, "--results", exits, "--output", str(folder))
    assert {path.name for path in folder.iterdir()} == {"report.html", "reliability.png", *own}
    assert all((folder / name).read_bytes() == content for name, content in own.items())


def test_a_rest_below_zero_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As documents of early versions have it; the parts still add up to the step."""
    step = [
        {"batch": 1, "part": part, "seconds": seconds}
        for part, seconds in (("layers", 0.008), ("final head", 0.002), ("rest", -0.005))
    ]
    results = made.benchmark_results(made.model(), random.Random(0)) | {"step": step}
    (path,) = made.write_all(tmp_path, [made.document("benchmark", results)])
    make(capsys, "--results", str(path), "--output", str(tmp_path / "report"))
    page = Page((tmp_path / "report/report.html").read_text(encoding="utf-8"))
    (table,) = (text for _, text in page.all("table") if text.startswith("Parts of a decoding step"))
    assert table.endswith("15.00 ms4.00 ms (80.0%)1.00 ms (20.0%)0.00 µs (0.0%)")


def test_the_same_documents_give_the_same_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In whatever order they are named."""
    paths = list(map(str, made.write_all(tmp_path, made.all_documents()[0:3:2])))
    for folder, named in (("one", paths), ("two", paths[::-1])):
        make(capsys, "--results", *named, "--output", str(tmp_path / folder))
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and len(one) == 6


def test_whatever_documents_say_stays_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def poisoned(value: Any) -> Any:
        """With nasty words in every free text."""
        if isinstance(value, dict):
            return {key: poisoned(one) for key, one in value.items()}
        if isinstance(value, list):
            return [poisoned(one) for one in value]
        return NASTY if isinstance(value, str) else value

    documents = made.all_documents()
    clean = ("kind", "mode", "status", "risk", "date")
    for document in documents:
        restored = {key: document[key] for key in ("kind", "date")}
        rows = [dict(row) for row in document["results"].get("rows", [])]
        cards = [dict(card) for card in document["results"].get("certificates", [])]
        document |= poisoned(document) | restored
        for row, before in zip(document["results"].get("rows", []), rows):
            row |= {key: before[key] for key in clean if key in before}
        for card, before in zip(document["results"].get("certificates", []), cards):
            card |= {key: before[key] for key in clean if key in before}
    domains = documents[0]["results"]["by_domain"]
    documents[0]["results"]["by_domain"] = {NASTY: domains["code"]}
    tasks = documents[6]["results"]
    tasks["tasks"] = {NASTY: {"n": 1, "metrics": {NASTY: {NASTY: {"value": 0.5, "stderr": 0.1}}}, "paired": {}}}
    tasks["modes"] = {NASTY: {NASTY: NASTY}}
    documents[2]["data"] = {NASTY: NASTY}
    documents[2]["settings"] = {NASTY: NASTY}
    documents[4]["results"]["rows"][0]["first_differences"][0] |= {"prompt": NASTY, "expected": NASTY, "got": NASTY}
    made.write_all(tmp_path, documents)
    make(capsys, "--results", f"{NASTY.replace('/', '')}={tmp_path}", "--output", str(tmp_path))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert "script" not in tags and not any("onerror" in found for _, found in page.elements)
    assert sum(NASTY in text for _, text in page.all("th")) > 10
    assert any(NASTY in text for _, text in page.all("code")) and any(NASTY in text for _, text in page.all("td"))
    assert all(path.parent == tmp_path for path in tmp_path.rglob("*.png"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_without_its_document_says_what_makes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """A page of one kind alone: the sections of all others are there, and say how to fill them."""
    documents = [one for one in made.all_documents() if one["kind"] == kind]
    paths = made.write_all(tmp_path, documents)
    make(capsys, "--results", *map(str, paths), "--output", str(tmp_path / "report"))
    page = Page((tmp_path / "report/report.html").read_text(encoding="utf-8"))
    missing = " ".join(text for _, text in page.all("p", class_="missing"))
    sections = {found["id"] for found, _ in page.all("section") if found.get("id")}
    assert {"glance", "certificates", "speed", "exits", "tasks", "correctness", "reproducibility"} <= sections
    made_by = [one for one in KINDS if f"tools/evaluate.py {one} --load runs/study/tuned" in missing]
    partners = {"sweep": {"sweep", "benchmark"}, "benchmark": {"benchmark", "sweep"}}.get(kind, {kind})
    assert set(KINDS) - partners <= set(made_by)
    assert kind not in made_by or kind == "sweep"


def test_what_a_document_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = made.model()
    exits = made.document("exits", {"tokens": 10, "heads": made.heads(of), "reliability": {}, "by_domain": {}})
    benchmark = made.document("benchmark", {"rows": [], "transformers": None, "step": [], "per_prompt": []})
    bare = {"certificates": [], "coverage_risk": {}, "exit_share_by_position": [], "text": None}
    made.write_all(tmp_path, [exits, benchmark, made.document("calibrate", bare)])
    make(capsys, "--results", str(tmp_path), "--output", str(tmp_path / "report"))
    page = Page((tmp_path / "report/report.html").read_text(encoding="utf-8"))
    lacking = [text for _, text in page.all("p", class_="missing") if "holds nothing for this section" in text]
    assert len(lacking) == 6
    assert any("exits.json" in text and "texts of several kinds" in text for text in lacking)
    assert not list(page.all("img")) and not list((tmp_path / "report").glob("*.png"))


def test_unknown_numbers_are_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Null everywhere that a number may be unknown."""
    documents = made.all_documents()
    texts = ("name", "mode", "part", "level", "delta", "risk", "status", "prompts")
    counts = ("layer", "batch", "count", "tokens", "position", "identical", "is_final", "is_baseline", "prompt")

    def unknown(value: Any, key: str = "") -> Any:
        if isinstance(value, dict) and key != "thresholds":
            return {name: one if name in (*texts, *counts) else unknown(one, name) for name, one in value.items()}
        if isinstance(value, list) and (not value or isinstance(value[0], dict)):
            return [unknown(one) for one in value]
        return value if isinstance(value, str) else None

    for document in documents:
        document["results"] = unknown(document["results"])
    documents[2]["results"]["certificates"][0] |= {"level": 0.95, "risk": "A-max"}
    made.write_all(tmp_path, documents)
    make(capsys, "--results", str(tmp_path), "--output", str(tmp_path / "report"))
    page = Page((tmp_path / "report/report.html").read_text(encoding="utf-8"))
    assert sum(text == "–" for _, text in page.all("td")) > 100
    assert not re.search(r"\bNone\b|\bnan\b|\bnull\b", " ".join(text for _, text in page.all("td")))


def test_two_models_are_compared(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = made.model(8, (2, 4), "runs/demo")
    other = [one for one in made.all_documents(small, 1) if one["kind"] in ("exits", "sweep")]
    made.write_all(tmp_path / "small", other)
    output = make(
        capsys, "--results", f"SmolLM2={results}", f"a small one={tmp_path / 'small'}", "--output", str(tmp_path)
    )
    assert "14 plots" in output
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    glance = next(text for _, text in page.all("table"))
    assert "SmolLM2 (30 layers)" in glance and "a small one (8 layers)" in glance
    names = {path.name for path in tmp_path.glob("*.png")}
    assert {"SmolLM2_reliability.png", "a-small-one_reliability.png", "models.png"} <= names
    values = page.values()
    for document in (other[0], json.loads((results / "exits.json").read_text())):
        assert all(head["agreement"] in values for head in document["results"]["heads"])
    missing = [text for _, text in page.all("p", class_="missing")]
    assert any("tools/evaluate.py calibrate --load runs/demo" in text for text in missing)
    assert not any("--load runs/study/tuned" in text for text in missing)


def changed(kind: str, **of_model: Any) -> made.Json:
    return made.document(kind, next(one for one in made.all_documents() if one["kind"] == kind)["results"],
                         made.model() | of_model)  # fmt: skip


@pytest.mark.parametrize("change, words", [
    ({"commit": "fedcba98" * 5}, "different commits of the code (0123456789ab: exits.json; fedcba98fedc: tasks.json)"),
    ({"model": made.model() | {"iteration": 200, "fingerprint": "f" * 64}}, "different iterations of the checkpoint"),
    ({"model": made.model() | {"dtype": "bf16"}}, "different number types (fp32: exits.json; bf16: tasks.json)"),
    ({"commit": "0123456789abcdef" * 2 + "+changes"}, "The code had changes that are in no commit: tasks.json."),
])  # fmt: skip
def test_documents_that_do_not_go_together_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: made.Json, words: str
) -> None:
    made.write_all(tmp_path, [changed("exits"), changed("tasks") | change])
    make(capsys, "--results", str(tmp_path), "--output", str(tmp_path / "report"))
    page = Page((tmp_path / "report/report.html").read_text(encoding="utf-8"))
    ((_, warning),) = page.all("aside")
    assert words in warning


def test_certified_ways_with_other_thresholds_than_their_certificates_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], page: Page
) -> None:
    assert not list(page.all("aside"))
    calibrate = changed("calibrate")
    calibrate["results"]["certificates"][0]["thresholds"] = {"8": 0.5}
    made.write_all(tmp_path, [changed("sweep"), calibrate])
    make(capsys, "--results", str(tmp_path), "--output", str(tmp_path / "report"))
    ((_, warning),) = Page((tmp_path / "report/report.html").read_text(encoding="utf-8")).all("aside")
    assert "certified 95% in sweep.json: measured with other thresholds than the certificates have" in warning


def test_speeds_of_a_busy_machine_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], page: Page) -> None:
    assert not list(page.all("aside"))
    busy = {"cpu": "x", "cpu_cores": 2, "load_average_1min": 7.25, "gpus": []}
    made.write_all(tmp_path, [changed("benchmark") | {"machine": busy}])
    make(capsys, "--results", str(tmp_path), "--output", str(tmp_path / "report"))
    ((_, warning),) = Page((tmp_path / "report/report.html").read_text(encoding="utf-8")).all("aside")
    assert "benchmark.json was begun: a load of 7.2 on 2 cores" in warning


def test_models_are_not_mixed_without_names(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = made.write_all(tmp_path, [made.document("tasks", made.tasks_results(), made.model(8, (2, 4), "runs/demo"))])
    words = refusal(capsys, "--results", results / "exits.json", *other, "--output", tmp_path / "report")
    assert "documents of different models" in words and "runs/demo (8 layers, exits 2, 4" in words
    assert "give each model a name, NAME=PATH" in words
    words = refusal(capsys, "--results", f"one={results}", f"one={tmp_path}", "--output", tmp_path / "report")
    assert "both are named 'one'" in words
    assert not (tmp_path / "report").exists()


def broken(change: Callable[[made.Json], Any]) -> str:
    document = made.document("exits", made.exits_results(made.model(), made.random.Random(0)))
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize("content, words", [
    ("{", "is no result document: "),
    ("[]", "is no result document of evaluate.py"),
    ('{"kind": "exits"}', "has no kind, model and results"),
    (broken(lambda one: one.update(kind="guess")), "is of kind 'guess', which the report does not know; known are"),
    (broken(lambda one: one.update(kind=["exits"])), "is of kind ['exits'], which the report does not know"),
    (broken(lambda one: one["results"].pop("heads")), "missing required field `heads` - at `$.results`"),
    (broken(lambda one: one["results"]["heads"][1].update(loss="low")), "got `str` - at `$.results.heads[1].loss`"),
    (broken(lambda one: one["results"]["heads"][0].update(agreement_interval=[0.1])), "heads[0].agreement_interval`"),
    (broken(lambda one: one["model"].pop("num_layers")), "missing required field `num_layers` - at `$.model`"),
    (broken(lambda one: one["results"]["heads"][0].update(loss=float("nan"))), "NaN"),
    (broken(lambda one: one.update(results=[])), "Expected `object`, got `array` - at `$.results`"),
    (b"\xff\xfe\x00", "is no result document"),
])  # fmt: skip
def test_broken_documents_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, words: str
) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refusal(capsys, "--results", path, "--output", tmp_path / "report")
    assert str(path) in said and words in said and said.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_what_cannot_be_made_is_said_before(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --load CHECKPOINTS or --results" in refusal(capsys)
    assert "give --output DIR" in refusal(capsys, "--results", results)
    (tmp_path / "file").write_text("")
    assert "this is a file; give a folder" in refusal(capsys, "--results", results, "--output", tmp_path / "file")
    assert "nowhere.json" in refusal(capsys, "--results", tmp_path / "nowhere.json", "--output", tmp_path / "report")
    (tmp_path / "empty").mkdir()
    assert "holds no result documents" in refusal(capsys, "--results", tmp_path / "empty", "--output", tmp_path / "out")
    assert "no such folder" in refusal(capsys, "--load", tmp_path / "none")


def test_takes_the_results_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "iter_0000300"
    checkpoint.mkdir()
    (checkpoint / "model.yaml").write_text("")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("300")
    assert "has no results yet" in refusal(capsys, "--load", tmp_path)
    made.write_all(checkpoint / "evaluation", made.all_documents()[:1])
    output = make(capsys, "--load", str(tmp_path))
    assert str(checkpoint / "evaluation/report/report.html") in output
    again = make(capsys, "--load", f"mine={tmp_path}")
    assert again.split("(")[0] == output.split("(")[0]
    assert "<h1>mine</h1>" in (checkpoint / "evaluation/report/report.html").read_text()


def test_an_installed_package_has_the_style(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "megatron/early_exit/evaluation/report/page.css").is_file()
