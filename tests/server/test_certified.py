"""Certified levels over HTTP, and what audits say of them: one server, whose certificates are made up. That of 0.9
promises what a random model does not keep: every token leaves after layer 2."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron.early_exit.data.tokenizer import build_tokenizer
from megatron.early_exit.inference.certificates import AnswerSettings, Certificate, add_certificates
from megatron.early_exit.inference.command_line import main as generate
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.loading import InferenceCheckpoint, LoadConfig
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from megatron.early_exit.server import client_command, command_line
from tests.server import test_page
from tests.server.raw_http import connect, post
from tests.server.serving import RunningServer, start_server
from tests.server.test_operation_metrics import Numbers, change, numbers

LENGTH = 20
BROKEN = "certified:0.9"
PROMPT = "reads lines of"


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with certificates."""
    path = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("certified") / "model"))
    loaded = InferenceCheckpoint(LoadConfig(path=str(path)))
    kept = Certificate(
        0.99, 0.05, "A-max", loaded.exit_fingerprint(build_tokenizer(loaded.description.tokenizer)),
        AnswerSettings(LENGTH, ignore_eod=True), {4: 1.0}, refusal=None, p_value=0.01, calibration_risk=0.002,
        num_prompts={"calibration": 500},
    )  # fmt: skip
    add_certificates(loaded.folder, [
        kept,
        replace(kept, level=0.9, thresholds={2: 0.0, 4: 0.5}),
        replace(kept, level=0.999, thresholds={}, refusal="500 prompts are too few; 2,495 more are needed"),
        replace(kept, level=0.95, fingerprint=replace(kept.fingerprint, dtype="bf16")),
    ])  # fmt: skip
    return path


@pytest.fixture(scope="module")
def certified(folder: Path) -> Iterator[RunningServer]:
    with start_server(folder, "--max-requests", 2, "--audit-share", 1, "--certified", 0.99) as running:
        yield running.wait_until_ready()


@pytest.fixture(scope="module")
def alone(folder: Path) -> LLM:
    """The same without a server."""
    return LLM.load(str(folder), max_requests=2, audit_share=1.0)


def complete(server: RunningServer, path: str = "completions", **body: Any) -> dict[str, Any]:
    body = {"return_token_ids": True, **({"prompt": PROMPT} if path == "completions" else {}), **body}
    response = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()


def promised(answer: dict[str, Any]) -> tuple[str, float | None]:
    exits = answer["usage"]["early_exit"]
    return exits["mode"], exits["certified"]


def tokens_of(llm: LLM, prompt: str | list[int], thresholds: str = BROKEN) -> list[int]:
    params = GenerationParams(mode="early_exit", exit_thresholds=thresholds, max_tokens=LENGTH, ignore_eod=True)
    return llm.generate([prompt], params)[0].result.token_ids


def loss_of(llm: LLM, prompt_ids: list[int], answer: list[int]) -> float:
    """Share of the answer that the full model, teacher-forced, does not choose."""
    scores = llm.score([prompt_ids + answer], ScoreParams(exit_layers=()))[0].heads[0].tokens
    best = scores[len(prompt_ids) - 1 : -1]
    return sum(map(int.__ne__, best, answer)) / len(answer)


# What a request may ask for.


def test_the_model_says_what_is_certified(certified: RunningServer) -> None:
    (model,) = httpx.get(f"{certified.url}/v1/models").json()["data"]
    broken, kept = model["certified"]
    assert kept == {
        "level": 0.99, "of": "tokens", "delta": 0.05, "thresholds": {"4": 1.0}, "max_tokens": LENGTH,
        "ignore_eos": True, "prompts": {"calibration": 500}, "calibration_risk": 0.002,
        "is_certified_free_running": False, "date": "",
    }  # fmt: skip
    assert (broken["level"], broken["thresholds"]) == (0.9, {"2": 0.0, "4": 0.5})
    assert httpx.get(f"{certified.url}/page/model").json()["certified"] == model["certified"]
    assert "certified levels of early exit: 0.9, 0.99" in certified.output
    assert "certificates that do not hold: the certificate of 0.95 is for another dtype" in certified.output


