"""tools/evaluate.py calibrate on a tiny model whose last exit is the final head again; what certificates then allow."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.early_exit.evaluation import calibration
from megatron.early_exit.evaluation.command_line import main
from megatron.early_exit.evaluation.recording import RoundingFloor
from megatron.early_exit.inference.certificates import read_certificates
from megatron.early_exit.inference.exit_records import read_records
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings, ScoreParams
from tests.integration.calibrated_models import ANSWER, LENGTH, iteration, make_model
from tests.server.models import NUM_LAYERS

PROMPTS = 240


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    make_model(folder, num_documents=400)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    shutil.copytree(made / "exits", tmp_path / "model")
    return tmp_path / "model"


def calibrate(made: Path, folder: Path, *words: str) -> int:
    return main([
        "calibrate", "--load", str(folder), "--data-path", str(made / "text"), "--prompt-length", str(LENGTH),
        "--answer-tokens", str(ANSWER), "--prompts", str(PROMPTS), *words,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def certified(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated checkpoint: level 0.95 with both certificates. Read only."""
    folder = tmp_path_factory.mktemp("certified") / "model"
    shutil.copytree(made / "exits", folder)
    assert calibrate(made, folder, "--levels", "0.8", "0.9", "--delta", "0.2", "--rounding-prompts", "4",
                     "--free-running") == 0  # fmt: skip
    return folder


@pytest.fixture
def recorded(certified: Path, tmp_path: Path) -> Path:
    """A copy to write into, with the records of all answers, and no certificates."""
    shutil.copytree(certified, tmp_path / "model")
    (iteration(tmp_path / "model") / "exit_certificates.json").unlink()
    return tmp_path / "model"


def test_records_are_what_every_exit_says_along_the_full_answer(certified: Path, made: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    corpus = IndexedDataset(str(made / "text"))
    (records_folder,) = iteration(certified).glob("exit_records/*")
    records = read_records(records_folder)
    assert [one.prompt for one in records] == list(range(PROMPTS))
    document = json.loads((iteration(certified) / "evaluation/calibrate.json").read_text())
    llm = LLM.load(str(certified))
    for record in records[:5]:
        assert record.scores.shape == record.choices.shape == (len(record.tokens), 2)
        # The name tells the document of the corpus that the prompt is the beginning of.
        index = int(document["results"]["per_prompt"][record.prompt]["name"].rpartition(":")[2])
        prompt = corpus[index][:LENGTH].tolist()
        answer = record.tokens.tolist()
        (full,) = llm.generate([prompt], GenerationParams(max_tokens=ANSWER))
        assert full.result.token_ids == answer
        (scores,) = llm.score([prompt + answer[:-1]], ScoreParams(score_from=len(prompt) - 1))
        for column, head in enumerate(scores.check().heads[:-1]):
            assert list(head.tokens) == record.choices[:, column].tolist()
            assert head.confidences == pytest.approx(record.scores[:, column].tolist(), rel=1e-4)
        assert scores.heads[-1].confidences == pytest.approx(record.final_confidences.tolist(), rel=1e-4)


def test_the_exit_that_is_always_right_is_certified(certified: Path) -> None:
    for one in read_certificates(iteration(certified)):
        assert one.refusal is None and one.thresholds[NUM_LAYERS] == 0.0
        assert one.calibration_risk <= 1 - one.level and one.p_value <= 0.1
        assert one.free_running.is_certified
        assert sum(one.num_prompts.values()) == PROMPTS
    document = json.loads((iteration(certified) / "evaluation/calibrate.json").read_text())
    for card in document["results"]["certificates"]:
        low, high = card["test_risk_interval"]
        assert low <= card["test_risk"] <= high <= 1 - card["level"] + 0.05
        test = [
            one["loss"][f"{card['level']:g}"] for one in document["results"]["per_prompt"] if one["split"] == "test"
        ]
        assert card["test_risk"] == pytest.approx(np.mean(test)) and len(test) == card["prompts"]["test"]
    shares = document["results"]["exit_share_by_position"]
    assert len(shares) == ANSWER and all(sum(one["shares"].values()) == pytest.approx(1) for one in shares)
    assert document["results"]["rounding"]["decisions"] > 0


def test_generation_with_certified_thresholds(certified: Path) -> None:
    llm = LLM.load(str(certified))
    (one,) = (one for one in read_certificates(iteration(certified)) if one.level == 0.9)
    layers, thresholds = zip(*sorted(one.thresholds.items()), strict=True)
    certain = GenerationParams(
        max_tokens=ANSWER, mode="early_exit", exit_thresholds="certified:0.9", plan_exits=False
    )  # fmt: skip
    numbers = GenerationParams(
        max_tokens=ANSWER, mode="early_exit", exit_layers=layers, exit_thresholds=thresholds
    )  # fmt: skip
    prompts = [[1, 2, 3], [50, 60, 70, 80]]
    outputs = llm.generate(prompts, certain)
    tokens = lambda outputs: [[(one.token, one.exit_layer) for one in output.result.tokens] for output in outputs]
    assert tokens(outputs) == tokens(llm.generate(prompts, numbers))
    assert any(not token.is_final for output in outputs for token in output.result.tokens)
    planned = GenerationParams(max_tokens=ANSWER, mode="early_exit", exit_thresholds="certified:0.9", plan_exits=True)
    assert llm.generate(prompts, planned)[0].error is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"exit_thresholds": "certified:0.97"},
     "certified:0.97 has no certificate that holds; there are certified:0.8, certified:0.9"),
    ({"max_tokens": 9}, "certified:0.9 was made for answers of max_tokens 8, not 9"),
    ({"ignore_eod": True}, "was made with ignore_eod False"),
    ({"min_tokens": 2}, "does not cover min_tokens"),
    ({"sampling": SamplingSettings(temperature=1.0)}, "certified:0.9 holds for greedy answers"),
    ({"sampling": SamplingSettings(repetition_penalty=1.2)}, "certified:0.9 holds for greedy answers"),
    ({"exit_layers": (3,)}, "the model has no exit named 3"),
])  # fmt: skip
def test_what_no_certificate_covers(certified: Path, changes: dict, message: str) -> None:
    settings = {"max_tokens": ANSWER, "mode": "early_exit", "exit_thresholds": "certified:0.9", **changes}
    with pytest.raises(ValueError) as caught:
        LLM.load(str(certified)).generate([1, 2], GenerationParams(**settings))
    assert message in str(caught.value)


