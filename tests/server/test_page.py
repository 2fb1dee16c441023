"""The page at `/` in headless Chromium, over a real server; only what a server rarely says is scripted."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.colours import COLOUR_VISION, contrast, seen_with, to_linear
from tests.server import models
from tests.server.serving import ROOT, RunningServer

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
Browser, Page, Route, expect = sync_api.Browser, sync_api.Page, sync_api.Route, sync_api.expect

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no /usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
THRESHOLD = 0.8
"""At which the tiny model uses its exits and the final head."""
COMPLETIONS, CHAT = "**/v1/completions", "**/v1/chat/completions"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """With a profile of its own."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, server: RunningServer, *, expected: str = "$.", **settings: Any) -> Iterator[Page]:
    """The page, which knows its model. In the end: no errors in the console but those that are `expected`, and no
    request to another host."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings})
    page = context.new_page()
    page.set_default_timeout(15_000)
    complaints, urls = [], []
    page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    page.goto(server.url)
    yield page
    assert [text for text in complaints if not re.search(expected, text)] == []
    assert [url for url in urls if not url.startswith((server.url + "/", "data:"))] == []
    context.close()


@pytest.fixture
def page(browser: Browser, server: RunningServer) -> Iterator[Page]:
    with opened(browser, server) as page:
        choose(page)
        yield page


def choose(page: Page, max_tokens: int = 24, threshold: float = THRESHOLD, compare: bool = False) -> None:
    """Settings of the requests to come."""
    page.get_by_text("More settings").click()
    page.get_by_label("Most tokens").fill(str(max_tokens))
    page.get_by_label("A token leaves").fill(str(threshold))
    page.get_by_label("Show the full model's").set_checked(compare)


def generate(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("Done")


def answer(page: Page, title: str) -> Any:
    """The last one with this title."""
    return page.get_by_role("region", name=title, exact=True).last


def text_of(answer: Any) -> str:
    return answer.locator(".text").text_content()


def complete(server: RunningServer, path: str = "completions", **body: Any) -> dict[str, Any]:
    """The only choice of the API's answer, with no page and no stream."""
    settings = {"max_tokens": 24, "temperature": 0, "seed": 1234, "return_exit_details": True}
    response = httpx.post(f"{server.url}/v1/{path}", json={**settings, **body}, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


EARLY = {"mode": "early_exit", "exit_thresholds": [THRESHOLD]}


def test_answers_are_those_of_the_api_in_the_colours_of_their_exits(page: Page, server: RunningServer) -> None:
    page.evaluate("""() => {
        window.lengths = [];
        new MutationObserver(() => lengths.push(document.querySelectorAll(".token").length))
            .observe(document.getElementById("turns"), { childList: true, subtree: true });
    }""")
    generate(page, "the quick brown")
    right = complete(server, prompt="the quick brown", **EARLY)
    shown = answer(page, "Early exit")
    assert text_of(shown) == right["text"]
    exits = ["final" if one["is_final"] else str(one["exit_layer"]) for one in right["exit_details"]]
    tokens = shown.locator(".token")
    assert tokens.evaluate_all("all => all.map((one) => one.dataset.exit)") == exits
    assert len(set(exits)) > 1, "the threshold is such that not all exits are the same"
    colours = tokens.evaluate_all("all => all.map((one) => getComputedStyle(one).backgroundColor)")
    legend = page.locator("#legend .swatch").evaluate_all(
        "all => all.map((one) => [one.dataset.exit, getComputedStyle(one).backgroundColor])"
    )
    assert [name for name, _ in legend] == ["2", "4", "draft", "final"]
    assert colours == [dict(legend)[name] for name in exits]
    assert len({dict(legend)[name] for name in ("2", "4", "final")}) == 3
    lengths = page.evaluate("lengths")
    assert len({one for one in lengths if one}) > 3, "tokens are shown as they come"
    figures = dict(zip(shown.locator("dt").all_text_contents(), shown.locator("dd").all_text_contents()))
    assert figures["Tokens"] == str(len(exits))
    assert float(figures["Tokens per second"]) > 0 and figures["First token"].endswith(" ms")
    assert re.fullmatch(r"-?\d+ %", figures["Layer runs saved"])
    counted = shown.locator("ul.exits li").all_text_contents()
    assert sum(int(re.search(r": (\d+) token", entry)[1]) for entry in counted) == len(exits)


def test_every_token_tells_its_exit_and_confidence_on_demand(page: Page, server: RunningServer) -> None:
    generate(page, "the quick brown")
    details = complete(server, prompt="the quick brown", **EARLY)["exit_details"]
    tokens = answer(page, "Early exit").locator(".token")
    content = "all => all.map((one) => getComputedStyle(one, '::after').content)"
    assert set(tokens.evaluate_all(content)) == {"none"}
    page.get_by_label("Show exit layer and confidence").check()
    right = [f'"{one["exit_layer"]}·{round(100 * one["confidence"])}"' for one in details]
    assert tokens.evaluate_all(content) == right
    page.get_by_label("Show exit layer and confidence").uncheck()
    assert set(tokens.evaluate_all(content)) == {"none"}

    told = answer(page, "Early exit").locator(".detail")
    index = next(index for index, one in enumerate(details) if re.search(r"\w{2}", one["text"]))
    tokens.nth(index).hover()
    expect(told).to_contain_text(f"confidence {details[index]['confidence']:.3f}, id {details[index]['token_id']}")
    answer(page, "Early exit").locator(".text").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(told).to_contain_text(f"confidence {details[1]['confidence']:.3f}, id {details[1]['token_id']}")


def test_the_full_models_answer_stands_beside_it_with_the_differences_marked(page: Page, server: RunningServer) -> None:
    page.get_by_label("Show the full model's").check()
    generate(page, "the quick brown")
    shown = {}
    for title, settings in {"Early exit": EARLY, "Full model": {"mode": "full"}}.items():
        right = complete(server, prompt="the quick brown", **settings)
        assert text_of(answer(page, title)) == right["text"]
        marks = (
            answer(page, title)
            .locator(".token")
            .evaluate_all("all => all.map((one) => one.classList.contains('differs'))")
        )
        ids = [one["token_id"] for one in right["exit_details"]]
        shown[title] = ids, [token for token, differs in zip(ids, marks, strict=True) if not differs]
    (early, kept), (full, kept_of_full) = shown.values()
    assert early != full, "the threshold is such that the answers differ"
    assert kept == kept_of_full and len(kept) == common_length(early, full)
    first = next(i for i, pair in enumerate(zip(early, full)) if pair[0] != pair[1])
    words = page.locator(".comparison").text_content()
    assert f"{len(kept)} of {len(early)} tokens are the full model's too" in words
    assert f"first difference is at token {first + 1}." in words

    page.get_by_label("Mode", exact=True).select_option("self_speculative")
    generate(page, "the quick brown")
    expect(page.locator(".comparison")).to_contain_text("Both answers are the same")
    assert page.locator(".differs").count() == 0


def common_length(first: list[int], second: list[int]) -> int:
    """Of the longest common subsequence, by its definition."""
    row = [0] * (len(second) + 1)
    for one in first:
        before = row
        row = [0]
        for j, other in enumerate(second):
            row.append(before[j] + 1 if one == other else max(row[j], before[j + 1]))
    return row[-1]


def test_differences_are_those_of_a_longest_common_subsequence(page: Page) -> None:
    draw = random.Random(1)
    pairs = [[[draw.randrange(4) for _ in range(draw.randrange(9))] for _ in range(2)] for _ in range(200)]
    found = page.evaluate("pairs => pairs.map(([first, second]) => differences(first, second))", pairs)
    for pair, marks in zip(pairs, found, strict=True):
        both = zip(pair, marks, strict=True)
        kept = [[token for token, mark in zip(ids, differs, strict=True) if not mark] for ids, differs in both]
        assert kept[0] == kept[1] and len(kept[0]) == common_length(*pair)


def test_chat(page: Page, server: RunningServer) -> None:
    page.get_by_label("Chat").check()
    messages = []
    for content in ("the quick brown", "jumps over"):
        messages.append({"role": "user", "content": content})
        page.get_by_label("Message").fill(content)
        page.get_by_label("Message").press("Enter")
        expect(page.locator("#status")).to_contain_text("Done")
        right = complete(server, "chat/completions", messages=messages, **EARLY)["message"]
        assert text_of(answer(page, "Early exit")) == right["content"]
        messages.append({"role": "assistant", "content": right["content"]})
        assert page.get_by_label("Message").input_value() == ""
    assert page.locator(".question").all_text_contents() == ["the quick brown", "jumps over"]
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    with page.expect_request(CHAT) as sent:
        page.get_by_label("Message").fill("jumps over")
        page.get_by_label("Message").press("Enter")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "jumps over"}]
    expect(page.locator("#status")).to_contain_text("Done")


