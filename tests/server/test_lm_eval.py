"""lm-eval over HTTP: every log-likelihood and answer it scores is that of the model without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from megatron.early_exit.evaluation.lm_eval.adapter import EarlyExitLM
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from tests.server.serving import RunningServer

pytest.importorskip("tenacity", reason="lm-eval lacks what it needs for servers: pip install 'lm-eval[api]'")

QUESTIONS = ["a small model", "it is not here", "writes another line of", "reads lines, and"]
CHOICES = [" reads", " text", " another small line"]
NEW_TOKENS = 10
CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{choice}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
GENERATE_TASK = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 10, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def evaluate(
    model: str, url: str, task: str, tokenizer: str, folder: Path, documents: list[dict[str, Any]], **more: Any
) -> tuple[float, list[dict[str, Any]]]:
    """The score and the samples, as `lm-eval --model ... --tasks ... --include_path ...` computes them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "task.yaml").write_text(task.replace("FILE", str(file)))
    name = task.split()[1]
    results = lm_eval.simple_evaluate(
        model=model, tasks=[name], task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        model_args=f"base_url={url},model=model,num_concurrent=2,max_retries=1,seed=1,{tokenizer}", log_samples=True,
        bootstrap_iters=0, **more,
    )  # fmt: skip
    metric = "acc,none" if "choice" in name else "exact_match,none"
    return results["results"][name][metric], sorted(results["samples"][name], key=lambda one: one["doc_id"])


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def log_likelihood(offline: LLM, context: list[int], whole: list[int]) -> float:
    final = offline.score([whole], ScoreParams(exit_layers=()))[0].check().heads[-1]
    return sum(final.log_probs[len(context) - 1 :])


@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_log_likelihoods(server: RunningServer, offline: LLM, checkpoint: Path, tmp_path: Path, backend: str) -> None:
    tokenize = offline.tokenizer.tokenize
    expected = [
        [log_likelihood(offline, tokenize(question), tokenize(question + choice)) for choice in CHOICES]
        for question in QUESTIONS
    ]
    best = [values.index(max(values)) for values in expected]
    right = [best[0], best[1], best[2], (best[3] + 1) % len(CHOICES)]
    documents = [{"question": q, "choices": CHOICES, "choice": c} for q, c in zip(QUESTIONS, right, strict=True)]
    tokenizer = f"tokenizer_backend={backend}"
    if backend == "huggingface":
        tokenizer += f",tokenizer={checkpoint.parent / 'hf'}"
    url = f"{server.url}/v1/completions"
    score, samples = evaluate("local-completions", url, CHOICE_TASK, tokenizer, tmp_path, documents)
    assert score == 0.75
    got = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    assert got == [pytest.approx(values, abs=1e-3) for values in expected]
    lm = EarlyExitLM(offline, add_bos_token=False)  # as lm-eval tokenizes for servers
    pairs = [Instance("loglikelihood", {}, (question, choice), 0) for question in QUESTIONS for choice in CHOICES]
    in_process = [value for value, _ in lm.loglikelihood(pairs, disable_tqdm=True)]
    assert [value for of_question in got for value in of_question] == pytest.approx(in_process, abs=1e-3)


@pytest.mark.parametrize("model", ["local-completions", "local-chat-completions"])
def test_answers(server: RunningServer, offline: LLM, checkpoint: Path, tmp_path: Path, model: str) -> None:
    is_chat = model == "local-chat-completions"
    if is_chat:
        prompts = [offline.tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    else:
        prompts = [offline.tokenizer.tokenize(question) for question in QUESTIONS]
    answers = [output.text for output in offline.generate(prompts, GenerationParams(max_tokens=NEW_TOKENS))]
    targets = [answers[0], "something else", answers[2], answers[3] + "."]
    documents = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, targets, strict=True)]
    url = f"{server.url}/v1/{'chat/' if is_chat else ''}completions"
    tokenizer = "" if is_chat else f"tokenizer_backend=huggingface,tokenizer={checkpoint.parent / 'hf'}"
    score, samples = evaluate(
        model, url, GENERATE_TASK, tokenizer, tmp_path, documents, apply_chat_template=is_chat
    )  # fmt: skip
    assert [sample["resps"][0][0] for sample in samples] == answers
    lm = EarlyExitLM(offline, add_bos_token=None if is_chat else False)
    template = lambda text: lm.apply_chat_template([{"role": "user", "content": text}]) if is_chat else text
    settings = {"until": ["zzz"], "max_gen_toks": NEW_TOKENS}
    asked = [Instance("generate_until", {}, (template(question), settings), 0) for question in QUESTIONS]
    assert lm.generate_until(asked) == answers
    assert score == 0.5
