"""One GPU, one process: its world."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    from megatron.early_exit.platform.distributed import destroy_distributed, initialize_distributed

    torch.backends.cuda.matmul.allow_tf32 = False
    initialize_distributed(timeout_minutes=1)
    yield
    destroy_distributed()
