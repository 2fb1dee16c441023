"""Row 31: the schema of the server, and requests that schemathesis makes of it: whatever comes, no server error, no
status that is not documented, no answer of another form, and nothing that the schema forbids is accepted."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from pydantic import TypeAdapter, ValidationError
from schemathesis import GenerationMode, checks

from megatron.early_exit.server.request_fields import Ids
from tests.server.serving import RunningServer

BODIES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
PATHS = (*BODIES, "/v1/models", "/v1/models/{name}", "/tokenizer_info")
CHECKS = [
    checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance, checks.response_headers_conformance, checks.negative_data_rejection,
]  # fmt: skip
"""Not `positive_data_acceptance`: a schema cannot say which ids, exits and roles there are, nor how much fits."""

NEEDED = {
    "/v1/completions": {"prompt": "a small model"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a small model"}]},
}
DEPENDS = (
    "model", "stop_token_ids", "logit_bias", "exit_layers", "exit_thresholds", "draft_exit", "plan_exits",
    "speculation", "stream_options", "min_tokens", "best_of", "top_logprobs", "max_completion_tokens", "echo",
)  # fmt: skip
"""Fields whose values depend on the model or on other fields: every second request has none, and is answered."""

FEW = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(autouse=True)
def subnormals() -> Iterator[None]:
    """hypothesis makes numbers that a model in this process may have had flushed to zero."""
    are_flushed = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(are_flushed)


@pytest.fixture(scope="module")
def document(server: RunningServer) -> dict:
    return httpx.get(f"{server.url}/openapi.json").json()


@pytest.mark.parametrize(
    ("path", "mode"),
    [(path, GenerationMode.POSITIVE) for path in PATHS] + [(path, GenerationMode.NEGATIVE) for path in BODIES],
    ids=lambda value: value if isinstance(value, str) else value.value,
)
def test_requests_that_a_program_makes(path: str, mode: GenerationMode, server: RunningServer, document: dict) -> None:
    (method,) = document["paths"][path]
    operation = schemathesis.openapi.from_dict(document)[path][method.upper()]
    statuses = []

    @FEW
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        if mode == GenerationMode.POSITIVE and "completions" in path:
            if len(statuses) % 2:
                case.body = {name: value for name, value in case.body.items() if name not in DEPENDS} | NEEDED[path]
            # As much as it likes would take as long as it likes.
            case.body["n"] = min(case.body.get("n") or 1, 2)
            case.body["max_tokens"] = min(case.body.get("max_tokens") or 1, 4)
        response = case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=30)
        statuses.append(response.status_code)

    send()
    assert statuses and (mode == GenerationMode.NEGATIVE or 200 in statuses or "{name}" in path)
    assert httpx.get(f"{server.url}/health").status_code == 200


def _everything(node: object) -> Iterator[dict]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _everything(value)
    elif isinstance(node, list):
        for value in node:
            yield from _everything(value)


def test_every_object_says_what_it_holds(document: dict) -> None:
    """No untyped dictionaries; every status that a route may give is documented."""
    for name, schema in document["components"]["schemas"].items():
        for node in _everything(schema):
            if node.get("type") == "object":
                typed = node.get("additionalProperties") not in (None, True) or "patternProperties" in node
                assert "properties" in node or typed, (name, node)
    for path in PATHS:
        (operation,) = document["paths"][path].values()
        assert {"200", "400", "401", "404", "413", "429", "500", "503"} <= set(operation["responses"])
        assert "422" not in operation["responses"]


def test_long_lists_of_the_wrong_kind_are_given_up_at_once() -> None:
    """Row 16: one error, not one for each of a million items."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Ids).validate_python(["a"] * 1000)
    assert caught.value.error_count() == 1