def test_requests_say_what_was_chosen(page: Page) -> None:
    sent: list[dict[str, Any]] = []
    page.route(COMPLETIONS, lambda route: (sent.append(route.request.post_data_json), respond(route, [])))
    generate(page, "the")
    page.get_by_label("A token leaves").press("ArrowRight")
    page.get_by_role("group", name="Exits that").get_by_label("after layer 2").uncheck()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Seed").fill("7")
    generate(page, "the")
    page.get_by_label("Mode", exact=True).select_option("self_speculative")
    for draft in ("4", "ngram", "both"):
        page.get_by_label("What drafts").select_option(draft)
        generate(page, "the")
    page.get_by_label("Mode", exact=True).select_option("full")
    generate(page, "the")
    plain = {
        "prompt": "the", "max_tokens": 24, "temperature": 0, "seed": 1234, "stream": True,
        "stream_options": {"include_usage": True}, "return_exit_details": True, "model": "model",
    }  # fmt: skip
    drawn = plain | {"temperature": 0.5, "seed": 7}
    assert sent == [
        plain | {"mode": "early_exit", "exit_thresholds": [THRESHOLD], "exit_layers": [2, 4]},
        drawn | {"mode": "early_exit", "exit_thresholds": [0.81], "exit_layers": [4]},
        drawn | {"mode": "self_speculative", "draft_source": "exit", "draft_exit": 4},
        drawn | {"mode": "self_speculative", "draft_source": "ngram"},
        drawn | {"mode": "self_speculative", "draft_source": "both"},
        drawn | {"mode": "full"},
    ]


