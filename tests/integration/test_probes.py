"""tools/evaluate.py probes, and calibrate --exit-score probe, on a tiny model; what is generated with them then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from megatron.early_exit.evaluation import own_answers
from megatron.early_exit.evaluation.command_line import main
from megatron.early_exit.evaluation.own_answers import AnswersFolder
from megatron.early_exit.evaluation.prompts import ids_digest, prompt_digest
from megatron.early_exit.inference.certificates import read_certificates
from megatron.early_exit.inference.exit_probes import ExitProbes
from megatron.early_exit.inference.exit_records import read_records
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from tests.integration.calibrated_models import ANSWER, LENGTH, iteration, make_model
from tests.server.models import NUM_LAYERS

PROMPTS, TRAINED, NUM_FULL = 120, 40, 28
"""NUM_FULL: of those that probes are trained on, the prompts that the full model answers."""
CERTAIN = GenerationParams(max_tokens=ANSWER, mode="early_exit", exit_thresholds="certified:0.3", plan_exits=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    make_model(folder, num_documents=200)
    return folder


def evaluate(command: str, made: Path, folder: Path, prompts: int, *words: object) -> int:
    return main([
        command, "--load", str(folder), "--data-path", str(made / "text"), "--prompt-length", str(LENGTH),
        "--answer-tokens", str(ANSWER), "--prompts", str(prompts), *map(str, words),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def trained(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with probes, and with certificates of both scores for 0.3. Read only."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shutil.copytree(made / "exits", folder)
    assert evaluate("probes", made, folder, TRAINED, "--width", 8, "--max-epochs", 8) == 0
    words = ["--levels", 0.3, "--delta", 0.2, "--rounding-prompts", 0]
    assert evaluate("calibrate", made, folder, PROMPTS, *words) == 0
    assert evaluate("calibrate", made, folder, PROMPTS, *words, "--exit-score", "probe") == 0
    return folder


def document(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((iteration(folder) / f"evaluation/{name}.json").read_text())


def test_figures_are_those_of_the_probes_on_held_out_prompts(trained: Path) -> None:
    found, probes = document(trained, "probes")["results"], ExitProbes.load(iteration(trained))
    answers = {}
    for name, first in (("full", 0), (f"early_exit_{NUM_FULL}", NUM_FULL)):
        (kept,) = iteration(trained).glob(f"exit_probe_answers/*/{name}")
        answers |= {one.number + first: list(one.ids) for one in AnswersFolder(kept).answers()}
    assert sorted(answers) == list(range(TRAINED)) and found["digest"] == probes.digest
    assert sum(found["decisions"].values()) == sum(map(len, answers.values()))
    prompts = drawn_ids(trained)
    assert sorted(map(prompt_digest, prompts)) == list(probes.about.prompts)
    llm = LLM.load(str(trained))
    full = [one.result.token_ids for one in llm.generate(prompts, GenerationParams(max_tokens=ANSWER))]
    assert full[:NUM_FULL] == [answers[number] for number in range(NUM_FULL)]
    assert full[NUM_FULL:] != [answers[number] for number in range(NUM_FULL, TRAINED)]  # some go astray
    agrees, scores = {2: [], NUM_LAYERS: []}, {2: [], NUM_LAYERS: []}
    for number in found["held_out_prompts"]:
        ids = prompts[number] + answers[number]
        (result,) = llm.score([ids], ScoreParams(states=True, score_from=LENGTH - 1, score_last=False))
        *exits, final = result.check().heads
        for head in exits:
            network = probes.networks[head.exit_layer]
            x = head.states / (np.sqrt((head.states.astype(float) ** 2).mean(1, keepdims=True)) + 1e-6)
            logits = np.maximum(x @ network.fc1.T + network.fc1_bias, 0) @ network.fc2[0] + network.fc2_bias
            scores[head.exit_layer] += (1 / (1 + np.exp(-logits))).tolist()
            agrees[head.exit_layer] += [one == other for one, other in zip(head.tokens, final.tokens, strict=True)]
    of_first, of_last = found["exits"]
    assert of_first["agreement"] == pytest.approx(np.mean(agrees[2]))
    assert of_first["probe"]["auroc"] == pytest.approx(roc_auc_score(agrees[2], scores[2]), abs=1e-3)
    assert of_last["agreement"] == 1.0  # the final head again


def drawn_ids(folder: Path) -> list[list[int]]:
    """Ids of the prompts that probes were trained on, in order: those whose digests the probes know."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    settings = document(folder, "probes")["settings"]
    prefix = next(iter(document(folder, "probes")["data"])).removesuffix(".bin")
    corpus = IndexedDataset(prefix)
    order = np.random.default_rng(settings["seed"]).permutation(len(corpus.document_indices) - 1)
    return [corpus[int(index)][:LENGTH].tolist() for index in order[:TRAINED]]


