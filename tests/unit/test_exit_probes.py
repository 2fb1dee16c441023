"""Probes without a model: their file, what they cost, what is planned with them, and how they are trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.evaluation.calibration import calibrate
from megatron.early_exit.evaluation.calibration_settings import CalibrationSettings
from megatron.early_exit.evaluation.probes import (
    ExitSamples,
    ProbeSettings,
    held_out_prompts,
    probe_scores,
    train_probe,
    train_probes,
)
from megatron.early_exit.evaluation.statistics.exit_metrics import leaving_share
from megatron.early_exit.inference.certificates import (
    AnswerSettings,
    Certificate,
    Certificates,
    FreeRunningCertificate,
)
from megatron.early_exit.inference.command_line import main as generate
from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts, merged_costs
from megatron.early_exit.inference.engine.exit_selection import select_exits, step_seconds
from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.exit_probes import AboutProbes, ExitProbes, ProbeNetwork
from megatron.early_exit.inference.fingerprint import ExitFingerprint
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.protocol import ExitDescription, WorkerDescription
from megatron.early_exit.inference.worker.probe import ExitProbe
from megatron.early_exit.server.command_line import build_parser as build_server_parser
from megatron.early_exit.server.command_line import server_config
from megatron.early_exit.server.early_exit_fields import EarlyExitFields

FINGERPRINT = ExitFingerprint("w", (2, 6), "fp32", None, None, "t", (0,))
NO_PROGRESS = lambda done, total: None


def network(seed: int = 0, width: int = 3, size: int = 5) -> ProbeNetwork:
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    return ProbeNetwork(normal(width, size), normal(width), normal(1, width), normal(1))


def probes(seed: int = 0) -> ExitProbes:
    about = AboutProbes(FINGERPRINT, 5, 3, ("ab", "cd"), {"settings": {"seed": 1}})
    return ExitProbes(about, {2: network(seed), 6: network(seed + 1)})


def test_the_file_holds_all_of_them(tmp_path: Path) -> None:
    probes().save(tmp_path)
    read = ExitProbes.load(tmp_path)
    assert read.about == probes().about and sorted(read.networks) == [2, 6]
    for layer, one in probes().networks.items():
        for name, value in vars(one).items():
            assert np.array_equal(getattr(read.networks[layer], name), value)
    assert read.digest == probes().digest != probes(seed=1).digest
    assert [one.name for one in tmp_path.iterdir()] == ["exit_probes.safetensors"]
    assert ExitProbes.load(tmp_path / "nowhere") is None


def test_what_they_fit() -> None:
    assert probes().mismatch("w", (2, 6), 5) is None
    assert "another checkpoint" in probes().mismatch("v", (2, 6), 5)
    assert "for the exits 2 6; the model has 2 4" in probes().mismatch("w", (2, 4), 5)
    assert "fc1 of exit 2 has the shape (3, 5), not (3, 7)" in probes().mismatch("w", (2, 6), 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_alone_and_together(dtype: torch.dtype) -> None:
    """Rows of zeros, of huge and of tiny numbers are numbers too."""
    states = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    states[3], states[4], states[5] = 0, states[4] * 1e6, states[5] * 1e-3
    probe = ExitProbe(network(), torch.device("cpu"))
    together = probe(states)
    assert together.dtype == torch.float64 and torch.isfinite(together).all()
    x = states.double()
    x = x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)
    fc1, bias, fc2, fc2_bias = (torch.tensor(one).double() for one in vars(network()).values())
    assert torch.allclose(together, torch.sigmoid(torch.relu(x @ fc1.T + bias) @ fc2[0] + fc2_bias), atol=1e-5)
    for row in range(6):
        assert torch.allclose(probe(states[row : row + 1]), together[row], atol=1e-6)
    assert torch.allclose(torch.from_numpy(probe_scores(network(), states.float().numpy())), together, atol=1e-6)


def test_fingerprints_of_heads_are_as_before_there_were_probes() -> None:
    """Folders of records are named by them."""
    values = asdict(FINGERPRINT)
    del values["probes"]
    assert FINGERPRINT.digest == hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()
    of_probes = replace(FINGERPRINT, probes="d")
    assert of_probes.digest != FINGERPRINT.digest and of_probes.score == "probe"
    assert of_probes.differences(replace(FINGERPRINT, probes="e")) == ["other probes"]


def test_what_was_recorded_of_exits_in_int8_holds_for_no_model() -> None:
    """There are none any more."""
    assert replace(FINGERPRINT, quantize="exits").differences(FINGERPRINT) == [
        "exits in int8 (quantize 'exits'), which there are no more: calibrate again"
    ]
    in_int8 = replace(FINGERPRINT, quantize="all")
    assert in_int8.differences(FINGERPRINT) == ["another quantize (all; the loaded model has none)"]


# What is planned.

# Of ten tokens five leave at the first exit, and three more at the second.
SCORES = np.array([[0.9, 0.9]] * 5 + [[0.1, 0.9]] * 3 + [[0.1, 0.1]] * 2)
flat = lambda seconds: (float(seconds),) * len(ROW_COUNTS)
COSTS = StepCosts(flat(1), flat(4), flat(4), flat(4), probe_seconds=flat(0.1))


def test_a_probe_is_paid_by_all_rows_and_the_head_by_those_that_leave() -> None:
    seconds = lambda enabled: step_seconds(enabled, SCORES >= 0.5, (2, 6), 10, COSTS, score="probe")
    assert seconds(()) == pytest.approx(10 + 4)
    assert seconds((0,)) == pytest.approx(2 + 0.1 + 0.5 * 4 + 0.5 * (8 + 4))
    assert seconds((0, 1)) == pytest.approx(2 + 0.1 + 0.5 * 4 + 0.5 * (4 + 0.1) + 0.3 * 4 + 0.2 * (4 + 4))


def test_exits_whose_heads_cost_too_much_may_pay_behind_a_probe() -> None:
    dear = StepCosts(flat(1), flat(8), flat(8), flat(8), probe_seconds=flat(0.1))
    choose = lambda score: select_exits(SCORES, (0.5, 0.5), (4, 8), 10, dear, score=score)
    assert choose("head") == ()  # 4 + 8 + 0.5 * (6 + 8) or 8 + 8 + 0.2 * (2 + 8); the full model takes 18
    assert choose("probe") == (0, 1)  # 4.1 + 0.5 * 8 + 0.5 * 4.1 + 0.3 * 8 + 0.2 * (2 + 8)
    rare = np.where(np.arange(10)[:, None] < [9, 1], 0.9, 0.1)
    choose = lambda **more: select_exits(rare, (0.5, 0.5), (2, 9), 10, COSTS, score="probe", **more)
    assert choose() == (0,)
    assert choose(all_or_none=True) == (0, 1)
    never = StepCosts(flat(1), flat(4), flat(4), flat(4), probe_seconds=flat(20))
    assert select_exits(rare, (0.5, 0.5), (2, 9), 10, never, score="probe", all_or_none=True) == ()


def test_costs_of_stages_are_merged() -> None:
    none = flat(0)
    stages = [StepCosts(flat(1), none, none, none), StepCosts(flat(3), flat(2), flat(2), none, probe_seconds=flat(0.5))]
    assert merged_costs(stages, [1, 1]).probe_seconds == flat(0.5)


def test_certified_thresholds_are_planned_as_far_as_the_promise_allows() -> None:
    exits = (ExitDescription(2, 2, False), ExitDescription(6, 6, False))
    model = WorkerDescription(10, 8, 96, exits, 4, 40, has_probes=True)
    certificate = Certificate(
        0.9, 0.05, "A-max", replace(FINGERPRINT, probes="d"), AnswerSettings(8), {2: 0.5, 6: 0.5}, None, 0.01, 0.01, {}
    )
    free = FreeRunningCertificate(0.01, 0.01, True)
    certain = GenerationParams(max_tokens=8, mode="early_exit", exit_thresholds="certified:0.9")

    def planning(params: GenerationParams, calibrated: tuple = ("probe",), **changes: object) -> str:
        certificates = Certificates((replace(certificate, **changes),))
        checks = RequestChecks(model, ExitConfig(exit_layer_nums=(2, 6)), (0,), calibrated, certificates)
        return checks.planning(params)

    assert planning(certain) == "subsets"
    assert planning(certain, calibrated=("head",)) == planning(certain, calibrated=()) == "off"
    assert planning(certain, risk="C") == planning(certain, free_running=free) == "all or none"
    assert planning(certain, free_running=replace(free, is_certified=False)) == "subsets"
    assert planning(replace(certain, plan_exits=False)) == "off"
    assert planning(replace(certain, exit_thresholds=(0.5,))) == "off"
    assert planning(replace(certain, exit_thresholds=(0.5,), plan_exits=True)) == "subsets"


def test_an_unknown_score() -> None:
    with pytest.raises(ValueError, match="exit_score is 'heads'; choose one of head, probe"):
        GenerationParams(exit_score="heads")


# Training.


@pytest.mark.parametrize("digits", [1, 8])
def test_the_share_that_leaves_at_a_risk_is_that_of_the_best_threshold(digits: int) -> None:
    draw = np.random.default_rng(0)
    scores = draw.random(60).round(digits)
    correct = draw.random(60) < scores
    for alpha in (0.0, 0.02, 0.1, 0.5, 1.0):
        shares = [0.0]
        for threshold in scores:
            taken = scores >= threshold
            if (taken & ~correct).sum() <= alpha * 60:
                shares.append(taken.mean())
        assert leaving_share(scores, correct, alpha) == pytest.approx(max(shares))


@pytest.fixture(scope="module")
def samples() -> tuple[ExitSamples, np.ndarray]:
    """Whether an exit agrees is a smooth function of the direction of the states, which have a mean and unequal
    channels, and chance. (samples, is_held_out)"""
    draw = np.random.default_rng(0)
    states = (draw.normal(size=(4000, 16)) * draw.uniform(0.2, 3, 16) + draw.normal(size=16)).astype(np.float32)
    directions = states / np.sqrt((states**2).mean(1, keepdims=True))
    hidden = np.tanh(directions @ draw.normal(size=(16, 4)))
    logits = 3 * hidden @ draw.normal(size=4)
    agrees = draw.random(4000) < 1 / (1 + np.exp(-logits))
    return ExitSamples(states, agrees, np.full(4000, 0.5)), np.arange(4000) >= 3000


def test_a_probe_tells_as_much_as_scikit_learns_network(samples: tuple[ExitSamples, np.ndarray]) -> None:
    data, is_held_out = samples
    trained, figures = train_probe(data, is_held_out, ProbeSettings(width=32), NO_PROGRESS)
    x = data.states / np.sqrt((data.states**2).mean(1, keepdims=True))
    scaler = StandardScaler().fit(x[~is_held_out])
    theirs = MLPClassifier((32,), max_iter=60, early_stopping=True, random_state=0)
    theirs.fit(scaler.transform(x[~is_held_out]), data.agrees[~is_held_out])
    of_theirs = theirs.predict_proba(scaler.transform(x[is_held_out]))[:, 1]
    of_ours, labels = probe_scores(trained, data.states[is_held_out]), data.agrees[is_held_out]
    assert roc_auc_score(labels, of_ours) > roc_auc_score(labels, of_theirs) - 0.01 > 0.7
    assert figures["held_out_loss"] == pytest.approx(log_loss(labels, of_ours), rel=1e-4)
    assert figures["held_out_loss"] < log_loss(labels, of_theirs) + 0.01
    again, _ = train_probe(data, is_held_out, ProbeSettings(width=32), NO_PROGRESS)
    assert all(np.array_equal(getattr(again, name), value) for name, value in vars(trained).items())


def test_training_stops_when_held_out_decisions_get_worse(samples: tuple[ExitSamples, np.ndarray]) -> None:
    data, is_held_out = samples
    few = np.flatnonzero(~is_held_out)[:60]
    rows = np.concatenate([few, np.flatnonzero(is_held_out)])
    some = ExitSamples(*(one[rows] for one in data))
    settings = ProbeSettings(width=64, max_epochs=400, patience=4)
    _, figures = train_probe(some, is_held_out[rows], settings, NO_PROGRESS)
    assert figures["epochs"] == figures["best_epoch"] + 4 < 400


@pytest.mark.parametrize("agrees", [False, True])
def test_an_exit_that_always_does_the_same(agrees: bool) -> None:
    draw = np.random.default_rng(0)
    data = ExitSamples(draw.normal(size=(200, 8)).astype(np.float32), np.full(200, agrees), np.zeros(200))
    trained, _ = train_probe(data, np.arange(200) % 5 == 0, ProbeSettings(max_epochs=20), NO_PROGRESS)
    assert np.abs(probe_scores(trained, data.states) - agrees).max() < 0.05


def test_prompts_are_held_out_at_random() -> None:
    held_out = held_out_prompts(50, ProbeSettings())
    assert len(held_out) == len(set(held_out.tolist())) == 10
    assert held_out.tolist() != held_out_prompts(50, ProbeSettings(seed=1)).tolist()
    assert len(held_out_prompts(2, ProbeSettings(held_out=0.9))) == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"width": 0}, "--width is 0"), ({"answer_tokens": 0}, "--answer-tokens is 0"),
    ({"held_out": 1.0}, "--held-out is 1; it must lie between 0 and 1"),
])  # fmt: skip
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeSettings(**changes)


# Where a request says it.


@pytest.mark.parametrize(("work", "settings"), [(train_probes, ProbeSettings()), (calibrate, CalibrationSettings())])
@pytest.mark.parametrize(("exits", "said"), [
    (ExitConfig(), "has no exits to .*; add some .*add-exits"),
    (ExitConfig(exit_layer_nums=(2, 6), exit_uses=("draft",)), r"its exits \(2, 6\) only draft .*--exit-uses leave"),
])  # fmt: skip
def test_a_model_without_exits_to_leave_at_is_told_what_to_do(
    work: Callable, settings: object, exits: ExitConfig, said: str
) -> None:
    checkpoint = SimpleNamespace(config=SimpleNamespace(path="model"))
    loaded = SimpleNamespace(engine=SimpleNamespace(exits=exits), checkpoint=checkpoint)
    with pytest.raises(ValueError, match=f"the model in model .*{said}"):
        work(None, loaded, None, settings, None)


def test_requests_and_programs_name_the_score(capsys: pytest.CaptureFixture[str]) -> None:
    given = EarlyExitFields(exit_score="probe", exit_thresholds=0.5).with_exits(GenerationParams())
    assert (given.mode, given.exit_score, given.plan_exits) == ("early_exit", "probe", None)
    assert EarlyExitFields().with_exits(replace(given, mode="full")).exit_score == "probe"  # which has no effect there
    with pytest.raises(ValueError, match="exit_score"):
        EarlyExitFields(exit_score="heads")
    assert generate(["--load", "nowhere", "--prompt", "a", "--exit-score", "probe"]) == 2
    assert "--exit-score has no effect without --mode early_exit" in capsys.readouterr().err
    flags = ["--load", "nowhere", "--exit-score", "probe", "--mode", "early_exit", "--no-plan-exits"]
    defaults = server_config(build_server_parser().parse_args(flags)).defaults
    assert (defaults.exit_score, defaults.plan_exits) == ("probe", False)