def test_settings_that_cannot_be_are_not_sent(page: Page) -> None:
    page.route(COMPLETIONS, lambda route: pytest.fail("a request was sent"))
    page.get_by_text("More settings").click()  # now hidden
    for label in ("after layer 2", "after layer 4"):
        page.locator("#exits").get_by_text(label).evaluate("one => one.click()")
    page.get_by_label("Prompt").fill("the")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#exits")).to_be_visible()
    assert page.locator("#exits input:invalid").count() == 1


def test_what_an_exit_drafts_is_shown(page: Page, server: RunningServer) -> None:
    page.get_by_label("Mode", exact=True).select_option("self_speculative")
    generate(page, "the quick brown")
    right = complete(server, prompt="the quick brown", mode="self_speculative", draft_exit=2)["exit_details"]
    kinds = answer(page, "Self-speculative").locator(".token").evaluate_all("all => all.map((one) => one.dataset.exit)")
    assert kinds == ["draft" if one["is_draft"] else "final" for one in right]
    assert text_of(answer(page, "Self-speculative")) == complete(server, prompt="the quick brown", mode="full")["text"]

    drafted = {"exit_layer": models.NUM_LAYERS, "is_final": True, "is_draft": True}
    page.route(COMPLETIONS, lambda route: respond(route, [token("one", **drafted), token("two", is_final=True)]))
    generate(page, "the")
    shown = answer(page, "Self-speculative").locator(".token")
    assert shown.evaluate_all("all => all.map((one) => one.dataset.exit)") == ["draft", "final"]
    lines = shown.evaluate_all("all => all.map((one) => getComputedStyle(one).borderBottomStyle)")
    assert lines == ["dashed", "none"]
    shown.first.hover()
    expect(answer(page, "Self-speculative").locator(".detail")).to_contain_text("drafted, accepted by all 6 layers")


