"""The live audit on a model: its losses are those of the reference, teacher-forced over the answers."""

from __future__ import annotations

import pytest

from megatron.early_exit.config.run import RunConfig
from tests.distributed.engines import audit_and_check, check_invariants, make_engine
from tests.distributed.parallel_model import layout
from tests.distributed.test_engine import AUDITED
from tests.distributed.workers import run_distributed
from tests.reference_checkpoint import HEADS, decoding_config


def audit(cfg: RunConfig) -> list[float]:
    """Mean losses, of requests in one batch and of those that come where others have ended."""
    with layout(cfg):
        engine = make_engine(cfg, prefill_chunk=8, num_slots=3)
        losses = [audit_and_check(cfg, engine, requests) for requests in (AUDITED, AUDITED[2:], AUDITED[3:4])]
        check_invariants(engine)
        return losses


@pytest.mark.parametrize("head", ["untied_norm", "block"])
def test_losses_are_those_of_the_reference(head: str) -> None:
    """Where nothing exits nothing differs, and rows that were deferred when the answer ended are computed."""
    ((*losses, without_exits),) = run_distributed(1, audit, cfg=decoding_config(**HEADS[head]))
    assert all(0 < loss < 1 for loss in losses) and without_exits == 0
