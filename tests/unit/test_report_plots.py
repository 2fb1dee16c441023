"""Plots of the report: what they say in words, where labels go, colours for all eyes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import matplotlib
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.evaluation.report import schema
from megatron.early_exit.evaluation.report.plots import base, exit_share, modes, step_parts
from megatron.early_exit.evaluation.report.plots.certificate_path import certificate_path
from megatron.early_exit.evaluation.report.plots.coverage_risk import coverage_risk
from megatron.early_exit.evaluation.report.plots.draft_heat_map import draft_heat_map
from megatron.early_exit.evaluation.report.plots.labels import Label, label_points, spread
from megatron.early_exit.evaluation.report.plots.models import models
from megatron.early_exit.evaluation.report.plots.pareto import frontier, pareto, points_of
from megatron.early_exit.evaluation.report.plots.reliability import reliability
from megatron.early_exit.evaluation.report.plots.throughput_latency import throughput_latency
from tests.colours import COLOUR_VISION, contrast, seen_with, to_linear
from tests.unit import report_documents as made

MODEL = made.model()


def rows_of(*found: made.Json) -> list[schema.Row]:
    return msgspec.convert(list(found), list[schema.Row])


def drawn(plot: base.Plot) -> matplotlib.figure.Figure:
    with matplotlib.rc_context(base.SETTINGS):
        figure = plot.draw()
        figure.draw_without_rendering()
        return figure


def words_of(figure: matplotlib.figure.Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_frontier_is_what_nothing_beats() -> None:
    draw = np.random.default_rng(0)
    rows = rows_of(*(
        made.row(f"{i}", "early_exit", 1, float(speed), float(agreement))
        for i, (speed, agreement) in enumerate(draw.integers(1, 9, (30, 2)) / 10)
    ))  # fmt: skip
    points = {(row.speedup, row.agreement) for row in rows}
    beaten = {
        (x, y) for (x, y), (other_x, other_y) in itertools.product(points, points)
        if other_x >= x and other_y >= y and (x, y) != (other_x, other_y)
    }  # fmt: skip
    found = [(row.speedup, row.agreement) for row in frontier(points_of(rows))]
    assert found == sorted(points - beaten) and len(found) > 1


def test_pareto_shows_certified_ways_and_the_best_drafts() -> None:
    results = msgspec.convert(made.sweep_results(MODEL, made.random.Random(0)), schema.Speed)
    plot = pareto(results.rows)
    assert "Certified at 99%: 1.05 times (99.4%) at batch 1" in plot.finding
    words = words_of(drawn(plot))
    assert {"certified 99%", "certified 95%", "early exit 0.4", "drafts of exit 8 by 3"} <= set(words)
    assert not any(name.endswith(" by 1") for name in words)
    assert pareto(results.rows[:1]) is None


def test_names_are_no_formulas() -> None:
    heads = msgspec.convert(made.all_documents()[0]["results"]["heads"], list[schema.Head])
    drawn(models({r"$\frac{$": heads, "b": heads}))


def test_labels_cover_neither_points_nor_each_other() -> None:
    with matplotlib.rc_context(base.SETTINGS):
        figure, axes = base.single()
        places = np.random.default_rng(1).random((25, 2))
        axes.plot(*places.T, "o")
        left_out = label_points(
            axes, [Label(x, y, f"a label {i}", base.BLUE, i == 7) for i, (x, y) in enumerate(places)]
        )
        texts = [text for text in axes.texts if text.get_text()]
        figure.draw_without_rendering()
        boxes = [matplotlib.text.Text.get_window_extent(text) for text in texts]
    assert len(texts) == 25 - len(left_out) > 15 and "a label 7" not in left_out
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for point in axes.transData.transform(places):
        assert not any(box.contains(*point) for box in boxes)


def test_labels_leave_intervals_free() -> None:
    rows = rows_of(
        made.row("full", "full", 1, 1.0, 1.0),
        made.row(
            "with wide intervals", "early_exit", 1, 1.4, 0.9, speedup_interval=[1.0, 1.8], agreement_interval=[0.8, 1],
        ),
    )  # fmt: skip
    figure = drawn(pareto(rows))
    (axes,) = figure.axes
    (text,) = (one for one in axes.texts if one.get_text() == "with wide intervals")
    box = matplotlib.text.Text.get_window_extent(text)
    for share in np.linspace(0, 1, 50):
        for point in ((1 + 0.8 * share, 0.9), (1.4, 0.8 + 0.2 * share)):
            assert not box.contains(*axes.transData.transform(point))


@given(st.lists(st.floats(0, 100, allow_subnormal=False), min_size=1, max_size=8))
def test_spread_keeps_order_and_distance_and_moves_little(heights: list[float]) -> None:
    heights.sort()
    placed = spread(heights, 10)
    assert all(later - one >= 10 - 1e-6 for one, later in itertools.pairwise(placed))
    assert math.isclose(sum(placed), sum(heights), abs_tol=1e-6)
    if all(later - one >= 10 for one, later in itertools.pairwise(heights)):
        assert np.allclose(placed, heights)


def test_heat_map_has_every_exit_and_length() -> None:
    results = msgspec.convert(made.sweep_results(MODEL, made.random.Random(0)), schema.Speed)
    plot = draft_heat_map(results.rows)
    drafting = [row for row in results.rows if row.draft_exit]
    best = max(drafting, key=lambda row: row.speedup)
    assert (
        f"{best.speedup:.2f} times the full model's speed, with drafts of {best.draft_length} from exit" in plot.finding
    )
    shown = words_of(drawn(plot))
    assert sorted(shown) == sorted(f"{row.speedup:.2f}×\n{row.acceptance:.0%}" for row in drafting)
    adaptive = [
        made.row("adaptive", "self_speculative", 1, 1.2, 1.0, draft_exit=8, draft_length=length)
        for length in ("adaptive", 2)
    ]  # fmt: skip
    assert len(words_of(drawn(draft_heat_map(rows_of(*adaptive))))) == 2
    assert draft_heat_map(drafting[:1]) is None


def test_throughput_names_every_line_and_batch() -> None:
    results = msgspec.convert(made.benchmark_results(MODEL, made.random.Random(0)), schema.Speed)
    plot = throughput_latency(results.rows)
    best = max(results.rows, key=lambda row: row.tokens_per_second)
    assert f"{best.tokens_per_second:,.0f} tokens per second, of {best.name} at batch 32" in plot.finding
    figure = drawn(plot)
    names = {modes.short_name(row) for row in results.rows}
    in_legend = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {f"32: {name}" for name in names} <= set(words_of(figure)) or names <= in_legend
    many = [row for row in results.rows for _ in range(3)]
    for number, row in enumerate(many := [msgspec.structs.replace(row) for row in many]):
        row.name += f" {number % 3}"
    assert len(drawn(throughput_latency(many)).axes[0].lines) == 6
    assert throughput_latency([row for row in results.rows if row.batch == 1]) is None


def test_reliability_says_which_way_scores_are_wrong() -> None:
    bins = lambda gap: [
        {"score": 0.6, "agreement": 0.6 - gap, "count": 10},
        {"score": 0.2, "agreement": 0.2, "count": 0},
    ]
    results = {
        "tokens": 10,
        "heads": made.heads(MODEL),
        "reliability": {"8": bins(0.2), "15": bins(-0.2), "22": bins(0)},
    }
    plot = reliability(msgspec.convert(results, schema.Exits))
    assert "Exit 8 is too sure of itself (score minus agreement +0.200" in plot.finding
    assert "Exit 15 is not sure enough" in plot.finding and "Exit 22 is calibrated on average" in plot.finding
    assert drawn(plot).axes[0].get_title(loc="left") == "exit after layer 8 · ECE 0.093"


def test_coverage_says_what_can_leave() -> None:
    points = [
        {"threshold": 1 - c, "coverage": c, "risk": r, "oracle_risk": 0} for c, r in ((0.1, 0), (0.4, 0.05), (1, 0.5))
    ]
    plot = coverage_risk(
        msgspec.convert({"15": points, "8": points[2:], "22": []}, dict[str, list[schema.CoveragePoint]])
    )
    assert plot.finding == (
        "Exit 8: no share of the decisions leaves with at most 5% of these wrong; 50% are wrong if all leave. "
        "Exit 15: 40% of the decisions can leave with at most 5% of these wrong; 50% are wrong if all leave."
    )
    assert [axes.get_title(loc="left") for axes in drawn(plot).axes] == ["exit after layer 8", "exit after layer 15"]


def test_shares_fill_the_whole() -> None:
    shares = [schema.Shares(position, {"10": 0.25, "2": 0.5, "final": 0.25}) for position in (1, 0)]
    plot = exit_share.exit_share(shares)
    assert plot.finding == "Mean over 2 positions: exit 2 50%, exit 10 25%, final head 25%."
    assert words_of(drawn(plot)) == ["exit 2: 50%", "exit 10: 25%", "final head: 25%"]
    assert exit_share.exit_share(shares[:1]) is None


@pytest.mark.parametrize("p_values, words", [
    ([0.01, 0.02, 0.3], "2 settings in a row are accepted; the last one has a risk of 0.20%"),
    ([0.3], None),
    ([0.3, 0.01], "not even the safest setting is accepted, with p = 0.300"),
])  # fmt: skip
def test_path_stops_at_the_first_failure(p_values: Sequence[float], words: str | None) -> None:
    path = [
        {"budget": 0.001 * (i + 1), "risk": 0.001 * (i + 1), "p_value": p, "thresholds": {"8": 0.9, "15": None}}
        for i, p in enumerate(p_values)
    ]  # fmt: skip
    card = msgspec.convert(made.card(MODEL, 0.99) | {"path": path}, schema.Certificate)
    plot = certificate_path(card)
    assert (plot is None) if words is None else words in plot.finding
    if plot:
        assert drawn(plot).axes[0].get_xscale() == "log"
    named = [point | {"budget": 0.9 - i / 10, "thresholds": {"8": 0.9 - i / 10}} for i, point in enumerate(path)]
    plot = certificate_path(msgspec.convert(made.card(MODEL, 0.99) | {"path": named}, schema.Certificate))
    if plot:
        axes = drawn(plot).axes[0]
        assert axes.xaxis_inverted() and axes.get_xlabel() == "threshold of all exits"


def test_bars_of_a_step_add_up_to_one() -> None:
    names = ("layers", "final head", "rest")
    steps = {1: dict(zip(names, (0.003, 0.001, 0.0))), 4: dict(zip(names, (0.005, 0.001, 0.002)))}
    plot = step_parts.step_parts(steps)
    first, second = "At batch 1 most of a step of 4.00 ms goes to layers: 75%.", "At batch 4 most of a step of 8.00 ms"
    assert plot.finding == f"{first} {second} goes to layers: 62%."
    figure = drawn(plot)
    assert figure.axes[0].get_xlim() == (0, 1)
    assert words_of(figure) == ["75%", "25%", "62%", "12%", "25%"]
    assert step_parts.step_parts({1: {"layers": 0.003}}) is None


def test_models_are_compared_by_depth() -> None:
    heads = msgspec.convert(made.heads(made.model(8, (2, 4))), list[schema.Head])
    other = msgspec.convert(made.heads(MODEL), list[schema.Head])
    plot = models({"small": heads, "large": other})
    assert plot.finding.startswith("small: 30% at 25% of the depth, 40% at 50% of the depth. large: 31% at 27%")
    assert set(words_of(drawn(plot))) == {"small", "large"}
    assert models({"small": heads, "none": []}) is None


WHITE = to_linear("#ffffff")
TOGETHER = {
    "modes": [colour for _, colour, _ in modes.LOOKS.values()],
    "shares": [*exit_share.GROUNDS[:3], exit_share.FINAL],
    "models": list(base.EXIT_COLOURS[:4]),
}
"""Colours that stand in one plot."""


@pytest.mark.parametrize("name", TOGETHER)
def test_colours_are_told_apart(name: str) -> None:
    colours = [to_linear(colour) for colour in TOGETHER[name]]
    for weakness, matrix in COLOUR_VISION.items():
        for one, other in itertools.combinations([seen_with(matrix, colour) for colour in colours], 2):
            assert math.dist(one, other) > 0.06, weakness


def test_shares_beside_each_other_differ_in_grey() -> None:
    grounds = [to_linear(colour) for colour in (*exit_share.GROUNDS[:3], exit_share.FINAL)]
    parts = [to_linear(colour) for colour in step_parts.GROUNDS[:3]]
    for one, other in (*itertools.pairwise(grounds), *itertools.pairwise(parts)):
        assert contrast(one, other) > 1.25


def test_words_in_pictures_can_be_read() -> None:
    assert min(contrast(to_linear(colour), WHITE) for colour in base.INK.values()) >= 4.5
    assert {colour for _, colour, _ in modes.LOOKS.values()} <= {*base.INK, base.BLACK}