def metric(server: RunningServer, name: str) -> float:
    """The value of a metric with its labels; 0 before there is one."""
    metrics = httpx.get(f"{server.url}/metrics").text
    match = re.search(rf"^\w+{re.escape(name)} (\S+)$", metrics, re.MULTILINE)
    return float(match[1]) if match else 0.0


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_ends_the_request_on_the_server(page: Page, server: RunningServer, way: str) -> None:
    cancelled = 'request_success_total{finished_reason="cancelled"}'
    num_cancelled = metric(server, cancelled)
    page.get_by_label("Most tokens").fill("240")
    page.get_by_label("Prompt").fill("the")
    deadline = time.monotonic() + 30
    # The tiny model may have answered before a busy browser has seen the first token.
    while metric(server, cancelled) == num_cancelled:
        assert time.monotonic() < deadline, "no request ends before its answer does"
        page.evaluate(STOP_AT_THE_FIRST_TOKEN, way)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#status")).to_have_text("Stopped.")
        assert 0 < answer(page, "Early exit").locator(".token").count() < 240
        page.wait_for_timeout(200)
    assert metric(server, "num_requests_running") == 0
    num_shown = answer(page, "Early exit").locator(".token").count()
    page.wait_for_timeout(100)
    assert answer(page, "Early exit").locator(".token").count() == num_shown
    page.get_by_label("Most tokens").fill("24")
    generate(page, "the quick brown")  # and the page goes on


STOP_AT_THE_FIRST_TOKEN = """way => new MutationObserver((_, observer) => {
    if (!document.querySelector(".token")) return;
    observer.disconnect();
    const key = new KeyboardEvent("keydown", { key: "Escape", bubbles: true });
    if (way === "button") document.getElementById("stop").click();
    else document.activeElement.dispatchEvent(key);
}).observe(document.getElementById("turns"), { childList: true, subtree: true })"""


def respond(route: Route, tokens: list[dict[str, Any]], last: str = "data: [DONE]\n\n") -> None:
    """A stream of the server's form."""
    events = [{"choices": [{"index": 0, "text": one["text"], "exit_details": [one]}], "usage": None} for one in tokens]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + last
    route.fulfill(status=200, content_type="text/event-stream", body=body)


def token(text: str, **fields: Any) -> dict[str, Any]:
    plain = {"token_id": 1, "exit_layer": 2, "is_final": False, "is_draft": False, "confidence": 0.5}
    return {"text": text, **plain, **fields}


def refuse(status: int, message: str, code: str | None = None, **headers: str) -> Callable[[Route], None]:
    body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": code}})
    return lambda route: route.fulfill(status=status, content_type="application/json", body=body, headers=headers)


def break_off(route: Route) -> None:
    respond(route, [token("some")], 'data: {"error": {"message": "a worker died"}}\n\n')


ERRORS: dict[str, tuple[Callable[[Route], None], list[str]]] = {
    "overload": (refuse(429, "12 answers wait", **{"Retry-After": "7"}), ["12 answers wait", "Try again in 7 s"]),
    "loading": (refuse(503, "the model is being loaded", **{"Retry-After": "5"}), ["not ready", "in 5 s"]),
    "key": (refuse(401, "the API key is missing"), ["API key"]),
    "too long": (refuse(400, "300 tokens; 256 fit", "context_length_exceeded"), ["300 tokens; 256 fit", "Shorten"]),
    "refusal": (refuse(400, "seed is wrong"), ["refuses the request: seed is wrong."]),
    "failure": (refuse(500, "it broke"), ["The server failed: it broke.", "log"]),
    "no JSON": (lambda route: route.fulfill(status=502, body="<html>"), ["The server failed."]),
    "unreachable": (lambda route: route.abort(), ["cannot be reached"]),
    "mid-stream": (break_off, ["broke off: a worker died.", "What has come is kept"]),
    "cut": (lambda route: respond(route, [token("some")], ""), ["broke off: the connection ended."]),
}


def test_errors_are_told_in_plain_words(browser: Browser, server: RunningServer) -> None:
    with opened(browser, server, expected="Failed to load resource") as page:
        choose(page)
        for name, (handle, words) in ERRORS.items():
            page.route(COMPLETIONS, handle)
            page.get_by_label("Prompt").fill("the")
            page.get_by_role("button", name="Generate").click()
            for said in words:
                expect(page.get_by_role("alert"), name).to_contain_text(said)
                expect(page.locator("#status"), name).to_contain_text(said)  # which is in sight on a phone
            assert text_of(answer(page, "Early exit")) == ("some" if name in ("mid-stream", "cut") else "")
            expect(page.get_by_label("API key")).to_be_visible(visible=name not in ("overload", "loading"))
            page.unroute(COMPLETIONS)
        page.get_by_label("API key").fill("secret")
        with page.expect_request(COMPLETIONS) as sent:
            generate(page, "the quick brown")
        assert sent.value.headers["authorization"] == "Bearer secret"
        expect(page.locator(".error")).to_be_empty()


