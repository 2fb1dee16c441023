"""Tables that a screen reader can follow, which scroll inside of the page where the screen is narrow."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.early_exit.evaluation.report.markup import Content, Markup, element


def table(
    caption: Content, columns: Sequence[Content], rows: Sequence[Sequence[Content]], marked: Sequence[int] = ()
) -> Markup:
    """columns: headings; the first cell of each row is the row's heading. marked: rows that stand out."""
    heading = element("tr", [element("th", column, scope="col") for column in columns])
    body = [_row(cells, number in marked) for number, cells in enumerate(rows)]
    inner = element("table", element("caption", caption), element("thead", heading), element("tbody", body))
    return element("div", inner, class_="scroll", tabindex=0, role="group", aria_label="a table that may scroll")


def facts(caption: Content, rows: Sequence[tuple[Content, Content]]) -> Markup:
    """A table of names and values."""
    body = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in rows]
    inner = element("table", element("caption", caption), element("tbody", body), class_="facts")
    return element("div", inner, class_="scroll", tabindex=0, role="group", aria_label="a table that may scroll")


def _row(cells: Sequence[Content], is_marked: bool) -> Markup:
    first, *others = cells
    return element(
        "tr", element("th", first, scope="row"), [element("td", cell) for cell in others],
        class_="marked" if is_marked else None,
    )  # fmt: skip
