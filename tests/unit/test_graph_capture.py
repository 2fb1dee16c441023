"""The calls of a capture, in their order, with CUDA's interface replaced: the real one is in tests/gpu/."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron.early_exit.inference.worker import graphs


class Cuda:
    """Notes what is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def current_stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: self.calls.append("steps wait for the run"))

    def Stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: self.calls.append("the run waits for steps"))

    @contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        self.calls.append("beside")
        yield

    @contextmanager
    def graph(self, graph: SimpleNamespace, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert pool == (1, 2) and capture_error_mode == "thread_local"
        self.calls.append("begin")
        yield
        self.calls.append("end")

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    def graph_pool_handle(self) -> tuple[int, int]:
        return 1, 2


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    fake = Cuda()
    names = ("current_stream", "Stream", "stream", "graph", "CUDAGraph", "graph_pool_handle")
    with mock.patch.multiple(torch.cuda, **{name: getattr(fake, name) for name in names}):
        yield fake


class TwoGraphs(graphs.ModelGraphs):
    """On a "GPU", of one shape with one part."""

    def __init__(self, cuda: Cuda) -> None:
        self._attention = SimpleNamespace(cache=SimpleNamespace(device=torch.device("cuda", 0)))
        self._shapes, self._parts = (graphs.GraphShape(1, 1, 8),), {"layers": None}
        self._graphs, self._cuda = {}, cuda

    def _capture_shape(self, shape: graphs.GraphShape, cuda: Any) -> graphs._ShapeGraphs:
        launch = lambda: self._cuda.calls.append("launch")
        return graphs._ShapeGraphs(graphs._graph(launch, cuda), {"layers": graphs._graph(launch, cuda)})


def test_everything_runs_once_before_it_is_captured(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    two = TwoGraphs(cuda)
    with caplog.at_level(logging.INFO), mock.patch.object(graphs, "free_memory_bytes", side_effect=[3 * 2**30, 2**30]):
        two.capture()
    one = ["the run waits for steps", "beside", "launch", "steps wait for the run", "begin", "launch", "end"]
    assert cuda.calls == one * 2
    assert "captured 2 CUDA graphs (1 shapes, 1 parts of the model)" in caplog.text
    assert "they take 2.00 GiB" in caplog.text and two.num_bytes == 2**31
    two._graphs[two._shapes[0]].parts["layers"]()
    assert cuda.calls == [*one * 2, "replay"]


def test_too_little_memory_is_said_in_one_sentence(cuda: Cuda) -> None:
    two = TwoGraphs(cuda)
    with (
        mock.patch.object(graphs, "free_memory_bytes", return_value=2**29),
        mock.patch.object(two, "_capture_shape", side_effect=torch.cuda.OutOfMemoryError("CUDA out of memory")),
        pytest.raises(ValueError, match=r"0\.5 GiB .* too little for CUDA graphs; choose fewer max_requests"),
    ):
        two.capture()
