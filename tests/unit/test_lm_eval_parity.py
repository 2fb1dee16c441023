"""What benchmarks/lm_eval_parity.py makes of its numbers."""

from __future__ import annotations

from types import SimpleNamespace

from benchmarks.lm_eval_parity import _num_tokens, _values, goals

SCORED = {
    "largest_difference_per_token": {"early-exit and hf": 2e-5, "local-completions and early-exit": 1e-6},
    "n": 3, "metrics": {"perplexity,none": {"hf": 5000.0, "early-exit": 5001.0, "local-completions": 5001.0}},
}  # fmt: skip
ANSWERED = {
    "identical_answers": {"early-exit and hf": 2, "local-completions and early-exit": 2},
    "n": 2, "metrics": {"exact_match,none": {"hf": 0.5, "early-exit": 0.5, "local-completions": 0.5}},
}  # fmt: skip


def met(*results: dict) -> list[bool | None]:
    return [goal["met"] for goal in goals(dict(enumerate(results))).values()]


def test_goals() -> None:
    assert met(SCORED, ANSWERED) == [True, True, True]
    assert met(SCORED) == [True, None, True]
    apart = {**SCORED, "largest_difference_per_token": {"early-exit and hf": 2e-4}}
    other = {**ANSWERED, "identical_answers": {"early-exit and hf": 1}}
    wrong = {**ANSWERED, "metrics": {"exact_match,none": {"hf": 0.5, "early-exit": 0.0}}}
    assert met(apart, other, wrong) == [False, False, False]


def test_likelihoods_and_their_tokens() -> None:
    assert _values([[-1.0, True], [-2.0, False]]) == [-1.0, -2.0]  # of choices
    assert _values([-3.0, True]) == [-3.0]  # of one continuation
    assert _values(-4.0) == [-4.0]  # of a text
    lm = SimpleNamespace(_encode_pair=lambda context, text: ([0], list(text)), tok_encode=list)
    request = lambda doc_id, idx, *args: SimpleNamespace(doc_id=doc_id, idx=idx, args=args)
    requests = [request(1, 0, "abc"), request(0, 1, "a", "bc"), request(0, 0, "a", "b")]
    assert _num_tokens(lm, requests) == [1, 2, 3]
