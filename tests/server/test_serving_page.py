"""docs/serving.md: its `curl` lines do what the page says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess

import pytest

from tests.server.serving import ROOT, RunningServer

PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
CURLS = [line.strip() for line in re.findall(r"^curl .*(?:\n[^\n`]*?\}')*$", SHELL, re.MULTILINE)]
ADDRESS = "http://127.0.0.1:5000"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", CURLS or ["curl"])
def test_curl_lines_work(server: RunningServer, line: str) -> None:
    """As they stand, but for the port."""
    assert ADDRESS in line
    words = shlex.split(line.replace(ADDRESS, server.url).partition(" #")[0])
    done = subprocess.run([*words, "-sS", "--fail-with-body", "--max-time", "30"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if "/metrics" in line:
        assert "early_exit_" in done.stdout
    elif '"stream": true' in line:
        events = [event.removeprefix("data: ") for event in done.stdout.split("\n\n") if event]
        assert events[-1] == "[DONE]"
        assert all(json.loads(event) for event in events[:-1])
    else:
        json.loads(done.stdout)
