"""Tables that a screen reader can follow, which scroll inside of the page where the screen is narrow."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.early_exit.evaluation.report.markup import Content, Markup, element, markup
from megatron.early_exit.evaluation.report.numbers import UNKNOWN


def table(
    caption: str, columns: Sequence[Content], rows: Sequence[Sequence[Content]], marked: Sequence[int] = ()
) -> Markup:
    """columns: headings; the first cell of each row is the row's heading. Numbers stand at the right of their column.
    marked: rows that stand out."""
    cells = [[markup(cell) for cell in row] for row in rows]
    classes = ["number" if _is_of_numbers(column) else None for column in zip(*cells)]
    heading = element(
        "tr", [element("th", column, scope="col", class_=class_) for column, class_ in zip(columns, classes)]
    )
    body = [_row(own, classes, number in marked) for number, own in enumerate(cells)]
    inner = element("table", element("caption", caption), element("thead", heading), element("tbody", body))
    return _scrolling(caption, inner)


def facts(caption: str, rows: Sequence[tuple[Content, Content]]) -> Markup:
    """A table of names and values."""
    body = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in rows]
    inner = element("table", element("caption", caption), element("tbody", body), class_="facts")
    return _scrolling(caption, inner)


def _scrolling(caption: str, inner: Markup) -> Markup:
    """The keyboard reaches it to scroll."""
    return element("div", inner, class_="scroll", tabindex=0, role="group", aria_label=caption)


def _is_of_numbers(column: Sequence[Markup]) -> bool:
    """Some are numbers, and the others unknown."""
    known = [cell for cell in column if cell != UNKNOWN]
    return bool(known) and all(cell.startswith("<data") for cell in known)


def _row(cells: Sequence[Markup], classes: Sequence[str | None], is_marked: bool) -> Markup:
    heading = element("th", cells[0], scope="row")
    others = [element("td", cell, class_=class_) for cell, class_ in zip(cells[1:], classes[1:])]
    return element("tr", heading, others, class_="marked" if is_marked else None)
