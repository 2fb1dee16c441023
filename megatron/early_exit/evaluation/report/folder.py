"""The folder of a report: the page, and its pictures as files beside it."""

from __future__ import annotations

import re
from base64 import b64decode
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.early_exit.evaluation.report.page import Report

PAGE = "report.html"

_PICTURE = re.compile(r'<img src="data:image/png;base64,([\w+/=]+)" data-file="([\w.-]+\.png)"')
"""How a page holds a picture, and the name of its file."""


def write_report(report: Report, folder: Path) -> Path:
    """Write page and pictures, and remove those that an earlier page of this folder had and this one has not; returns
    the page's path. What else lies there stays, also a picture that somebody has changed."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    for name, content in _pictures_of(page).items():
        path = folder / name
        if name not in report.pictures and path.is_file() and path.read_bytes() == content:
            path.unlink()
    for name, content in report.pictures.items():
        (folder / name).write_bytes(content)
    page.write_text(report.html, encoding="utf-8")
    return page


def _pictures_of(page: Path) -> dict[str, bytes]:
    """PNG files by name, as a page holds them; none if there is no page."""
    if not page.is_file():
        return {}
    found = _PICTURE.findall(page.read_text(encoding="utf-8", errors="replace"))
    return {name: b64decode(content) for content, name in found}
