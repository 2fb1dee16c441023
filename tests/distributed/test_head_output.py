"""Heads over tensor-parallel ranks: each has a slice of the vocabulary, all say and draw what one rank does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.early_exit.inference.params import SamplingSettings
from megatron.early_exit.inference.worker.head_output import HeadOutput, ShortlistColumns
from megatron.early_exit.inference.worker.sampling import Draw
from megatron.early_exit.inference.worker.tensor_parallel import TensorParallel
from tests.distributed.workers import run_distributed

VOCABULARY, ROWS = 3000, 5
COLUMNS = {1: 3000, 2: 1504, 3: 1504}
"""By ranks: two have eight columns of padding, of three the last has nothing else."""
SHORTLIST = tuple(range(1, 1400, 7)) + (1600, 1601, 2999)
PENALTIES = {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "presence_penalty": 0.3}
SETTINGS = [
    {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 40}, {"temperature": 1.0, "top_p": 0.5}, PENALTIES,
    {"temperature": 3.0, "top_p": 0.95},  # more than each rank's 512 largest
    {"temperature": 2.0, "top_k": 900, "top_p": 0.9}, {"temperature": 1.5, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01, **PENALTIES}, {"temperature": 5.0, **PENALTIES},
    {"temperature": 1e-5}, {"temperature": 1e300},
]  # fmt: skip


def all_logits(dtype: torch.dtype) -> torch.Tensor:
    """[rows, vocabulary]; the last row is flat, the one before it has many equal values."""
    logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(4)) * 3
    logits[ROWS - 2] = logits[ROWS - 2].round()
    logits[ROWS - 1] = 0.0
    return logits.to(dtype)


def head(tp: TensorParallel, dtype: torch.dtype, shortlist: bool) -> HeadOutput:
    columns = COLUMNS[tp.size]
    garbage = torch.full((ROWS, columns * tp.size - VOCABULARY), 1e4, dtype=dtype)  # padding may hold anything
    padded = torch.cat([all_logits(dtype), garbage], 1)
    if not shortlist:
        local = padded[:, tp.rank * columns : (tp.rank + 1) * columns].clone()
        return HeadOutput(local, vocab_size=VOCABULARY, tp=tp)
    ids = torch.tensor(SHORTLIST)
    longest = int(torch.bincount(ids // columns).max())
    mine = ids[ids // columns == tp.rank]
    filled = torch.cat([mine, mine.new_full((longest - len(mine),), tp.rank * columns)])
    return HeadOutput(padded[:, filled], vocab_size=VOCABULARY, tp=tp, shortlist=ShortlistColumns(filled, len(mine)))


def draws() -> list[Draw]:
    settings = [SamplingSettings(seed=seed, **one) for seed, one in enumerate(SETTINGS * 5)]
    # The answer's ids lie on all ranks.
    return [Draw(i % ROWS, one, i, [8, 15, 8, 1502 + i, 8, 2999], 2) for i, one in enumerate(settings)]


def results(tp_size: int, dtype: torch.dtype, shortlist: bool) -> dict[str, Any]:
    tp = TensorParallel(torch.distributed.group.WORLD if tp_size > 1 else None)
    with torch.inference_mode():
        output, rows = head(tp, dtype, shortlist), list(range(ROWS))
        return {
            "draws": output.draw(draws()),
            "rows": [(output.token(row), output.max_log_prob(row), output.confidence(row)) for row in rows],
            "top": output.top(rows, 9),
            "many": output.top([1], 5000),
            "log_probs": output.log_probs_of([0, 0, 1, 4, 3], [1, 1600, 8, 2999, 1504]),
            "logits": [output.logits(row).numpy() for row in rows],
        }


@pytest.mark.parametrize("shortlist", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp_size", [2, 3])
def test_ranks_draw_what_one_rank_does(tp_size: int, dtype: torch.dtype, shortlist: bool) -> None:
    expected = results(1, dtype, shortlist)
    ranks = run_distributed(tp_size, results, tp_size=tp_size, dtype=dtype, shortlist=shortlist)
    logits = [rank.pop("logits") for rank in ranks]
    assert all(rank == ranks[0] for rank in ranks), "equal bit for bit"
    assert all((a == b).all() for rank in logits for a, b in zip(rank, expected["logits"], strict=True))
    drawn = ranks[0]
    assert [token for token, _ in drawn["draws"]] == [token for token, _ in expected["draws"]]
    assert len({token for token, _ in drawn["draws"]}) > 20
    for name in ("draws", "top", "many", "rows", "log_probs"):
        flat = [torch.tensor(one[name]).flatten().tolist() for one in (drawn, expected)]
        assert flat[0] == pytest.approx(flat[1], abs=1e-6), name
    assert len(drawn["many"][0]) == (len(SHORTLIST) if shortlist else VOCABULARY)


def test_exact_log_probs() -> None:
    """What one rank says, which the others are compared with."""
    said, exact = results(1, torch.float32, False), all_logits(torch.float32).double().log_softmax(-1)
    for one, (token, log_prob) in zip(draws(), said["draws"], strict=True):
        assert log_prob == pytest.approx(exact[one.row, token].item(), abs=2e-6)
    assert said["log_probs"] == pytest.approx(exact[[0, 0, 1, 4, 3], [1, 1600, 8, 2999, 1504]].tolist(), abs=2e-6)


def one_bad_rank(bad: float) -> list:
    tp = TensorParallel(torch.distributed.group.WORLD)
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(tp.rank))
    if tp.rank == 1:
        logits[1, 7] = bad
    output = HeadOutput(logits, vocab_size=100, tp=tp)
    drawn = output.draw([Draw(row, SamplingSettings(1.0, top_p=0.9), 0, (), 0) for row in (0, 1)])
    return [output.is_finite(0), output.is_finite(1), drawn[0], drawn[1][0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_on_one_rank_is_so_on_all(bad: float) -> None:
    first, second = run_distributed(2, one_bad_rank, bad=bad)
    assert first == second
    assert first[:2] == [True, False] and first[3] == 0 and first[2][1] < 0


def of_an_excluded_shortlist() -> list[tuple[int, float]]:
    """Both of its ids are the second rank's; the first one has columns of padding alone."""
    tp = TensorParallel(torch.distributed.group.WORLD)
    ids = torch.tensor([[0, 0], [60, 70]][tp.rank])
    output = HeadOutput(torch.tensor([[1.0, 2.0]]), vocab_size=100, tp=tp, shortlist=ShortlistColumns(ids, 2 * tp.rank))
    settings = [SamplingSettings(), SamplingSettings(1.0), SamplingSettings(1.0, top_p=0.5), SamplingSettings(2.0, 9)]
    return [output.draw([Draw(0, one, 0, (), 0, (60, 70))])[0] for one in settings]


def test_of_a_shortlist_that_is_excluded_one_of_its_ids_is_drawn() -> None:
    first, second = run_distributed(2, of_an_excluded_shortlist)
    assert first == second
    assert {token for token, _ in first} <= {60, 70}
