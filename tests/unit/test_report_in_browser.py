"""The page of `evaluate.py report` in headless Chromium: on a screen, on a phone and on paper."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron.early_exit.evaluation.command_line import main
from tests.colours import contrast, to_linear
from tests.unit import report_documents as made

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
Browser, Page = sync_api.Browser, sync_api.Page

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no /usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
A4_PIXELS = 695
"""Width between the margins of the page, 184 mm."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    documents = made.all_documents()
    documents[3]["commit"] = "another" * 5  # for a warning
    long_name = "a_checkpoint_with_a_name_that_is_rather_long_and_has_no_spaces_" * 3
    documents[4]["results"]["rows"][0]["name"] = long_name
    made.write_all(folder, documents)
    assert main(["report", "--results", f"{long_name}={folder}", "--output", str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, report: Path, width: int = 1100, **settings: Any) -> Iterator[Page]:
    """The page; in the end: no complaint of the browser, such as what its policy forbids, and no other request."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **settings)
    page = context.new_page()
    complaints, urls = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: urls.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert complaints == []
    assert [url for url in urls if not url.startswith("data:")] == [report.as_uri()]
    context.close()


def test_shows_style_and_pictures_under_its_policy(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        widths = page.locator("img").evaluate_all("all => all.map((one) => one.naturalWidth)")
        assert len(widths) == 10 and min(widths) > 400
        cards = page.locator(".card").evaluate_all("all => all.map((one) => getComputedStyle(one).borderLeftStyle)")
        assert cards == ["solid", "solid", "double"]
        page.get_by_role("link", name="Standard tasks").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.getElementById('tasks').getBoundingClientRect().top") < 400


@pytest.mark.parametrize("width", [360, 1100])
def test_wide_tables_scroll_and_the_page_does_not(browser: Browser, report: Path, width: int) -> None:
    with opened(browser, report, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wider = page.locator(".scroll").evaluate_all("all => all.map((one) => one.scrollWidth > one.clientWidth)")
        assert any(wider) == (width == 360)
        pictures = page.locator("img").evaluate_all("all => all.map((one) => one.getBoundingClientRect().width)")
        assert min(pictures) >= 450, "words in pictures stay large enough to be read"
        focusable = page.locator(".scroll").evaluate_all(
            "all => all.every((one) => one.tabIndex == 0 && one.ariaLabel)"
        )
        assert focusable


def test_nothing_is_cut_on_paper(browser: Browser, report: Path) -> None:
    with opened(browser, report, A4_PIXELS) as page:
        page.emulate_media(media="print")
        right = page.locator("body *").evaluate_all("all => all.map((one) => one.getBoundingClientRect().right)")
        assert max(right) <= A4_PIXELS + 1
        cut = page.locator("body *:not(img)").evaluate_all(
            "all => all.filter((one) => getComputedStyle(one).overflowX != 'visible').map((one) => one.tagName)"
        )
        assert cut == []
        whole = "all => all.every((one) => getComputedStyle(one).breakInside == 'avoid')"
        assert page.locator(".scroll, figure, .card").evaluate_all(whole), "not over two pages where one has the room"
        tallest = page.locator("figure").evaluate_all("all => Math.max(...all.map((one) => one.offsetHeight))")
        assert tallest < 900, "of about 1,000 pixels of a page"
        assert not page.locator("nav").is_visible()
        assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read(browser: Browser, report: Path, scheme: str) -> None:
    with opened(browser, report, color_scheme=scheme) as page:
        colours = page.locator("p, th, td, a, h2, li, figcaption, .badge, .interval, h4 strong").evaluate_all("""all =>
            all.map((one) => {
                let ground = one;
                while (getComputedStyle(ground).backgroundColor == "rgba(0, 0, 0, 0)") ground = ground.parentElement;
                return [getComputedStyle(one).color, getComputedStyle(ground).backgroundColor];
            })""")
        pairs = set(map(tuple, colours))
        assert len(pairs) > 5
        for words, ground in pairs:
            assert contrast(to_linear(words), to_linear(ground)) >= 4.5, (words, ground)
