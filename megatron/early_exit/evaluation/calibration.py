"""From prompts to certificates: records, the split, the line of thresholds, its test, and what the test split says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from megatron.early_exit.config.checkpoint_files import CHECKSUMS_FILE
from megatron.early_exit.evaluation.calibration_results import calibration_text, card_of, description_of
from megatron.early_exit.evaluation.calibration_settings import CalibrationSettings
from megatron.early_exit.evaluation.certification import (
    NAMED_GRID,
    NEVER,
    LineTest,
    Split,
    ThresholdLine,
    layers_saved,
    losses,
    p_value,
    run_line_test,
)
from megatron.early_exit.evaluation.free_running import FreeAnswer, free_running
from megatron.early_exit.evaluation.prompts import PromptSet, check_unseen
from megatron.early_exit.evaluation.recording import ShowProgress, leaving_layers, rounding_floor, take_records
from megatron.early_exit.evaluation.statistics.intervals import loss_interval
from megatron.early_exit.evaluation.statistics.learn_then_test import prompts_needed
from megatron.early_exit.evaluation.statistics.text_metrics import text_loss
from megatron.early_exit.inference.certificates import AnswerSettings, Certificate, FreeRunningCertificate
from megatron.early_exit.inference.engine_loading import LoadedEngine
from megatron.early_exit.inference.exit_records import AboutRecords, PromptRecord, RecordsFolder
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams


@dataclass
class Calibration:
    """What `calibrate` found."""

    certificates: list[Certificate]
    results: dict[str, Any] = field(default_factory=dict)
    """Of the result document."""

    def text(self) -> str:
        """The certificates and what the test split says of them, for people."""
        return calibration_text(self.results)


def calibrate(
    llm: LLM, loaded: LoadedEngine, prompts: PromptSet, settings: CalibrationSettings, show: ShowProgress
) -> Calibration:
    """Take records of `prompts`, or go on with those that are there, and certify every level.

    show: makes a progress function for a kind of work. Raises ValueError for a model without exits, for one whose
    weights cannot be told from others, for too few prompts, for records that are damaged, and with `exit_score` "probe"
    for a model without probes and for prompts that they were trained on."""
    leaving_layers(loaded, "calibrate")
    if not (loaded.checkpoint.folder / CHECKSUMS_FILE).is_file():
        raise ValueError(
            f"{loaded.checkpoint.folder} has no {CHECKSUMS_FILE}, by which certificates know weights; let "
            "tools/convert_checkpoint.py reshard write the checkpoint again"
        )
    settings.check_prompts(len(prompts.prompts))
    llm.engine.checks.check(GenerationParams(observe_exits=True, exit_score=settings.exit_score))
    if settings.exit_score == "probe":
        probes = loaded.checkpoint.probes
        assert probes is not None, "the engine refuses the score of probes that there are not"
        check_unseen(prompts.prompts, probes.about.prompts)
    return _Calibrator(llm, loaded, prompts, settings, show).run()


class _Calibrator:
    def __init__(
        self, llm: LLM, loaded: LoadedEngine, prompts: PromptSet, settings: CalibrationSettings, show: ShowProgress
    ) -> None:
        self._llm, self._prompts, self._settings, self._show = llm, prompts, settings, show
        self._fingerprint = loaded.checkpoint.exit_fingerprint(loaded.tokenizer, settings.exit_score)
        self._answers = AnswerSettings(settings.answer_tokens, settings.ignore_eod, prompts.template_digest)
        about = AboutRecords(self._fingerprint, self._answers, prompts.digest, len(prompts.prompts))
        self._folder = RecordsFolder(loaded.checkpoint.folder, about)
        self._layers = loaded.engine.exits.leaving_layers
        model = loaded.engine.description
        self._savings = [1.0 - one.depth / model.num_layers for one in model.exits if one.may_leave]
        self._split = Split.draw(len(prompts.prompts), settings.seed, settings.with_free_running)

    def run(self) -> Calibration:
        settings = self._settings
        self._records, record_seconds = take_records(
            self._llm, self._prompts.prompts, self._folder, self._show("prompts")
        )
        few, start = self._split.test[: settings.rounding_prompts], time.perf_counter()
        self._rounding = rounding_floor(
            self._llm, self._of(few), self._records_of(few), self._answers, self._show("prompts again, one by one")
        )
        rounding_seconds, level_seconds, test_seconds, levels = time.perf_counter() - start, {}, {}, []
        for level in settings.levels:
            start = time.perf_counter()
            certificate, card, chosen = self._certify(level)
            certified = time.perf_counter()
            of_test = None
            if certificate.refusal is None:
                of_test, measured = self._test(certificate, chosen)
                card |= measured
            levels.append((certificate, card, of_test))
            level_seconds[f"{level:g}"] = certified - start
            test_seconds[f"{level:g}"] = time.perf_counter() - certified
        cards = [card for _, card, _ in levels]
        found = Calibration([certificate for certificate, _, _ in levels])
        found.results = {
            "certificates": cards,
            **description_of(self._records_of(self._split.test), self._layers, self._chosen(levels)),
            "rounding": {"batch_1_vs_n": self._rounding.rate, "decisions": self._rounding.num_decisions},
            "cost": {
                "record_seconds": record_seconds,
                "rounding_seconds": rounding_seconds,
                "level_seconds": level_seconds,
                "test_seconds": test_seconds,
            },
            "per_prompt": self._per_prompt(levels),
        }
        return found

    def _certify(self, level: float) -> tuple[Certificate, dict[str, Any], np.ndarray]:
        """(certificate, card, [exits] thresholds of the last point that was accepted, else of the first)"""
        settings, alpha = self._settings, 1.0 - level
        line = self._line(alpha)
        tested = run_line_test(
            self._losses_on(self._split.calibration, line, f"level {level:g}"), len(line), alpha=alpha,
            delta=settings.delta_of_test, risk=settings.risk, seed=settings.seed,
        )  # fmt: skip
        refusal = self._refusal(level, line, tested)
        last = tested.chosen if tested.chosen is not None else 0
        chosen = line.thresholds[last]
        thresholds = {} if refusal is not None else self._by_layer(chosen)
        second = None
        if refusal is None and settings.with_free_running:
            second = self._second_certificate(thresholds, level)
        certificate = Certificate(
            level=level, delta=settings.delta, risk=settings.risk, fingerprint=self._fingerprint,
            answers=self._answers, thresholds=thresholds, refusal=refusal, p_value=tested.p_values[last],
            calibration_risk=tested.risks[last], num_prompts=self._split.sizes, free_running=second,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        return certificate, card_of(certificate, line, tested, self._layers), chosen

    def _test(self, certificate: Certificate, chosen: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """([prompts] losses of the test split, what the card says of it). chosen: [exits] thresholds"""
        seed, second = self._settings.seed, certificate.free_running
        numbers = self._split.test
        free = self._free_running(numbers, certificate.thresholds, "test")
        of_test = self._test_losses(chosen, free)
        saved = layers_saved(self._records_of(numbers), chosen, self._savings)
        free_losses = np.array([one.loss for one in free])
        return of_test, {
            "test_risk": float(of_test.mean()),
            "test_risk_interval": list(loss_interval(of_test, seed)),
            "expected_runs_saved": saved,
            "free_running": {
                "p_value": None if second is None else second.p_value,
                "risk": None if second is None else second.risk,
                "is_certified": None if second is None else second.is_certified,
                "test_risk": float(free_losses.mean()),
                "test_risk_interval": list(loss_interval(free_losses, seed)),
                "runs_saved": _runs_saved(free),
            },
        }

    def _by_layer(self, thresholds: np.ndarray) -> dict[int, float]:
        """thresholds: [exits]"""
        return {layer: float(value) for layer, value in zip(self._layers, thresholds) if value != NEVER}

    def _line(self, alpha: float) -> ThresholdLine:
        if self._settings.grid is None and self._settings.risk == "A-max":
            return ThresholdLine.tuned(self._records_of(self._split.tuning), alpha, self._savings)
        return ThresholdLine.named(self._settings.grid or NAMED_GRID, len(self._layers))

    def _losses_on(self, numbers: np.ndarray, line: ThresholdLine, words: str) -> Callable[[int], np.ndarray]:
        """[prompts] losses of a point."""
        if self._settings.risk == "C":
            return lambda point: self._text_losses(numbers, line.thresholds[point], f"{words}, {line.names[point]:g}")
        of_points = losses(self._records_of(numbers), line.thresholds, self._settings.risk)
        return lambda point: of_points[:, point]

    def _text_losses(self, numbers: np.ndarray, thresholds: np.ndarray, words: str) -> np.ndarray:
        free = self._free_running(numbers, self._by_layer(thresholds), words)
        return self._rouge_losses(numbers, free)

    def _free_running(self, numbers: np.ndarray, thresholds: dict[int, float], words: str) -> list[FreeAnswer]:
        """thresholds: by layer. words: for the progress."""
        return free_running(
            self._llm, self._of(numbers), thresholds, self._answers, self._show(words), self._settings.exit_score
        )

    def _rouge_losses(self, numbers: np.ndarray, free: Sequence[FreeAnswer]) -> np.ndarray:
        text = self._llm.tokenizer.detokenize
        records = self._records_of(numbers)
        return np.array([
            text_loss(text(record.tokens.tolist()), text(list(answer.tokens)))
            for record, answer in zip(records, free, strict=True)
        ])  # fmt: skip

    def _test_losses(self, thresholds: np.ndarray, free: Sequence[FreeAnswer]) -> np.ndarray:
        if self._settings.risk == "C":
            return self._rouge_losses(self._split.test, free)
        return losses(self._records_of(self._split.test), thresholds[None], self._settings.risk)[:, 0]

    def _second_certificate(self, thresholds: dict[int, float], level: float) -> FreeRunningCertificate:
        numbers, settings = self._split.free_running, self._settings
        free = self._free_running(numbers, thresholds, "its own answers")
        of_prompts = np.array([one.loss for one in free])
        value = p_value(of_prompts, 1.0 - level, "A-max", settings.seed)
        return FreeRunningCertificate(value, float(of_prompts.mean()), value <= settings.delta_of_test)

    def _refusal(self, level: float, line: ThresholdLine, tested: LineTest) -> str | None:
        alpha, settings = 1.0 - level, self._settings
        floor = self._rounding.risk(settings.risk)
        if alpha < floor:
            what = {"A-max": "decisions", "B": "answers", "C": "answers' words (1 - ROUGE-L)"}[settings.risk]
            return (
                f"rounding alone changes {floor:.2%} of the full model's {what} (batch 1 against the batches of the "
                f"records, {self._rounding.num_prompts} prompts): no promise above {1 - floor:.4g} means anything; "
                "choose fp32, or a lower level"
            )
        if tested.chosen is None:
            text = (
                f"the safest thresholds have a risk of {tested.risks[0]:.3%} on the calibration's "
                f"{len(self._split.calibration)} prompts, p-value {tested.p_values[0]:.2g}"
            )
            needed = prompts_needed(alpha, settings.delta_of_test, tested.risks[0] / alpha)
            if needed is None:
                return f"{text}: exits differ too often; tune them longer, or ask for a lower level"
            return f"{text}: with that risk, about {needed} calibration prompts are needed"
        if all(value == NEVER for value in line.thresholds[tested.chosen]):
            return "with every exit that may be taken, too many decisions differ; tune exits longer, or ask for less"
        return None

    def _chosen(self, levels: Sequence[tuple[Certificate, Any, Any]]) -> np.ndarray | None:
        """[exits]: the thresholds of the lowest level that is certified."""
        certified = [one for one, _, _ in levels if one.refusal is None]
        if not certified:
            return None
        return np.array([certified[0].thresholds.get(layer, NEVER) for layer in self._layers])

    def _per_prompt(self, levels: Sequence[tuple[Certificate, Any, np.ndarray | None]]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [
            {"name": prompt.name, "domain": prompt.domain, "tokens": len(record.tokens), "split": None, "loss": {}}
            for prompt, record in zip(self._prompts.prompts, self._records, strict=True)
        ]
        for name in self._split.sizes:
            for number in getattr(self._split, name):
                rows[number]["split"] = name
        for certificate, _, of_test in levels:
            for number, loss in zip(self._split.test, () if of_test is None else of_test):
                rows[number]["loss"][f"{certificate.level:g}"] = float(loss)
        return rows

    def _of(self, numbers: np.ndarray) -> list[Any]:
        return [self._prompts.prompts[number] for number in numbers]

    def _records_of(self, numbers: np.ndarray) -> list[PromptRecord]:
        return [self._records[number] for number in numbers]


def _runs_saved(answers: Sequence[FreeAnswer]) -> float:
    full = sum(one.statistics.full_layer_passes for one in answers)
    return 1.0 - sum(one.statistics.layer_runs for one in answers) / full if full else 0.0
