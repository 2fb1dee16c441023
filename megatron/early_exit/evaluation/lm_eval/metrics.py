"""Metrics of the offline tasks that lm-eval has not, or would load from the network."""

from __future__ import annotations

from typing import Any

from megatron.early_exit.evaluation.lm_eval.code_execution import passes


def rouge_l(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F1 of the longest common subsequence of words, with the begin of the article."""
    from rouge_score.rouge_scorer import RougeScorer

    score = RougeScorer(["rougeL"]).score(target=doc["summary"], prediction=results[0])
    return {"rougeL": score["rougeL"].fmeasure}


def pass_at_1(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the function passes its tests. This runs what the model has written."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(passes(program))}