def test_another_model_than_the_certified_one(certified: Path, made: Path, tmp_path: Path) -> None:
    params = GenerationParams(max_tokens=ANSWER, mode="early_exit", exit_thresholds="certified:0.9")
    with pytest.raises(
        ValueError, match=r"the certificate of 0.8 is for another dtype \(fp32; the loaded model has bf16\)"
    ):
        LLM.load(str(certified), dtype="bf16").generate([1, 2], params)
    other = tmp_path / "other"
    shutil.copytree(certified, other)
    about = iteration(other) / "checksums.json"
    assert about.is_file(), sorted(iteration(other).iterdir())
    about.write_text(about.read_text() + "\n")
    with pytest.raises(ValueError, match="another checkpoint, or one that was written again"):
        LLM.load(str(other)).generate([1, 2], params)
    with pytest.raises(ValueError, match=r"the checkpoint has none.*tools/evaluate.py calibrate"):
        LLM.load(str(made / "exits")).generate([1, 2], params)
    (iteration(other) / "exit_certificates.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"exit_certificates.json cannot be read"):
        LLM.load(str(other))


def test_an_interrupted_calibration_goes_on(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.early_exit.evaluation import recording

    answered: list[int] = []
    original = recording._record

    def record_some(number: int, output: Any) -> Any:
        if len(answered) == 70:
            raise KeyboardInterrupt
        answered.append(number)
        return original(number, output)

    monkeypatch.setattr(recording, "_record", record_some)
    words = ["--levels", "0.9", "--delta", "0.2", "--rounding-prompts", "0"]
    with pytest.raises(KeyboardInterrupt):
        calibrate(made, folder, *words)
    (records,) = iteration(folder).glob("exit_records/*")
    assert sorted(one.prompt for one in read_records(records)) == sorted(answered)
    planned = GenerationParams(max_tokens=ANSWER, mode="early_exit", plan_exits=True)
    (output,) = LLM.load(str(folder)).generate([[1, 2]], planned)
    assert "plan_exits needs a calibration" in output.error  # some records are no sample of all
    again: list[int] = []
    monkeypatch.setattr(recording, "_record", lambda number, output: again.append(number) or original(number, output))
    assert calibrate(made, folder, *words) == 0
    assert sorted(again + answered) == list(range(PROMPTS))
    assert calibrate(made, folder, *words) == 0 and len(again) + len(answered) == PROMPTS  # nothing is taken again
    assert LLM.load(str(folder)).generate([[1, 2]], planned)[0].error is None


def test_answers_that_go_on_have_records_of_their_own(made: Path, folder: Path) -> None:
    for words in ([], ["--ignore-eod"]):
        assert calibrate(made, folder, "--levels", "0.5", "--rounding-prompts", "0", *words) == 0
    assert len([*iteration(folder).glob("exit_records/*")]) == 2


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(
    made: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (iteration(folder) / "evaluation").write_text("not a folder")
    assert calibrate(made, folder, "--levels", "0.5") == 2
    assert "evaluation is a file, in which nothing can be created" in capsys.readouterr().err
    assert not (iteration(folder) / "exit_records").exists()


def test_a_shortlist_stays_only_with_the_certificates_that_were_made_with_it(
    made: Path, certified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.early_exit.evaluation import recording

    folder = tmp_path / "model"
    shutil.copytree(certified, folder)
    params = GenerationParams(max_tokens=ANSWER, mode="early_exit", exit_thresholds="certified:0.9")

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recording, "_record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(made, folder, "--levels", "0.8", "--delta", "0.2", "--shortlist-size", "50")
    assert LLM.load(str(folder)).generate([1, 2], params)[0].error is None
    words = ["--levels", "0.8", "--delta", "0.2", "--rounding-prompts", "0", "--shortlist-size", "50"]
    assert calibrate(made, folder, *words) == 0
    with pytest.raises(ValueError, match=r"another shortlist \(none; the loaded model has one\)"):
        LLM.load(str(folder)).generate([1, 2], params)
    with pytest.raises(ValueError, match=r"there are certified:0.8$"):  # nothing of the other level's
        LLM.load(str(folder)).generate([1, 2], replace(params, exit_thresholds="certified:0.7"))


def test_a_level_that_exits_cannot_keep_is_refused_with_the_reason(
    made: Path, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--levels", "0.9", "--delta", "0.2", "--rounding-prompts", "0", "--grid", "0.0"]
    assert calibrate(made, recorded, *words) == 0
    assert "certified:0.9 (A-max, delta 0.2): refused: the safest thresholds have a risk of" in capsys.readouterr().out
    with pytest.raises(ValueError, match="certified:0.9 is not to be had for this model: the safest thresholds"):
        LLM.load(str(recorded)).generate(
            [1, 2], GenerationParams(max_tokens=ANSWER, mode="early_exit", exit_thresholds="certified:0.9")
        )


@pytest.mark.parametrize(("risk", "floor", "what"), [
    ("B", RoundingFloor(16, 3, 1000, 0.01), "18.75% of the full model's answers"),
    ("C", RoundingFloor(16, 3, 1000, 0.11), "11.00% of the full model's answers' words"),
])  # fmt: skip
def test_rounding_is_counted_as_the_risk_is(
    made: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch, risk: str, floor: RoundingFloor, what: str
) -> None:
    """What is rare among decisions may be frequent among answers."""
    monkeypatch.setattr(calibration, "rounding_floor", lambda *_: floor)
    assert calibrate(made, recorded, "--levels", "0.9", "--delta", "0.2", "--risk", risk, "--grid", "1.0") == 0
    (one,) = read_certificates(iteration(recorded))
    assert f"rounding alone changes {what}" in one.refusal


@pytest.mark.parametrize("risk", ["B", "C"])
def test_other_risks(made: Path, recorded: Path, risk: str) -> None:
    words = ["--levels", "0.9", "--delta", "0.2", "--rounding-prompts", "0", "--risk", risk, "--grid", "1.0"]
    assert calibrate(made, recorded, *words) == 0
    (one,) = read_certificates(iteration(recorded))
    assert one.risk == risk and one.calibration_risk is not None
    if risk == "C" and one.refusal is None:
        params = GenerationParams(
            max_tokens=ANSWER, mode="early_exit", exit_thresholds="certified:0.9", exit_layers=(NUM_LAYERS,)
        )
        with pytest.raises(ValueError, match="holds with all exits enabled"):
            LLM.load(str(recorded)).generate([1, 2], params)


@pytest.mark.parametrize(("words", "message"), [
    (["--prompts", "20"], "20 prompts cannot support level 0.99"),
    (["--levels", "1.5"], "--levels has 1.5"),
    (["--shortlist-size", "100000", "--levels", "0.5"], "--shortlist-size is 100000; the vocabulary has"),
    (["--load", "nowhere", "--levels", "0.5"], "nowhere: no such folder"),
    (["--answer-tokens", "4000", "--levels", "0.5"], "the model takes"),
    (["--prompts", "500", "--levels", "0.5", "--shortlist-size", "9"], "500 prompts are needed, but"),
])  # fmt: skip
def test_what_cannot_be_calibrated(
    made: Path, folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(iteration(folder).iterdir())
    assert calibrate(made, folder, *words) == 2
    assert message in capsys.readouterr().err
    assert sorted(iteration(folder).iterdir()) == before


def test_the_template_that_certified_chats_are_written_with(
    made: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template, chats = tmp_path / "template", tmp_path / "chats.jsonl"
    template.write_text("{{ messages[0]['content'] }}:")
    lines = [{"messages": [{"role": "user", "content": f"{i} of {i * i}"}]} for i in range(60)]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = ["--load", str(folder), "--prompts-file", str(chats), "--answer-tokens", str(ANSWER)]
    words = ["--levels", "0.5", "--delta", "0.2", "--rounding-prompts", "0", "--chat-template", str(template)]
    assert main(["calibrate", *model, *words]) == 0
    sweep = ["sweep", *model, "--prompts", "2", "--rounds", "2", "--batch", "2", "--thresholds", "--draft-lengths"]
    assert main([*sweep, "--certified", "0.5", "--chat-template", str(template)]) == 0
    assert main([*sweep, "--certified", "0.5"]) == 2  # with the tokenizer's
    assert "the certificate of 0.5 is for another chat template" in capsys.readouterr().err


def test_weights_without_checksums(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another iteration of the same training would have the same fingerprint."""
    (iteration(folder) / "checksums.json").unlink()
    assert calibrate(made, folder, "--levels", "0.5") == 2
    assert "has no checksums.json, by which certificates know weights" in capsys.readouterr().err
    assert not (iteration(folder) / "exit_records").exists()


def test_a_model_without_exits(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(made, made / "plain", "--levels", "0.5") == 2
    assert "has no exits to calibrate" in capsys.readouterr().err


def test_the_benchmark_of_certificates(made: Path, folder: Path, tmp_path: Path) -> None:
    from benchmarks.certificate import main as benchmark

    benchmark([
        "--name", "tiny", "--load", str(folder), "--data-path", str(made / "text"), "--prompt-length", str(LENGTH),
        "--answer-tokens", str(ANSWER), "--prompts", "60", "--levels", "0.5", "--cost-prompts",
        "16", "--block", "8", "--output", str(tmp_path / "result.json"),
    ])  # fmt: skip
    document = json.loads((tmp_path / "result.json").read_text())
    cost = document["results"]["cost"]
    assert len(cost["raw_seconds"]["full"]) == len(cost["raw_seconds"]["records"]) == 2
    assert (
        cost["certificate_and_test_over_full"] > cost["certificate_over_full"] > cost["records_over_full"]["ratio"] > 0
    )
    (card,) = document["results"]["certificates"]
    assert card["status"] == "certified"
    told = document["goals"]["test_split_does_not_contradict"]
    assert told["levels"]["0.5"]["risk"] == card["test_risk"]
    assert told["met"] == (card["test_risk_interval"][0] <= 0.5)
