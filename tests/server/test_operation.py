"""What operates a server needs: health, how it starts, how it is told to end, what it does when its engine dies."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from megatron.early_exit.server import command_line, run
from tests.server.raw_http import connect, post, read_answer
from tests.server.serving import ROOT, RunningServer, start_server
from tests.server.test_operation_metrics import check_stages

TEXT = "/v1/completions"
SHORT = {"prompt": "reads lines", "max_tokens": 5, "ignore_eos": True}
LONG = {"prompt": "a", "n": 40, "max_tokens": 240, "ignore_eos": True}
"""Takes seconds with one slot."""


def test_a_server_that_serves_is_ready(server: RunningServer) -> None:
    for path in ("/health", "/health/ready"):
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.json()["status"]) == (200, "ready")
        assert httpx.head(server.url + path).status_code == 200
    assert httpx.get(f"{server.url}/health/live").json()["status"] == "live"


def test_a_server_ends_with_its_engine(checkpoint: Path) -> None:
    """Row 30: a dead engine never leaves health at 200."""
    with start_server(checkpoint) as running:
        running.wait_until_ready()
        assert running.is_ready()
        (engine,) = running.children()
        os.kill(engine, signal.SIGKILL)
        assert running.process.wait(15) == 1
        assert "signal 9" in running.output


# How it ends. Row 25.


def stream(server: RunningServer, body: dict) -> socket.socket:
    """A streamed request, of which something has come."""
    connection = connect(server.url)
    connection.sendall(post(TEXT, json.dumps(body | {"stream": True})))
    assert connection.recv(15, socket.MSG_PEEK | socket.MSG_WAITALL) == b"HTTP/1.1 200 OK"
    return connection


def events_of(connection: socket.socket) -> list[str]:
    body = read_answer(connection).body.decode()
    return [event.removeprefix("data: ") for event in body.split("\n\n") if event]


def ends_with(server: RunningServer, status: int) -> None:
    """All processes are gone, with this status."""
    below = server.children()
    assert server.process.wait(20) == status, server.output
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]


def test_a_dead_engine_is_replaced_and_sigterm_lets_requests_finish(checkpoint: Path) -> None:
    flags = ("--max-requests", 1, "--restart-workers")
    with start_server(checkpoint, *flags) as running, httpx.Client(base_url=running.url) as client:
        running.wait_until_ready()
        with stream(running, LONG) as connection:
            (engine,) = running.children()
            os.kill(engine, signal.SIGKILL)
            assert "signal 9" in json.loads(events_of(connection)[-1])["error"]["message"]
            assert client.get("/health").status_code == 503
        running.wait_for("loaded again and serves")
        assert running.is_ready() and client.post(TEXT, json=SHORT).status_code == 200
        with stream(running, LONG | {"n": 4}) as connection:
            running.process.send_signal(signal.SIGTERM)
            running.wait_for("^ending; ")
            refused = client.post(TEXT, json=SHORT)
            assert refused.status_code == 503 and "about to end" in refused.json()["error"]["message"]
            assert client.get("/health").status_code == 503 and client.get("/health/live").status_code == 200
            events = events_of(connection)
            assert events[-1] == "[DONE]"
            tokens = sum(len(one["exit_layers"]) for event in events[:-1] for one in json.loads(event)["choices"])
            assert tokens == 4 * 240
        ends_with(running, 0)


@pytest.mark.parametrize("seconds, signals", [(0.5, [signal.SIGTERM]), (60, [signal.SIGINT, signal.SIGINT])])
def test_requests_that_do_not_finish_are_told(checkpoint: Path, seconds: float, signals: list[int]) -> None:
    """Either the time for them ends, or a second signal comes."""
    with start_server(checkpoint, "--max-requests", 1, "--drain-seconds", seconds) as running:
        running.wait_until_ready()
        whole: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: whole.append(httpx.post(running.url + TEXT, json=LONG, timeout=60)))
        with stream(running, LONG) as connection:
            asking.start()
            time.sleep(0.3)
            for number in signals:
                running.process.send_signal(number)
                running.wait_for("^ending; ")
            started = time.monotonic()
            assert "the server ends" in json.loads(events_of(connection)[-1])["error"]["message"]
        asking.join()
        assert whole[0].status_code == 500 and "the server ends" in whole[0].json()["error"]["message"]
        ends_with(running, 0)
        assert time.monotonic() - started < 15


def test_a_server_that_loads_ends_at_once(checkpoint: Path) -> None:
    with start_server(checkpoint) as running:
        loading = httpx.get(f"{running.url}/health")
        assert loading.status_code == 503 and "loaded" in loading.json()["reason"]
        assert httpx.post(running.url + TEXT, json=SHORT).status_code == 503
        assert httpx.get(f"{running.url}/health/live").status_code == 200
        running.process.send_signal(signal.SIGTERM)
        ends_with(running, 0)
        assert "ready" not in running.output.replace("is ready", "")


def test_torchrun(checkpoint: Path) -> None:
    """Rank 0 serves, and SIGTERM to the job lets requests finish."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with start_server(checkpoint, "--tensor-model-parallel-size", 2, "--max-requests", 2, launcher=launcher) as running:
        running.wait_until_ready()
        check_stages(running, 1)
        with stream(running, LONG | {"n": 2, "max_tokens": 120}) as connection:
            running.process.send_signal(signal.SIGTERM)
            assert events_of(connection)[-1] == "[DONE]"
        running.process.wait(30)
        assert running.output.count("ready: http") == 1


