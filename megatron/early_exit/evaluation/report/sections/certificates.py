"""Certificate cards: what is promised, to whom, on which data, and what is not."""

from __future__ import annotations

from megatron.early_exit.evaluation.report.document import Document, Model
from megatron.early_exit.evaluation.report.markup import Content, Markup, element
from megatron.early_exit.evaluation.report.numbers import number, p_value, percent, plain_percent, with_interval
from megatron.early_exit.evaluation.report.plots.base import Plot
from megatron.early_exit.evaluation.report.plots.certificate_path import certificate_path
from megatron.early_exit.evaluation.report.schema import Calibration, Certificate
from megatron.early_exit.evaluation.report.sections.base import Parts, Section
from megatron.early_exit.evaluation.report.tables import facts

PROMISES = {
    "A": "averaged over prompts, at most {alpha} of the decisions along the full model's own greedy answer differ from "
    "what the full model decides there",
    "B": "at most {alpha} of the answers differ from the full model's answer in any token",
    "C": "averaged over prompts, 1 − ROUGE-L of the answer to the full model's answer is at most {alpha}",
}
"""By the first letter of the risk's name."""
NOT_PROMISED = (
    "That every single answer is this close: it is an average over prompts. Some answers differ more.",
    "Anything about prompts of another kind than those of the calibration, or about sampling at a temperature.",
    "Anything for other weights, exits, number types, quantisation, chat templates or longer answers: with these the "
    "certificate is refused.",
    "That answers are correct or harmless: they are compared with the full model's, not with the truth.",
)
NOT_FREE_RUNNING = (
    "What early exit generates by itself. Once a token differs, what follows is another text: the risk along its own "
    "answers is measured, not promised, unless --free-running certifies it too."
)
NOT_FOR_SOME_EXITS = (
    "What early exit generates with only some of the certified exits (--exit-layers, --plan-exits): its own answers "
    "were tested with all of them."
)


def _parts(document: Document[Calibration]) -> Parts:
    results = document.results
    parts: list[Content | Plot] = []
    for card in results.certificates:
        parts.append(_card(card, document))
        plot = certificate_path(card)
        if plot:
            parts.append(plot)
    return parts


def _card(card: Certificate, document: Document[Calibration]) -> Markup:
    word = "certified" if card.is_certified else "refused"
    return element(
        "article",
        element("h4", f"Promise {plain_percent(card.level)}: ", element("strong", word)),
        _promise(card, document.model) if card.is_certified else _refusal(card),
        facts(f"Certificate for {plain_percent(card.level)}", _facts(card, document)),
        element("p", element("strong", "Not promised")) if card.is_certified else None,
        element("ul", [element("li", words) for words in _not_promised(card)]) if card.is_certified else None,
        class_=f"card {word}",
    )


def _promise(card: Certificate, model: Model) -> Markup:
    alpha = plain_percent(1 - card.level)
    promise = PROMISES.get(card.risk[:1].upper(), "the risk “" + card.risk + "” is at most {alpha}").format(alpha=alpha)
    return element(
        "p", f"With these thresholds, {promise}. It holds for prompts drawn like those of the calibration, on "
        f"{model.checkpoint} in {model.dtype or 'its number type'}. The procedure gives a wrong promise in at most "
        f"{plain_percent(card.delta)} of the draws of calibration prompts.",
    )  # fmt: skip


def _refusal(card: Certificate) -> Markup:
    return element(
        "p", f"No thresholds are certified: {card.reason or 'the document gives no reason'}.".replace("..", ".")
    )


def _not_promised(card: Certificate) -> list[str]:
    is_both = card.free_running is not None and card.free_running.is_certified
    return [*NOT_PROMISED, NOT_FOR_SOME_EXITS if is_both else NOT_FREE_RUNNING]


def _facts(card: Certificate, document: Document[Calibration]) -> list[tuple[Content, Content]]:
    rows: list[tuple[Content, Content]] = [
        ("Risk that is bounded", card.risk),
        ("Thresholds", _thresholds(card.thresholds)),
        ("Prompts", _prompts(card.prompts)),
        ("Data", _data(document)),
        (
            "p-value on the calibration prompts",
            [number(card.p_value, p_value), f" (accepted at {card.delta_of_test:g} or less)"],
        ),
        ("Risk on the calibration prompts", number(card.calibration_risk, percent)),
        ("Risk on the test prompts", with_interval(card.test_risk, card.test_risk_interval, percent)),
        ("Layer runs saved, as expected from the records", number(card.expected_runs_saved, percent)),
    ]
    return rows + _free_running(card)


def _free_running(card: Certificate) -> list[tuple[Content, Content]]:
    test = card.free_running
    if test is None:
        return []
    measured = with_interval(test.test_risk, test.test_risk_interval, percent)
    rows: list[tuple[Content, Content]] = [("Risk along its own answers, on the test prompts", measured)]
    if test.p_value is None:
        return [*rows, ("Certificate for its own answers", "not asked for")]
    verdict = "not certified" if test.is_certified is False else "certified"
    return [
        *rows,
        ("Certificate for its own answers", [verdict, ": p-value ", number(test.p_value, p_value)]),
        ("Risk along its own answers, on prompts of its own", number(test.risk, percent)),
    ]


def _thresholds(thresholds: dict[str, float] | None) -> Content:
    if not thresholds:
        return "none"
    layers = sorted(thresholds, key=int)
    return [[", " if i else "", f"exit {layer}: ", number(thresholds[layer])] for i, layer in enumerate(layers)]


def _prompts(prompts: dict[str, int | None]) -> Content:
    known = [(name, count) for name, count in prompts.items() if count]
    return [
        [", " if i else "", name.replace("_", "-"), ": ", number(count, "{:,}".format)]
        for i, (name, count) in enumerate(known)
    ]


def _data(document: Document[Calibration]) -> Content:
    if not document.data:
        return "not said"
    return [
        [", " if i else "", name, " (SHA-256 ", element("code", (digest or "unknown")[:12]), ")"]
        for i, (name, digest) in enumerate(document.data.items())
    ]


SECTION = Section(
    "certificates",
    "Certificates",
    ("calibrate",),
    "A certificate is a promise with a probability: thresholds were fixed along a path on tuning prompts, tested on "
    "calibration prompts that they had not seen, and measured on a third split. Good: certified, and a test risk whose "
    "whole interval lies below the bound. Trap: it is about the average over prompts like these, not about your "
    "prompts or each answer, and “refused” often means too few prompts rather than a bad model.",
    _parts,
    "Calibrate with at least one level.",
)