def test_who_asks_for_a_level_gets_the_certified_length_and_greedy_answers(
    certified: RunningServer, alone: LLM
) -> None:
    answer = complete(certified, exit_thresholds=BROKEN)
    assert promised(answer) == ("early_exit", 0.9)
    assert answer["choices"][0]["token_ids"] == tokens_of(alone, PROMPT)
    assert answer["choices"][0]["exit_layers"] == [2] * LENGTH
    explicit = complete(certified, exit_thresholds=BROKEN, max_tokens=LENGTH, temperature=0, ignore_eos=True)
    assert explicit["choices"] == answer["choices"]


def test_chats_and_streams(certified: RunningServer, alone: LLM) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    body = {"messages": messages, "exit_thresholds": BROKEN, "stream": True, "stream_options": {"include_usage": True}}
    text = httpx.post(f"{certified.url}/v1/chat/completions", json={**body, "return_token_ids": True}).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    ids = [one for chunk in chunks for choice in chunk["choices"] for one in choice.get("token_ids", [])]
    assert ids == tokens_of(alone, alone.tokenizer.chat(messages))
    assert promised(chunks[-1]) == ("early_exit", 0.9)


def test_the_megatron_api(certified: RunningServer, alone: LLM) -> None:
    ask = lambda **body: httpx.put(f"{certified.url}/api", json={"prompts": [PROMPT], **body}).json()
    answer = ask(use_early_exit=True, early_exit_thres=BROKEN)
    assert (answer["certified"], answer["exit_layers"]) == (0.9, [[2] * LENGTH])
    assert "holds for greedy answers" in ask(early_exit_thres=BROKEN, temperature=1.0)["message"]
    assert f"max_tokens {LENGTH}, not 5" in ask(early_exit_thres=BROKEN, tokens_to_generate=5)["message"]
    assert ask(tokens_to_generate=5)["certified"] is None
    assert ask()["certified"] == 0.99


@pytest.mark.parametrize("words, body", [
    ("500 prompts are too few; 2,495 more are needed", {"exit_thresholds": "certified:0.999"}),
    ("there are certified:0.9, certified:0.99", {"exit_thresholds": "certified:0.95"}),
    ("greedy answers", {"exit_thresholds": BROKEN, "temperature": 0.5}),
    ("greedy answers", {"exit_thresholds": BROKEN, "frequency_penalty": 0.5}),
    (f"max_tokens {LENGTH}, not 7", {"exit_thresholds": BROKEN, "max_tokens": 7}),
    ("min_tokens", {"exit_thresholds": BROKEN, "min_tokens": 2}),
    ("as certified:0.99", {"exit_thresholds": "certified:1.5"}),
    ("as certified:0.99", {"exit_thresholds": "0.9"}),
    ("between 0 and 1", {"exit_thresholds": "certified:.0"}),
])  # fmt: skip
def test_what_no_certificate_covers_is_refused_with_the_reason(
    words: str, body: dict[str, Any], certified: RunningServer
) -> None:
    response = httpx.post(f"{certified.url}/v1/completions", json={"prompt": PROMPT, **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "exit_thresholds") and words in error["message"]


def test_a_server_without_certificates_says_why(server: RunningServer) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "exit_thresholds": "certified:0.99"})
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and "the checkpoint has none" in message and "calibrate" in message
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["certified"] == []


@pytest.mark.parametrize("body, expected", [
    ({"temperature": 0}, ("early_exit", 0.99)),
    ({"temperature": 0, "max_tokens": LENGTH}, ("early_exit", 0.99)),
    ({"temperature": 0, "max_tokens": 5}, ("full", None)),
    ({}, ("full", None)),
    ({"n": 2}, ("full", None)),
    ({"temperature": 0, "exit_thresholds": 0.5, "max_tokens": 5}, ("early_exit", None)),
    ({"mode": "full", "exit_thresholds": BROKEN}, ("full", None)),
    ({"mode": "self_speculative", "max_tokens": 5}, ("self_speculative", None)),
])  # fmt: skip
def test_the_default_level_holds_for_requests_that_it_covers(
    body: dict[str, Any], expected: tuple, certified: RunningServer
) -> None:
    """The full model answers others."""
    answer = complete(certified, **body)
    assert promised(answer) == expected
    length = body.get("max_tokens", LENGTH if expected[1] else 16)
    assert all(len(choice["token_ids"]) <= length for choice in answer["choices"])
    if expected[1]:
        assert len(answer["choices"][0]["token_ids"]) == LENGTH


