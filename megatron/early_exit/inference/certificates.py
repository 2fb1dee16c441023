"""Certified thresholds: which promise holds for which thresholds, and for which model. `tools/evaluate.py calibrate`
makes them; they lie in the folder of the checkpoint.

The promise (A-max): averaged over prompts that are drawn like those of the calibration, at least a share `level` of all
decisions along the full model's greedy answer is that of the full model, whichever of the certified exits are enabled.
The calibration of a level certifies less than that with probability `delta` at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from megatron.early_exit.config.checkpoint_files import CERTIFICATE_FILE
from megatron.early_exit.inference.fingerprint import ExitFingerprint
from megatron.early_exit.inference.params import ExitScore, GenerationParams
from megatron.early_exit.platform.files import replaced

Risk = Literal["A-max", "B", "C"]
"""The loss of a prompt, from 0 to 1. A-max: share of decisions at which an exit that reaches its threshold differs
from the full model. B: 1 if there is such a decision. C: 1 - ROUGE-L of the answer with early exit against the full
model's."""


@dataclass(frozen=True)
class AnswerSettings:
    """How the certified answers are made: greedily, up to an end of the model."""

    max_tokens: int
    ignore_eod: bool = False
    chat_template: str | None = None
    """Digest of the template that made the prompts; None: they are no chats."""


@dataclass(frozen=True)
class FreeRunningCertificate:
    """The promise for what early exit itself generates: at least a share `level` of its decisions is what the full
    model would choose behind the same tokens, as long as all certified exits are enabled."""

    p_value: float
    risk: float
    """Mean loss on the split that the test was made on."""
    is_certified: bool


@dataclass(frozen=True)
class Certificate:
    """One level, certified or refused."""

    level: float
    delta: float
    """The probability that the calibration certifies a promise that does not hold."""
    risk: Risk
    fingerprint: ExitFingerprint
    answers: AnswerSettings
    thresholds: dict[int, float]
    """By layer; exits that are left out are never taken. Empty if the level is refused."""
    refusal: str | None
    """Why there is no promise."""
    p_value: float | None
    calibration_risk: float | None
    """Mean loss of the thresholds on the calibration split."""
    num_prompts: dict[str, int]
    """Of each split."""
    free_running: FreeRunningCertificate | None = None
    date: str = ""

    @property
    def score(self) -> ExitScore:
        """What the thresholds are compared with."""
        return self.fingerprint.score

    @property
    def covers_subsets(self) -> bool:
        """Whether all of the promise holds with some of the certified exits alone as well."""
        return self.risk != "C" and not (self.free_running is not None and self.free_running.is_certified)


@dataclass(frozen=True)
class Certificates:
    """Those of a checkpoint, as far as they hold for the model that was loaded."""

    valid: tuple[Certificate, ...] = ()
    mismatches: tuple[str, ...] = ()
    """Why others do not hold."""

    @classmethod
    def of(
        cls,
        certificates: Sequence[Certificate],
        loaded: Mapping[ExitScore, ExitFingerprint],
        chat_template: str | None,
    ) -> Certificates:
        """loaded: what each score depends on. chat_template: digest of the one that is used; None: there is none."""
        valid, mismatches = [], []
        for one in certificates:
            differences = one.fingerprint.differences(loaded[one.score])
            if one.answers.chat_template not in (None, chat_template):
                differences.append("another chat template")
            if differences:
                mismatches.append(_mismatch(one.level) + " and ".join(differences))
            else:
                valid.append(one)
        return cls(tuple(valid), tuple(dict.fromkeys(mismatches)))

    @property
    def certified(self) -> tuple[Certificate, ...]:
        """One of each level that can be asked for, ascending."""
        return tuple(sorted({one.level: one for one in self.valid if one.refusal is None}.values(), key=_level))

    def find(self, level: float, score: ExitScore | None = None) -> Certificate:
        """The newest certificate of a level, with this score if one is given. Raises ValueError if there is none that
        holds."""
        fits = lambda one: abs(one.level - level) < 1e-9 and score in (None, one.score)
        if found := [one for one in self.valid if fits(one) and one.refusal is None]:
            return found[-1]
        if found := [*filter(fits, self.valid)]:
            raise ValueError(f"certified:{level:g} is not to be had for this model: {found[-1].refusal}")
        if self.certified:
            there = ", ".join(f"certified:{one.level:g}" for one in self.certified)
            others = "".join(f" ({words})" for words in self.mismatches if words.startswith(_mismatch(level)))
            with_score = "" if score is None else f" with exit_score {score!r}"
            raise ValueError(
                f"certified:{level:g} has no certificate{with_score} that holds; there are {there}{others}"
            )
        reasons = "; ".join(self.mismatches) or "the checkpoint has none"
        raise ValueError(
            f"certified:{level:g} needs a certificate that holds for the loaded model ({reasons}); make one with "
            "tools/evaluate.py calibrate"
        )

    def thresholds(self, asked: float, params: GenerationParams) -> dict[int, float]:
        """Threshold by layer for a request that asks for the certified level `asked`; empty if none of the exits that
        it names may be taken. Raises ValueError if the promise does not cover it."""
        certificate = self.find(asked, params.exit_score)
        sampling, level = params.sampling, f"certified:{certificate.level:g}"
        if not sampling.is_plain_argmax:
            raise ValueError(f"{level} holds for greedy answers; leave out temperature, penalties and biases")
        if params.min_tokens:
            raise ValueError(f"{level} does not cover min_tokens; leave it out")
        if params.max_tokens != certificate.answers.max_tokens:
            raise ValueError(
                f"{level} was made for answers of max_tokens {certificate.answers.max_tokens}, not "
                f"{params.max_tokens}; ask for that, or calibrate again with --answer-tokens {params.max_tokens}"
            )
        if params.ignore_eod != certificate.answers.ignore_eod:
            raise ValueError(f"{level} was made with ignore_eod {certificate.answers.ignore_eod}; ask for the same")
        if certificate.risk == "C" and (params.exit_layers or params.plan_exits):
            raise ValueError(f"{level} (risk C) holds with all exits enabled; leave out exit_layers and plan_exits")
        layers = params.exit_layers or tuple(certificate.thresholds)
        return {layer: certificate.thresholds[layer] for layer in sorted(layers) if layer in certificate.thresholds}


NO_CERTIFICATES = Certificates()


def read_certificates(folder: Path) -> tuple[Certificate, ...]:
    """Those in the folder of a checkpoint. Raises ValueError if the file cannot be read."""
    path = folder / CERTIFICATE_FILE
    if not path.exists():
        return ()
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[Certificate, ...])
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it, or calibrate the exits again") from error


def add_certificates(folder: Path, certificates: Sequence[Certificate]) -> None:
    """Write certificates into the folder of a checkpoint, in place of those of the same level for the same model."""
    key = lambda one: (one.level, one.fingerprint)
    new = {key(one) for one in certificates}
    kept = [one for one in read_certificates(folder) if key(one) not in new]
    with replaced(folder / CERTIFICATE_FILE) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode([*kept, *certificates]), indent=1))


def _level(certificate: Certificate) -> float:
    return certificate.level


def _mismatch(level: float) -> str:
    """How every sentence about a certificate of this level begins that does not hold."""
    return f"the certificate of {level:g} is for "
