"""HTML by function calls: whatever is not Markup already is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_WITHOUT_END = {"meta", "img", "br"}


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


Content = str | None | Iterable["Content"]
"""Text, Markup, nothing, or several of them in a row."""


def markup(content: Content) -> Markup:
    """Escape what is text and join it all."""
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        return Markup(escape(content))
    return Markup("".join(map(markup, content)))


def element(tag: str, *children: Content, **attributes: str | int | None) -> Markup:
    """`<tag ...>children</tag>`. attributes: None leaves one out; `class_` is `class`, `aria_label` is `aria-label`."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    end = "" if tag in _WITHOUT_END else f"{markup(children)}</{tag}>"
    return Markup(f"<{tag}{written}>{end}")
