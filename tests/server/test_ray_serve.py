"""The Ray Serve application: a replica answers as the model without a server, and one that has lost its engine is
replaced."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams
from tests.ports import free_port
from tests.server.serving import ROOT

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "ray[serve]"')

BODY = {"model": "", "prompt": "a small model reads", "max_tokens": 12, "temperature": 0, "return_exit_details": True}


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    """Of the application that serve.yaml describes, with another checkpoint and no GPUs."""
    from ray import serve

    from examples.ee_inference.ray_serve.app import build

    port = free_port()
    [application] = yaml.safe_load((ROOT / "examples/ee_inference/ray_serve/serve.yaml").read_text())["applications"]
    assert application["import_path"] == "examples.ee_inference.ray_serve.app:build"
    args = application["args"]
    args |= {"load": str(checkpoint), "gpus": False, "cpus": 1, "engine": {"max_requests": 4}}
    os.environ["PYTHONPATH"] = str(ROOT)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(args), name=application["name"], route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_answers(url: str, offline: LLM) -> None:
    """With the defaults of the YAML file; streamed and through EE-LLM's API too."""
    params = GenerationParams(max_tokens=12, mode="early_exit", exit_thresholds=(0.8,))
    output = offline.generate(BODY["prompt"], params)[0]
    choice = httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).json()["choices"][0]
    assert choice["text"] == output.text
    assert choice["exit_layers"] == [token.exit_layer for token in output.tokens]
    stream = httpx.post(f"{url}/v1/completions", json={**BODY, "stream": True}, timeout=60)
    chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == output.text and len(chunks) > 1
    answer = httpx.put(f"{url}/api", json={"prompts": BODY["prompt"], "tokens_to_generate": 12}, timeout=60).json()
    assert answer["exit_layers"] == [choice["exit_layers"]]


def test_a_replica_without_engine_is_replaced(url: str) -> None:
    engines = [one for one in psutil.process_iter(["cmdline"]) if is_engine_of_ray(one)]
    assert len(engines) == 1
    engines[0].send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 120
    statuses = []
    while not statuses or statuses[-1] != 200:
        assert time.monotonic() < deadline, statuses
        time.sleep(1)
        statuses.append(httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).status_code)
    assert set(statuses) <= {200, 500, 503}


def is_engine_of_ray(process: psutil.Process) -> bool:
    if "megatron.early_exit.server.engine_process" not in (process.info["cmdline"] or []):
        return False
    parent = process.parent()
    return parent is not None and any("ray::" in word for word in parent.cmdline())