# How it starts.


def run_server(*flags: object, **environment: str) -> tuple[int, str]:
    """Status and output of a server that does not start."""
    words = [sys.executable, "tools/run_text_generation_server.py", "--port", "0", *map(str, flags)]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout


def without_tokenizer(checkpoint: Path, folder: Path) -> Path:
    target = folder / "model"
    shutil.copytree(checkpoint, target)
    for found in target.rglob("tokenizer"):
        shutil.rmtree(found)
    return target


def hugging_face_folder(checkpoint: Path, folder: Path) -> Path:
    return checkpoint.parent / "hf"


def original_checkpoint(checkpoint: Path, folder: Path) -> Path:
    ranks = folder / "iter_0000001/mp_rank_00"
    ranks.mkdir(parents=True)
    (ranks / "model_optim_rng.pt").write_bytes(b"PK")
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    return folder


@pytest.mark.parametrize("make, flags, words", [
    (hugging_face_folder, (), "from-hf"),
    (original_checkpoint, (), "from-legacy"),
    (without_tokenizer, (), "tokenizer"),
    (None, ("--mode", "early_exit", "--exit-layers", 2, 3), "with the defaults of the flags: exit_layers 2 3: "),
    (None, ("--kv-cache-gib", 1e-6), "0.0 MiB of memory are free"),
])  # fmt: skip
def test_what_cannot_be_served_is_refused_in_a_sentence(
    checkpoint: Path, tmp_path: Path, make: Callable[[Path, Path], Path] | None, flags: tuple, words: str
) -> None:
    load = checkpoint if make is None else make(checkpoint, tmp_path)
    status, output = run_server("--load", load, *flags)
    lines = [line for line in output.splitlines() if not line.startswith("loading ")]
    assert status == 2 and words in output, output
    assert lines[0].startswith("run_text_generation_server.py: ") and "Traceback" not in output
    assert len(lines) == 1 + ("1 problem with the settings:" in lines[0]), output


def refused(capsys: pytest.CaptureFixture, *flags: object) -> str:
    assert command_line.main(["--load", "folder", *map(str, flags)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(capsys, "--port", port)
    assert f"--port {port}" in line and "choose another port" in line
    template = tmp_path / "chat.jinja"
    assert "chat.jinja: no such file" in refused(capsys, "--chat-template", template)
    template.write_text("{% for m in messages %}\n{{ m }")
    assert "chat.jinja is no Jinja template: line 2" in refused(capsys, "--chat-template", template)
    template.write_bytes(b"\xff")
    assert "chat.jinja is not UTF-8 text" in refused(capsys, "--chat-template", template)
    template.write_text("\n")
    assert "has no keys" in refused(capsys, "--api-key-file", template)
    assert "an API key is empty" in refused(capsys, "--api-key", "")
    assert "ulimit -n" in refused(capsys, "--max-connections", 2**40)
    assert "max_connections is 0" in refused(capsys, "--max-connections", 0)
    assert "header_seconds is nan" in refused(capsys, "--header-seconds", "nan")
    assert "port is 70000" in refused(capsys, "--port", 70000)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert "--max-restarts" in refused(capsys, "--restart-workers", "--tensor-model-parallel-size", 2)


def parse(*flags: object) -> argparse.Namespace:
    return command_line.build_parser().parse_args(["--load", "folder", *map(str, flags)])


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n\n second \n")
    monkeypatch.setenv(command_line.KEY_VARIABLE, "third")
    template = tmp_path / "template"
    template.write_text("{% generation %}{{ messages }}{% endgeneration %}{% for m in [] %}{% break %}{% endfor %}")
    config = command_line.server_config(parse(
        "--api-key", "zeroth", "--api-key-file", keys, "--chat-template", template, "--max-waiting", 3,
        "--body-seconds", 2.5, "--mode", "early_exit", "--early-exit-thres", 0.5, 0.7, "--max-deferred", 4,
        "--no-access-log", "--allowed-origins", "https://a", "https://b",
        "--use-checkpoint-args", "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", "file",
    ))  # fmt: skip
    assert config.api_keys == ("zeroth", "third", "first", "second") and "zeroth" not in repr(config)
    assert config.chat_template == template.read_text()
    assert config.engine.settings["chat_template"] == config.chat_template  # certificates may depend on it
    assert (config.limits.max_waiting, config.limits.body_seconds) == (3, 2.5)
    assert (config.defaults.mode, config.defaults.exit_thresholds) == ("early_exit", (0.5, 0.7))
    assert config.defaults.max_deferred == 4 and not config.access_log
    assert config.allowed_origins == ("https://a", "https://b")
    monkeypatch.delenv(command_line.KEY_VARIABLE)
    plain = command_line.server_config(parse())
    assert (plain.api_keys, plain.host, plain.port, plain.access_log) == ((), "127.0.0.1", 5000, True)
    assert plain.engine.settings["chat_template"] is None


def test_a_server_for_everybody_without_a_key_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for flags in ((), ("--host", "0.0.0.0", "--api-key", "secret"), ("--host", "::1"), ("--host", "localhost")):
        run.warn_if_open(command_line.server_config(parse(*flags)))
    assert not caplog.messages
    run.warn_if_open(command_line.server_config(parse("--host", "0.0.0.0")))
    assert "everybody who reaches --host 0.0.0.0" in caplog.text


def test_the_console_command_is_the_tool() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["early-exit-server"].partition(":")
    assert (module, getattr(command_line, name)) == (command_line.__name__, command_line.run)
