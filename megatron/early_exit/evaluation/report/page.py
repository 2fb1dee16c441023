"""The page: one HTML file that needs nothing else, and its pictures by name."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from megatron.early_exit.evaluation.report.document import AnyDocument
from megatron.early_exit.evaluation.report.images import png
from megatron.early_exit.evaluation.report.markup import Content, Markup, element, markup
from megatron.early_exit.evaluation.report.plots.base import Plot
from megatron.early_exit.evaluation.report.plots.models import models as compared
from megatron.early_exit.evaluation.report.schema import Exits
from megatron.early_exit.evaluation.report.sections import (
    answers,
    certificates,
    correctness,
    coverage,
    domains,
    exits,
    probes,
    speed,
    steps,
    tasks,
)
from megatron.early_exit.evaluation.report.sections import reproducibility as repeat
from megatron.early_exit.evaluation.report.sections.base import AnySection
from megatron.early_exit.evaluation.report.sections.summary import summary
from megatron.early_exit.evaluation.report.sources import Evaluated, warnings

SECTIONS: tuple[AnySection, ...] = (
    certificates.SECTION, speed.SECTION, exits.SECTION, probes.SECTION, coverage.SECTION, domains.SECTION,
    tasks.SECTION, correctness.SECTION, answers.SECTION, steps.SECTION,
)  # fmt: skip
GUIDE = "docs/how_to_read_a_report.md"


@dataclass(frozen=True)
class Report:
    html: str
    pictures: dict[str, bytes]
    """PNG files by name."""


def report(models: Sequence[Evaluated]) -> Report:
    pictures: dict[str, bytes] = {}
    sections = [_section(section, models, pictures) for section in SECTIONS]
    body = [
        _header(models),
        _contents(),
        element(
            "main", _warnings(models), _glance(models, pictures), sections, _reproducibility(models),
        ),
        element("footer", element("p", f"Every table and plot is explained in {GUIDE} of megatron-early-exit.")),
    ]  # fmt: skip
    title = "Early-exit evaluation: " + ", ".join(model.name for model in models)
    return Report(_page(title, body), pictures)


def _page(title: str, body: Content) -> str:
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    digest = b64encode(sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(style)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, element('body', body), lang='en')}\n"


def _header(models: Sequence[Evaluated]) -> Markup:
    dates = sorted(document.date[:10] for model in models for document in model.documents if document.date)
    measured = f"Measured {dates[0]}" + (f" to {dates[-1]}" if dates[0] != dates[-1] else "") if dates else None
    return element(
        "header",
        element("p", "Early-exit evaluation", class_="kicker"),
        element("h1", " and ".join(model.name for model in models)),
        element("p", measured and f"{measured}. ", "All layers are counted from 1; intervals are of 95% confidence."),
    )  # fmt: skip


def _contents() -> Markup:
    places = [("glance", "At a glance"), *((one.anchor, one.title) for one in SECTIONS), (repeat.ANCHOR, repeat.TITLE)]
    links = [element("li", element("a", title, href=f"#{anchor}")) for anchor, title in places]
    return element("nav", element("ul", links), aria_label="Contents")


def _warnings(models: Sequence[Evaluated]) -> Content:
    found = [
        f"{model.name}: {words}" if len(models) > 1 else words for model in models for words in warnings(model)
    ]  # fmt: skip
    if not found:
        return None
    items = element("ul", [element("li", words) for words in found])
    return element("aside", element("h2", "Before you compare"), items, class_="warnings")


def _glance(models: Sequence[Evaluated], pictures: dict[str, bytes]) -> Markup:
    plot = compared({
        model.name: [head for document in model.with_results(Exits) for head in document.results.heads]
        for model in models
    })  # fmt: skip
    figure = _figure(plot, plot.name, pictures) if plot else None
    return element("section", element("h2", "At a glance"), summary(models), figure, id="glance")


def _section(section: AnySection, models: Sequence[Evaluated], pictures: dict[str, bytes]) -> Markup:
    heading, reading = element("h2", section.title), element("p", section.reading, class_="reading")
    inner = [_of_model(section, model, models, pictures) for model in models]
    return element("section", heading, reading, inner, id=section.anchor)


def _of_model(
    section: AnySection, model: Evaluated, models: Sequence[Evaluated], pictures: dict[str, bytes]
) -> Content:
    documents = model.of_kind(*section.kinds)
    parts: list[Content] = [element("h3", model.name)] if len(models) > 1 else []
    if not documents:
        return [*parts, _missing(section, model)]
    for document in documents:
        if len(documents) > 1:
            parts.append(element("p", "From ", element("code", document.path.name), ":", class_="from"))
        names = [*([model.name] if len(models) > 1 else []), *([document.path.stem] if len(documents) > 1 else [])]
        parts.extend(_of_document(section, document, "_".join(map(_as_file_name, names)), pictures))
    return parts


def _of_document(section: AnySection, document: AnyDocument, prefix: str, pictures: dict[str, bytes]) -> list[Content]:
    parts = [
        _figure(part, f"{prefix}_{part.name}" if prefix else part.name, pictures) if isinstance(part, Plot) else part
        for part in section.parts(document)
    ]
    lacking = f"{document.path.name} holds nothing for this section. {section.lacking}".strip()
    return parts or [element("p", lacking, class_="missing")]


def _missing(section: AnySection, model: Evaluated) -> Markup:
    commands = [
        element("code", f"tools/evaluate.py {kind} --load {model.model.checkpoint}") for kind in section.kinds
    ]  # fmt: skip
    between = [[" or " if i else "", command] for i, command in enumerate(commands)]
    return element("p", "Not evaluated. What makes it: ", between, class_="missing")


def _figure(plot: Plot, name: str, pictures: dict[str, bytes]) -> Markup:
    file = f"{name}.png"
    picture = pictures[file] = png(plot)
    source = f"data:image/png;base64,{b64encode(picture).decode()}"
    image = element("img", src=source, data_file=file, alt=plot.finding)
    frame = element("div", image, class_="scroll", tabindex=0, role="group", aria_label="a plot that may scroll")
    words = element("figcaption", element("strong", plot.finding), " ", plot.caption)
    return element("figure", frame, words)


def _as_file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _reproducibility(models: Sequence[Evaluated]) -> Markup:
    inner = [
        [element("h3", model.name) if len(models) > 1 else None, repeat.reproducibility(model.documents)]
        for model in models
    ]
    reading = element("p", repeat.READING, class_="reading")
    return element("section", element("h2", repeat.TITLE), reading, markup(inner), id=repeat.ANCHOR)