def prompts_of(folder: Path, name: str) -> list[list[int]]:
    """Ids of the prompts that a document names."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    names = [one["name"] for one in document(folder, name)["results"]["per_prompt"]]
    corpora = {one: IndexedDataset(one) for one in {name.rpartition(":")[0] for name in names}}
    return [corpora[name.rpartition(":")[0]][int(name.rpartition(":")[2])][:LENGTH].tolist() for name in names]


def test_certificates_of_probes_are_made_of_other_prompts_and_used(trained: Path) -> None:
    of_heads, of_probes = read_certificates(iteration(trained))
    assert (of_heads.score, of_probes.score) == ("head", "probe") and of_probes.refusal is None
    assert document(trained, "calibrate")["results"]["certificates"][0]["exit_score"] == "probe"
    by_key = {path.name: read_records(path) for path in iteration(trained).glob("exit_records/*")}
    assert len(by_key) == 2 and all(len(one) == PROMPTS for one in by_key.values())
    (of_score,) = [one for key, one in by_key.items() if key.startswith(of_probes.fingerprint.digest[:12])]
    llm = LLM.load(str(trained))
    prompts = prompts_of(trained, "calibrate")
    assert not set(map(prompt_digest, prompts)) & set(ExitProbes.load(iteration(trained)).about.prompts)
    ids = prompts[0]
    (observed,) = llm.generate([ids], GenerationParams(max_tokens=ANSWER, observe_exits=True, exit_score="probe"))
    recorded = [[one.confidence for one in token.predictions[:-1]] for token in observed.tokens]
    assert of_score[0].scores.tolist() == pytest.approx(np.array(recorded), rel=1e-4)
    layers, thresholds = zip(*sorted(of_probes.thresholds.items()), strict=True)
    numbers = GenerationParams(
        max_tokens=ANSWER, mode="early_exit", exit_layers=layers, exit_thresholds=thresholds, exit_score="probe"
    )
    tokens = lambda params: [(one.token, one.exit_layer) for one in llm.generate([ids], params)[0].tokens]
    assert tokens(CERTAIN) == tokens(numbers)
    assert any(layer == 2 for _, layer in tokens(CERTAIN))


def test_certified_exits_are_planned(trained: Path) -> None:
    """Records of the certificate's own score, and exits that cost more than the full model: none is evaluated. Where
    nothing but tokens is wanted, the head of a row that leaves costs what its certified form does."""
    from dataclasses import replace

    from megatron.early_exit.inference.costs import ROW_COUNTS

    llm = LLM.load(str(trained))
    assert set(llm.engine.checks.calibrated) == {"head", "probe"}
    planned = replace(CERTAIN, plan_exits=None)
    costs = llm.engine.measure_costs()
    flat = lambda seconds: (seconds,) * len(ROW_COUNTS)
    none, dear = flat(0.0), flat(1.0)
    for probe, head, saved, log_probs, expected in (
        (dear, none, none, True, set()),
        (none, none, none, True, {2}),
        (none, dear, dear, True, set()),
        (none, dear, dear, False, {2}),
    ):
        llm.engine._planner.measured_costs = replace(
            costs, layer_seconds=flat(1e-3), exit_head_seconds=head, final_head_seconds=none, probe_seconds=probe,
            batch_seconds=0.0, exit_saved_seconds=saved,
        )  # fmt: skip
        (output,) = llm.generate([[1, 2, 3]], replace(planned, log_probs=log_probs))
        assert set(output.result.exit_layers) == expected


def test_an_interrupted_run_goes_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(made / "exits", folder)
    original, answered = own_answers.outputs_as_they_end, []

    def some(llm: LLM, prompts: list, params: list[GenerationParams]) -> Any:
        for output in original(llm, prompts, params):
            if len(answered) == 7:
                raise KeyboardInterrupt
            answered.append(output)
            yield output

    words = ["--width", 4, "--max-epochs", 2]
    with monkeypatch.context() as patch:
        patch.setattr(own_answers, "outputs_as_they_end", some)
        with pytest.raises(KeyboardInterrupt):
            evaluate("probes", made, folder, 20, *words)
    assert not (iteration(folder) / "exit_probes.safetensors").exists()
    (kept,) = iteration(folder).glob("exit_probe_answers/*/full")
    assert len(AnswersFolder(kept).answers()) == 7
    (kept / "part_000001_1.npz.partial-1").write_bytes(b"half")
    again = []
    monkeypatch.setattr(
        own_answers,
        "outputs_as_they_end",
        lambda llm, prompts, params: again.extend(prompts) or original(llm, prompts, params),
    )
    assert evaluate("probes", made, folder, 20, *words) == 0
    assert len(again) == 7 + 6 and len(AnswersFolder(kept).answers()) == 14
    # With another share early exit answers other prompts, from other thresholds on.
    again.clear()
    assert evaluate("probes", made, folder, 20, *words, "--early-exit-share", 0.5) == 0
    assert len(again) == 10


@pytest.mark.parametrize(("command", "words", "message"), [
    ("probes", ["--width", 0], "--width is 0; it must be at least 1"),
    ("probes", ["--early-exit-share", 1], "--early-exit-share is 1; it must be 0 or more, and less than 1"),
    ("probes", ["--held-out", 1], "--held-out is 1; it must lie between 0 and 1"),
    ("calibrate", ["--exit-score", "probe", "--levels", 0.5],
     "exit_score 'probe' needs probes of this model's exits (the checkpoint has none)"),
])  # fmt: skip
def test_what_cannot_be_trained_or_certified(
    made: Path, command: str, words: list, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(iteration(made / "exits").iterdir())
    assert evaluate(command, made, made / "exits", 40, *words) == 2
    assert message in capsys.readouterr().err
    assert sorted(iteration(made / "exits").iterdir()) == before


def test_a_model_without_exits(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("probes", made, made / "plain", 20) == 2
    assert "has no exits to train probes for" in capsys.readouterr().err


def test_prompts_that_probes_were_trained_on(made: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 200 documents 40 are taken."""
    words = ["--levels", 0.5, "--rounding-prompts", 0, "--exit-score", "probe"]
    assert evaluate("calibrate", made, trained, 170, *words) == 2
    error = capsys.readouterr().err
    assert "170 prompts are needed, but" in error and "that the probes were not trained on (40 others)" in error
    assert prompt_digest([1, 2]) == ids_digest([[1, 2]])[:16]
