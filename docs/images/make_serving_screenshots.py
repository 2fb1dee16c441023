#!/usr/bin/env python3
"""Make the pictures of the web page: serving_page.png (wide, light) and serving_phone.png (phone, dark).

    make demo-tune
    python tools/run_text_generation_server.py --load runs/demo-tune/tuned --served-model-name SmolLM2-135M-Instruct &
    python docs/images/make_serving_screenshots.py http://127.0.0.1:5000

Needs playwright and Chromium. Look at what it makes: what the model writes, and how fast, is not the same everywhere.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

PROMPT = "The os.path module"
QUESTION = "What is a Python list? Answer in two sentences."
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
MOST_SECONDS = 120.0


def picture(browser: Browser, url: str, path: Path, *, is_phone: bool, threshold: float) -> None:
    """The page after one request: a text continued, with the full model's answer; on a phone a chat, with numbers."""
    context = browser.new_context(
        viewport={"width": 360, "height": 700} if is_phone else {"width": 1200, "height": 860},
        device_scale_factor=1.5 if is_phone else 1, color_scheme="dark" if is_phone else "light",
    )  # fmt: skip
    page = context.new_page()
    page.goto(url)
    page.get_by_label("A token leaves").fill(str(threshold))
    page.get_by_label("Show exit layer").set_checked(is_phone)
    page.get_by_label("Show the full model's").set_checked(not is_phone)
    page.get_by_text("More settings").click()
    page.get_by_label("Most tokens").fill("80")
    page.get_by_text("More settings").click()
    if is_phone:
        page.get_by_label("Chat").check()
        page.get_by_label("Message").fill(QUESTION)
    else:
        page.get_by_label("Prompt").fill(PROMPT)
    page.locator("#send").click()
    page.get_by_text("Done:").wait_for(timeout=1000 * MOST_SECONDS)
    page.screenshot(path=path, full_page=True)
    context.close()
    Image.open(path).quantize(128).save(path, optimize=True)


def main() -> None:
    """Make both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a server that is ready")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder; default: this one")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the exits")
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for name in ("serving_page.png", "serving_phone.png"):
            path = args.output / name
            picture(browser, args.url, path, is_phone="phone" in name, threshold=args.threshold)
            print(path)
        browser.close()


if __name__ == "__main__":
    main()
