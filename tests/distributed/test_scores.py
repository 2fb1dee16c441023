"""Scores of given tokens against the reference: every head, batches, chunks, and heads that need few layers alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from megatron.early_exit.inference.results import ScoreResult
from tests.configs import VOCAB_SIZE
from tests.distributed.engines import check_invariants, make_engine, reference_over, run_all, score_all, worker_of
from tests.distributed.parallel_model import layout
from tests.distributed.workers import run_distributed
from tests.reference_checkpoint import HEADS, MAX_POSITIONS, STYLES, decoding_config

LONGEST = [(7 * index) % VOCAB_SIZE for index in range(MAX_POSITIONS + 1)]
SEQUENCES = [[5, 17, 80, 3, 41] * 4, [7], list(range(30)), [9, 9], [5, 17, 80, 3, 41] * 4 + [1]]


def check_scores(cfg: RunConfig, params: ScoreParams, tokens: list[int], result: ScoreResult) -> None:
    """Whatever is asked for follows from the reference's logits."""
    assert result.error is None
    assert [head.exit_layer for head in result.heads] == list(params.heads(cfg.exits))
    _, logits = reference_over(cfg, tokens if params.score_last else tokens[:-1])
    for head in result.heads:
        expected = logits[head.exit_layer][params.score_from :, :VOCAB_SIZE]
        log_probs = expected.log_softmax(-1)
        best = log_probs.max(-1)
        assert list(head.tokens) == best.indices.tolist()
        assert head.confidences == pytest.approx(best.values.exp().tolist(), rel=1e-4)
        following = torch.tensor(tokens[params.score_from + 1 :], dtype=torch.long)
        of_targets = log_probs[: len(following)].gather(1, following[:, None])[:, 0]
        assert head.log_probs == pytest.approx(of_targets.tolist(), rel=1e-4, abs=1e-5)
        if params.top_log_probs:
            assert len(head.top_log_probs) == len(expected)
            for ours, theirs in zip(head.top_log_probs, log_probs.topk(params.top_log_probs).values.tolist()):
                assert [value for _, value in ours] == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        if params.logits:
            assert head.logits.shape[0] == len(expected)
            assert abs(head.logits[:, :VOCAB_SIZE] - expected.numpy()).max() < 1e-4


def score(cfg: RunConfig, params: ScoreParams, **changes: Any) -> None:
    with layout(cfg):
        engine = make_engine(cfg, **{"num_slots": 3, "prefill_chunk": 8, **changes})
        sequences = [one for one in SEQUENCES if len(one) > params.score_from + params.num_targets]
        sequences += [] if params.score_last else [LONGEST]  # the last token takes no position
        results = score_all(engine, sequences, params)
        for tokens, result in zip(sequences, results, strict=True):
            check_scores(cfg, params, tokens, result)
        check_invariants(engine)


@pytest.mark.parametrize(
    ("head", "style"), [*((head, "llama") for head in HEADS), *(("tied", style) for style in STYLES)]
)
def test_scores_of_all_heads(head: str, style: str) -> None:
    cfg = decoding_config(**HEADS[head], **STYLES[style])
    run_distributed(1, score, cfg=cfg, params=ScoreParams(top_log_probs=3, logits=True))


@pytest.mark.parametrize("params", [
    ScoreParams(exit_layers=(2,), final=False), ScoreParams(exit_layers=()), ScoreParams(score_from=3),
    ScoreParams(exit_layers=(3, 1), score_from=11, top_log_probs=2), ScoreParams(exit_layers=(1,), score_from=9),
    ScoreParams(score_last=False), ScoreParams(exit_layers=(2,), final=False, score_from=4, score_last=False),
    ScoreParams(exit_layers=(), score_from=16, score_last=False, logits=True),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("head", ["mlp", "pre_exit_block"])
def test_some_heads_and_some_positions(head: str, params: ScoreParams) -> None:
    run_distributed(1, score, cfg=decoding_config(**HEADS[head]), params=params)


def test_scores_with_tensor_parallelism() -> None:
    cfg = decoding_config(tensor_model_parallel_size=2, use_exit_block=True)
    run_distributed(2, score, cfg=cfg, params=ScoreParams(top_log_probs=3, logits=True))


def count_layers(cfg: RunConfig) -> list[int]:
    """Layers that ran for one sequence, by the deepest head."""
    counts = []
    with layout(cfg):
        for heads in ((1,), (1, 2), (3,)):
            engine = make_engine(cfg)
            decoder, ran = worker_of(engine).decoder, []
            run_layers = decoder.run_layers
            decoder.run_layers = lambda h, a, first, last, run=run_layers, ran=ran: (
                ran.append(last - first) or run(h, a, first, last)
            )
            score_all(engine, [[1, 2, 3]], ScoreParams(exit_layers=heads, final=False))
            counts.append(sum(ran))
    return counts


def test_layers_behind_the_deepest_head_do_not_run() -> None:
    assert run_distributed(1, count_layers, cfg=decoding_config()) == [[1, 2, 3]]


def scores_between_answers(cfg: RunConfig) -> None:
    """Rows that ran some layers alone are no prefixes for others; scores and answers do not disturb each other."""
    prompt = list(range(40, 60))
    shallow = ScoreParams(exit_layers=(1,), final=False)
    with layout(cfg):
        fresh = make_engine(cfg)
        fresh.add(prompt, GenerationParams(max_tokens=6))
        expected = run_all(fresh)[0].token_ids
        engine = make_engine(cfg, prefill_chunk=7)
        ids = [engine.add_scoring(prompt, shallow)]
        ids += [engine.add(prompt, GenerationParams(max_tokens=6)) for _ in range(2)]
        ids += [engine.add_scoring(prompt, ScoreParams(score_from=17))]
        results = run_all(engine)
        assert [results[one].token_ids for one in ids[1:3]] == [expected] * 2
        check_scores(cfg, shallow, prompt, results[ids[0]])
        check_scores(cfg, ScoreParams(score_from=17), prompt, results[ids[3]])
        (again,) = score_all(engine, [prompt + expected], ScoreParams(exit_layers=(), score_from=len(prompt) - 1))
        assert list(again.heads[0].tokens[:-1]) == expected


def test_scores_beside_answers() -> None:
    run_distributed(1, scores_between_answers, cfg=decoding_config())