def test_a_failed_message_of_a_chat_can_be_sent_again(browser: Browser, server: RunningServer) -> None:
    with opened(browser, server, expected="Failed to load resource") as page:
        choose(page)
        page.get_by_label("Chat").check()
        page.route(CHAT, refuse(429, "busy"))
        page.get_by_label("Message").fill("jumps over")
        page.get_by_label("Message").press("Enter")
        expect(page.get_by_label("Message")).to_have_value("jumps over")
        page.unroute(CHAT)
        with page.expect_request(CHAT) as sent:
            page.get_by_label("Message").press("Enter")
        assert [message["content"] for message in sent.value.post_data_json["messages"]] == ["jumps over"]
        expect(page.locator("#status")).to_contain_text("Done")


def test_the_page_waits_for_the_model(browser: Browser, server: RunningServer) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.route("**/page/model", refuse(503, "the model is being loaded"))
    page.goto(server.url)
    expect(page.locator("#model")).to_contain_text("not ready: the model is being loaded.")
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    page.unroute("**/page/model")
    expect(page.locator("#model")).to_have_text("model: 6 layers, exits after layers 2, 4, up to 256 tokens")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    context.close()


def test_the_page_offers_what_the_model_has(browser: Browser, server: RunningServer) -> None:
    context = browser.new_context()
    page = context.new_page()
    described = httpx.get(f"{server.url}/page/model").json()
    assert described == {
        "name": "model", "num_layers": models.NUM_LAYERS, "exit_layers": list(models.EXITS),
        "leaving_layers": list(models.EXITS), "drafting_layers": list(models.EXITS),
        "has_probes": False, "num_positions": models.MAX_POSITIONS, "has_chat_template": True, "certified": [],
        "defaults": {
            "mode": "full", "exit_thresholds": [0.8], "certified": None, "exit_layers": [2, 4], "exit_score": "head",
            "draft_source": "exit", "draft_exit": 2,
        },
    }  # fmt: skip
    page.route("**/page/model", lambda route: route.fulfill(json=described))
    described["has_probes"] = True
    page.goto(server.url)
    page.get_by_label("Its confidence is").select_option("probe")
    with page.expect_request(COMPLETIONS) as sent:
        page.get_by_role("button", name="Generate").click()
    assert sent.value.post_data_json["exit_score"] == "probe"
    described["leaving_layers"] = []  # its exits draft
    page.goto(server.url)
    expect(page.get_by_label("Mode", exact=True)).to_have_value("self_speculative")
    expect(page.get_by_label("What drafts")).to_have_value("2")
    described |= {"exit_layers": [], "drafting_layers": [], "has_probes": False, "has_chat_template": False}
    described["defaults"] |= {"exit_layers": [], "draft_source": "ngram", "draft_exit": None}
    page.goto(server.url)
    expect(page.get_by_text("This model has no exits.")).to_be_visible()
    expect(page.get_by_text("This model has no chat template")).to_be_visible()
    expect(page.get_by_label("Chat")).to_be_disabled()
    expect(page.get_by_label("Mode", exact=True)).to_have_value("full")
    assert page.locator("#mode option:disabled").evaluate_all("all => all.map((one) => one.value)") == ["early_exit"]
    page.get_by_label("Mode", exact=True).select_option("self_speculative")
    expect(page.get_by_label("What drafts")).to_have_text("earlier text (n-grams)")
    expect(page.get_by_label("What drafts")).to_have_value("ngram")
    page.get_by_label("Show the full model's").uncheck()
    with page.expect_request(COMPLETIONS) as sent:
        page.get_by_role("button", name="Generate").click()
    said = sent.value.post_data_json
    assert (said["mode"], said["draft_source"]) == ("self_speculative", "ngram") and "draft_exit" not in said
    expect(page.locator("#status")).to_contain_text("Done", timeout=15_000)
    context.close()


def test_text_of_tokens_is_never_html(page: Page) -> None:
    texts = ["<img src=x onerror='document.title=1'>", "<script>document.title=1</script>", "&amp;", " \n "]
    page.route(COMPLETIONS, lambda route: respond(route, [token(text) for text in texts]))
    generate(page, "the")
    assert text_of(answer(page, "Early exit")) == "".join(texts)
    assert page.locator("#turns img, #turns script").count() == 0
    assert page.title() == "Megatron Early Exit"


