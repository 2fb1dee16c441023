#!/usr/bin/env python3
"""Make the pictures of a report for the documentation: its plots, and its first screen, each below 120 kB.

    python docs/images/make_report_pictures.py docs/images/evaluation --load SmolLM2=runs/tuned demo=runs/demo

Takes the flags of `evaluate.py report` behind the folder, and writes that page as well. Needs playwright and Chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from megatron.early_exit.evaluation.command_line import main as evaluate
from megatron.early_exit.evaluation.commands.report import PAGE

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
MOST_BYTES = 120_000


def first_screen(page_file: Path, path: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1100, "height": 1150})
        page.goto(page_file.resolve().as_uri())
        page.screenshot(path=path)
        browser.close()
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main() -> int:
    """Returns the exit status."""
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    status = evaluate(["report", *sys.argv[2:], "--output", str(folder)])
    if status:
        return status
    first_screen(folder / PAGE, folder / "report_page.png")
    pictures = sorted(folder.glob("*.png"))
    for path in pictures:
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return int(any(path.stat().st_size > MOST_BYTES for path in pictures))


if __name__ == "__main__":
    sys.exit(main())