def test_the_page_offers_certified_levels(certified: RunningServer) -> None:
    """Its requests are those of the API, also for the full model's answer beside it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is missing")
    if test_page.CHROMIUM is None:
        pytest.skip("there is no /usr/bin/chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=test_page.CHROMIUM, args=test_page.FLAGS)
        with test_page.opened(browser, certified) as page:
            sent: list[dict[str, Any]] = []
            page.on("request", lambda one: "completions" in one.url and sent.append(one.post_data_json))
            levels = page.get_by_label("What tokens need to leave")
            sync_api.expect(levels).to_have_value("0.99")  # the server's default
            levels.select_option(label="Certified: 90% of the tokens are the full model's")
            page.get_by_text("More settings").click()
            sync_api.expect(page.get_by_label("A token leaves")).to_be_hidden()
            sync_api.expect(page.get_by_label("Most tokens")).to_be_disabled()
            test_page.generate(page, PROMPT)
            assert len(page.locator(".answer").first.locator(".token").all()) == LENGTH
            levels.select_option("")
            sync_api.expect(page.get_by_label("A token leaves")).to_be_visible()
            sync_api.expect(page.get_by_label("Most tokens")).to_be_enabled()
        browser.close()
    asked = [{key: body.get(key) for key in ("mode", "exit_thresholds", "max_tokens", "temperature")} for body in sent]
    common = {"max_tokens": LENGTH, "temperature": 0}
    assert asked == [
        {"mode": "early_exit", "exit_thresholds": BROKEN, **common},
        {"mode": "full", "exit_thresholds": None, **common},
    ]


# Programs.


def test_programs(folder: Path, certified: RunningServer, alone: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--json", "--certified", "0.9"]
    assert generate(["--load", str(folder), "--prompt", PROMPT, *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [token["token"] for token in document["tokens"]] == tokens_of(alone, PROMPT)
    assert client_command.main([PROMPT, "--url", certified.url, *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["exit_layers"] == [2] * LENGTH and document["usage"]["early_exit"]["certified"] == 0.9
    assert client_command.main([PROMPT, "--url", certified.url, "--api", "megatron", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["certified"] == 0.9
    assert client_command.main([PROMPT, "--url", certified.url, "--certified", "0.999"]) == 1
    assert generate(["--load", str(folder), "--prompt", PROMPT, "--certified", "0.999"]) == 2
    error = capsys.readouterr().err
    assert error.count("500 prompts are too few") == 2
    assert generate(["--load", str(folder), "--prompt", PROMPT, "--certified", "0.9", "--tokens-to-generate", "5"]) == 2
    assert f"max_tokens {LENGTH}, not 5" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--certified", "0.9", "--early-exit-thres", "0.5"], "--certified and --early-exit-thres"),
    (["--certified", "0.9", "--mode", "full"], "--certified has no effect"),
    (["--certified", "1.5"], "a certified level is 1.5"),
])  # fmt: skip
def test_flags_that_contradict_each_other(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--load", "nowhere", *flags]) == 2
    assert generate(["--load", "nowhere", "--prompt", "a", *flags]) == 2
    assert capsys.readouterr().err.count(words) == 2
    if flags[1] != "1.5":
        assert client_command.main(["a", *flags]) == 2
        assert words in capsys.readouterr().err


def test_a_default_level_that_is_not_there_ends_the_start(checkpoint: Path) -> None:
    with start_server(checkpoint, "--certified", 0.99) as server:
        assert server.process.wait(60) == 2
        assert "certified:0.99 needs a certificate" in server.output


# Audits.


def settled(server: RunningServer, condition: Callable[[Numbers], bool], seconds: float = 20) -> Numbers:
    """Audits wait until nothing else runs, and /metrics hears of them once a second."""
    deadline = time.monotonic() + seconds
    while not condition(now := numbers(server)):
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
    return now


def audited(now: Numbers, promise: str) -> float:
    return now.get(("audited_requests_total", (("promise", promise),)), 0.0)


def quiet(server: RunningServer) -> Numbers:
    """When everything that has ended is audited: what is counted does not change for longer than a ping takes."""
    before, since = numbers(server), time.monotonic()
    while time.monotonic() < since + 2.5:
        now = numbers(server)
        changed = {key for key in now if "audit" in key[0] and now[key] != before.get(key)}
        before, since = (now, time.monotonic()) if changed else (before, since)
        time.sleep(0.1)
    return before


def test_a_promise_that_is_not_kept_raises_an_alarm(certified: RunningServer, alone: LLM) -> None:
    before, prompts = quiet(certified), [f"{PROMPT} {number}" for number in range(8)]
    answers = complete(certified, prompt=prompts, exit_thresholds=BROKEN)["choices"]
    kept = complete(certified, prompt=prompts[:3], temperature=0)["choices"]
    after = settled(certified, lambda now: audited(now, "0.9") - audited(before, "0.9") == 8)
    after = settled(certified, lambda now: audited(now, "0.99") - audited(before, "0.99") == 3)
    losses = [loss_of(alone, one["prompt_token_ids"], one["token_ids"]) for one in answers]
    assert sum(losses) > 4
    assert change(before, after, "audit_loss_sum", promise="0.9") == pytest.approx(sum(losses))
    assert change(before, after, "audit_loss_count", promise="0.9") == 8
    above = sum(loss > 0.5 for loss in losses)
    assert 8 - change(before, after, "audit_loss_bucket", promise="0.9", le="0.5") == above
    losses = [loss_of(alone, one["prompt_token_ids"], one["token_ids"]) for one in kept]
    assert change(before, after, "audit_loss_sum", promise="0.99") == pytest.approx(sum(losses))
    assert after["audit_alarms_total", (("promise", "0.9"),)] > 0
    assert after["audit_evidence", (("promise", "0.99"),)] >= 0
    certified.wait_for(r"early exit does not keep its promise: with 'certified:0.9' .* calibrate again")
    assert certified.is_ready()


def test_a_client_that_leaves_is_audited_for_what_it_has_got(certified: RunningServer) -> None:
    before = quiet(certified)
    body = {"prompt": PROMPT, "max_tokens": 240, "exit_thresholds": 0.5, "temperature": 0, "ignore_eos": True}
    connection = connect(certified.url)
    connection.sendall(post("/v1/completions", json.dumps({**body, "stream": True})))
    while b"data: " not in connection.recv(4096):
        pass
    connection.close()
    after = settled(certified, lambda now: audited(now, "none") > audited(before, "none"))
    assert change(before, after, "request_success_total", finished_reason="cancelled") == 1
    assert change(before, after, "audited_requests_total", promise="none") == 1


def test_what_is_sampled_is_counted_as_not_auditable(certified: RunningServer) -> None:
    before = quiet(certified)
    complete(certified, exit_thresholds=0.5, temperature=1.0, max_tokens=4)
    counted = lambda now: change(before, now, "audit_not_auditable_total", promise="none")
    after = settled(certified, lambda now: counted(now) == 1)
    assert change(before, after, "audited_requests_total", promise="none") == 0


def test_a_program_may_run_audits_too(alone: LLM) -> None:
    alone.finish_audits()
    total = lambda: {one.promise: (one.num_audited, one.loss_sum) for one in alone.finish_audits()}
    before = total().get("0.9", (0, 0.0))
    ids = alone.tokenizer.encode_prompt(PROMPT)
    answer = tokens_of(alone, ids)
    assert alone.engine.audit.has_work, "nothing waits for audits"
    after = total()["0.9"]
    assert after[0] - before[0] == 1
    assert after[1] - before[1] == pytest.approx(loss_of(alone, ids, answer))