def test_only_the_pages_own_styles_and_scripts_run(browser: Browser, server: RunningServer) -> None:
    response = httpx.get(server.url)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy and "http:" not in policy and "*" not in policy
    assert re.findall(r"(?:src|href)=[\"'](?!data:)", response.text) == []
    with opened(browser, server, expected="Content Security Policy|TrustedScript") as page:
        with pytest.raises(sync_api.Error, match="TrustedScript"):
            page.evaluate("element('script', { textContent: 'document.title = 1' })")
        page.evaluate("document.body.setAttribute('style', 'color: red')")
        page.evaluate("document.body.append(element('img', { src: '/health' }))")
        assert page.title() == "Megatron Early Exit"
        assert page.locator("body").evaluate("one => getComputedStyle(one).color") != "rgb(255, 0, 0)"


def test_everything_works_with_the_keyboard_alone(browser: Browser, server: RunningServer) -> None:
    with opened(browser, server) as page:
        expect(page.get_by_label("Prompt")).to_be_focused()
        page.keyboard.press("Control+a")
        page.keyboard.type("the quick brown")
        seen = tab_through(page, until="send")
        assert seen == ["mode", "threshold", "compare", "", "send"]  # the summary of more settings has no id
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_contain_text("Done", timeout=15_000)
        expect(page.get_by_role("button", name="Generate")).to_be_focused()
        tab_through(page, until="show-numbers")
        page.keyboard.press("Space")
        assert page.locator("#turns.numbers").count() == 1
        page.keyboard.press("Tab")
        page.keyboard.press("End")
        expect(answer(page, "Early exit").locator(".detail")).to_contain_text("confidence")
        nameless = page.locator("input, textarea, select, button, [tabindex]").evaluate_all(
            "all => all.filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim()).length"
        )
        assert nameless == 0


def tab_through(page: Page, until: str) -> list[str]:
    """Ids of what has the focus after each press of Tab."""
    seen: list[str] = []
    while not seen or seen[-1] != until:
        assert len(seen) < 20, seen
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id"))
    return seen


@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_is_wider_than_the_screen(browser: Browser, server: RunningServer, width: int) -> None:
    with opened(browser, server, viewport={"width": width, "height": 740}) as page:
        choose(page, compare=True)
        page.get_by_label("Show exit layer and confidence").check()
        long_text = [token("x" * 300), token("\n" + " " * 300), *[token(" word")] * 20]
        page.route(COMPLETIONS, lambda route: respond(route, long_text))
        generate(page, "y" * 300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        tops = page.locator(".answer").evaluate_all("all => all.map((one) => one.getBoundingClientRect().top)")
        assert (len(set(tops)) == 1) == (width == 1600), "side by side where there is room, else below each other"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart_and_read(browser: Browser, server: RunningServer, scheme: str) -> None:
    with opened(browser, server, color_scheme=scheme) as page:
        page.evaluate("""() => {
            const exits = new Exits(40, [8, 16, 24]);
            const tokens = exits.kinds.map((kind) => exits.coloured(kind, { className: "token" }));
            document.getElementById("turns").append(element("section", { className: "answer" }, tokens));
        }""")
        style = "all => all.map((one) => [getComputedStyle(one).backgroundColor, getComputedStyle(one).color])"
        *exits, _, _ = page.locator("#turns .token").evaluate_all(style)
        panel = page.locator("#turns .answer").evaluate_all(style)[0]
    text = to_linear(panel[1])
    grounds = [to_linear(background) for background, _ in exits] + [to_linear(panel[0])]
    for ground in grounds:
        assert contrast(ground, text) >= 4.5
    for weakness, matrix in COLOUR_VISION.items():
        seen = [seen_with(matrix, ground) for ground in grounds]
        for i, one in enumerate(seen):
            for other in seen[:i]:
                assert math.dist(one, other) > 0.04, (weakness, i)


def test_an_installed_package_has_the_page(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    here, there = (root / "megatron/early_exit/server/page" for root in (ROOT, tmp_path))
    names = {one.name for one in here.iterdir() if one.is_file()}
    assert {"index.html", "page.css", "page.js"} < names
    assert {one.name for one in there.iterdir()} == names
