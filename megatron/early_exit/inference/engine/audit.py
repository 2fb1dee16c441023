"""A live audit of early exit: of a share of the answers, every decision is checked with the final head.

Requests are drawn when they come, whatever they ask for. When one has ended, its prompt and what it has generated are
scored in one pass through all layers, while no user's request needs the slot. Exits leave exact keys and values, so the
final head's most probable token is the one that the full model takes behind the same tokens, but for rounding in
batches of other shapes. The loss of an answer is the share of its tokens that are others, or what its certificate says.
"""

from __future__ import annotations

import logging
import random
from bisect import bisect_left
from dataclasses import dataclass, field

import msgspec

from megatron.early_exit.inference import checked
from megatron.early_exit.inference.certificates import Certificate
from megatron.early_exit.inference.engine.generation import GenerationRequest
from megatron.early_exit.inference.engine.risk_monitor import RiskMonitor
from megatron.early_exit.inference.engine.scoring import RunningScoring, ScoringRequest
from megatron.early_exit.inference.engine.slots import Assignment, Slots
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from megatron.early_exit.inference.protocol import FINAL_HEAD
from megatron.early_exit.inference.results import RequestResult, ScoreResult

log = logging.getLogger(__name__)

NO_PROMISE = "none"
"""In place of a level, for requests with thresholds of their own."""

LOSS_BUCKETS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Upper bounds, for the histogram of losses."""

_SEED = 1234
_MAX_WAITING = 64
"""Answers that wait to be checked: each keeps its tokens."""


class AuditReport(msgspec.Struct, frozen=True):
    """What audits have found about the requests of one promise since the engine was loaded."""

    promise: str
    """The certified level, as in '0.99'; `NO_PROMISE` for other thresholds."""
    num_audited: int = 0
    loss_sum: float = 0.0
    """Sum of their losses, each from 0 to 1."""
    loss_counts: tuple[int, ...] = (0,) * len(LOSS_BUCKETS)
    """How many losses lie in each of `LOSS_BUCKETS`, above the one before it."""
    num_not_auditable: int = 0
    """Drawn, but there was nothing to compare: tokens that were sampled, penalised or biased, or none at all."""
    num_dropped: int = 0
    """Drawn, but never checked: too many waited, or the request or its check failed."""
    evidence: float | None = None
    """Of the sequential test, that more decisions differ than was promised; None without a promise."""
    num_alarms: int = 0

    @property
    def mean_loss(self) -> float | None:
        """None before the first audit."""
        return self.loss_sum / self.num_audited if self.num_audited else None


@dataclass(frozen=True, kw_only=True)
class AuditRequest(ScoringRequest):
    """An answer whose decisions are to be checked, as a request for scores."""

    certificate: Certificate | None
    """What was promised; None: nothing."""
    decisions: tuple[int, ...]
    """Tokens to be compared, from that behind position `score_from` on to the answer's last."""

    @classmethod
    def of(
        cls, request: GenerationRequest, result: RequestResult, request_id: int, slots: Slots
    ) -> AuditRequest | None:
        """The check of what a request has generated; None if there is nothing to compare.

        Before `min_tokens` the final head could not have ended the answer either: these tokens are left out."""
        num_exempt = request.params.min_tokens
        if not request.sampling.is_plain_argmax or len(result.tokens) <= num_exempt:
            return None
        answer = result.token_ids
        # Nobody waits for rows of an audit. Those of the last token are not needed.
        prompt = slots.prepare([*request.prompt.tokens, *answer[:-1]], runs_all_layers=False)
        return cls(
            request_id=request_id,
            prompt=prompt,
            params=ScoreParams(exit_layers=(), score_from=request.num_prompt_tokens - 1 + num_exempt),
            model=request.model,
            heads=(FINAL_HEAD,),
            certificate=request.certificate,
            decisions=tuple(answer[num_exempt:]),
        )

    def loss(self, result: ScoreResult) -> float:
        """Share of the decisions that the final head takes otherwise; with risk B whether there is one."""
        (final,) = result.heads
        differ = list(map(int.__ne__, self.decisions, final.tokens))
        if self.certificate is not None and self.certificate.risk == "B":
            return float(any(differ))
        return sum(differ) / len(differ)

    def start(self, assignment: Assignment) -> RunningAudit:
        return RunningAudit(self, assignment)


class RunningAudit(RunningScoring):
    """A check that has a slot."""

    request: AuditRequest


def _label(certificate: Certificate | None) -> str:
    return NO_PROMISE if certificate is None else f"{certificate.level:g}"


def _monitor(certificate: Certificate | None) -> RiskMonitor | None:
    """None where nothing was promised, or what only whole texts can tell."""
    return None if certificate is None or certificate.risk == "C" else RiskMonitor(1.0 - certificate.level)


@dataclass
class _Findings:
    """What is counted for one promise."""

    monitor: RiskMonitor | None
    """None: no promise to be tested."""
    num_audited: int = 0
    loss_sum: float = 0.0
    loss_counts: list[int] = field(default_factory=lambda: [0] * len(LOSS_BUCKETS))
    num_not_auditable: int = 0
    num_dropped: int = 0

    def add(self, loss: float) -> None:
        """Count a loss."""
        self.num_audited += 1
        self.loss_sum += loss
        self.loss_counts[bisect_left(LOSS_BUCKETS, loss)] += 1

    def report(self, promise: str) -> AuditReport:
        return AuditReport(
            promise, self.num_audited, self.loss_sum, tuple(self.loss_counts), self.num_not_auditable,
            self.num_dropped,
            evidence=None if self.monitor is None else self.monitor.evidence,
            num_alarms=0 if self.monitor is None else self.monitor.num_alarms,
        )  # fmt: skip


class ExitAudit:
    """Which requests are audited, which of them wait or run, and what was found."""

    def __init__(self, share: float = 0.0, *, seed: int = _SEED, max_waiting: int = _MAX_WAITING) -> None:
        """share: of the early_exit requests, 0 to 1. max_waiting: where more answers wait to be checked, the oldest
        ones are dropped. Raises ValueError."""
        self.share = checked.number("audit_share", share)
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"audit_share is {share}; it must lie between 0 (no audits) and 1 (all requests)")
        self.waiting: dict[int, AuditRequest] = {}
        """By request id, in the order in which their answers ended."""
        self.running: dict[int, RunningAudit] = {}
        self._random, self._max_waiting = random.Random(seed), max_waiting
        self._findings: dict[str, _Findings] = {}

    @property
    def has_work(self) -> bool:
        """Whether there are answers that have not been checked."""
        return bool(self.waiting or self.running)

    def draws(self, params: GenerationParams) -> bool:
        """Whether a new request is to be audited. Which of the early_exit requests are does not depend on what they
        are, only on how many came before."""
        return params.mode == "early_exit" and self.share > 0.0 and self._random.random() < self.share

    def take(self, request: GenerationRequest, result: RequestResult, request_id: int, slots: Slots) -> None:
        """Queue the check of a request that was drawn and has ended. request_id: of the check."""
        findings = self._findings_of(request.certificate)
        if result.error is not None:
            findings.num_dropped += 1
            return
        audit = AuditRequest.of(request, result, request_id, slots)
        if audit is None:
            findings.num_not_auditable += 1
            return
        self.waiting[request_id] = audit
        if len(self.waiting) > self._max_waiting:
            self._drop(self.waiting.pop(next(iter(self.waiting))))

    def start(self, request: AuditRequest, assignment: Assignment) -> RunningAudit:
        """A check that has waited gets a slot."""
        del self.waiting[request.request_id]
        running = self.running[request.request_id] = request.start(assignment)
        return running

    def put_back(self, request: AuditRequest) -> None:
        """Let a check whose slot others need wait again, before those that came later."""
        self.waiting = {request.request_id: request, **self.waiting}

    def finish(self, request: AuditRequest, result: ScoreResult) -> None:
        """Count what a check has found."""
        if result.error is not None:
            self._drop(request)
            return
        certificate, loss = request.certificate, request.loss(result)
        findings = self._findings_of(certificate)
        findings.add(loss)
        if certificate is not None and findings.monitor is not None and findings.monitor.observe(loss):
            _warn(certificate, findings.monitor)

    def drop_all(self) -> list[RunningAudit]:
        """Give up all checks. Returns those that have a slot."""
        running = list(self.running.values())
        for request in [*(one.request for one in running), *self.waiting.values()]:
            self._drop(request)
        self.running.clear()
        self.waiting.clear()
        return running

    def reports(self) -> tuple[AuditReport, ...]:
        """Of each promise for which a request was drawn."""
        return tuple(findings.report(promise) for promise, findings in sorted(self._findings.items()))

    def _drop(self, request: AuditRequest) -> None:
        self._findings_of(request.certificate).num_dropped += 1

    def _findings_of(self, certificate: Certificate | None) -> _Findings:
        label = _label(certificate)
        if label not in self._findings:
            self._findings[label] = _Findings(_monitor(certificate))
        return self._findings[label]


def _warn(certificate: Certificate, monitor: RiskMonitor) -> None:
    what = "answers" if certificate.risk == "B" else "tokens"
    log.warning(
        "early exit does not keep its promise: with 'certified:%g' at most %.2f%% of the %s should differ from the "
        "full model's, and the last audits speak against that (%.2f%% of all %d audits). What is asked no longer looks "
        "like the prompts of the calibration: calibrate again with such prompts (tools/evaluate.py calibrate), and ask "
        "for mode 'full' until then",
        certificate.level, 100 * monitor.alpha, what, 100 * monitor.mean_loss, monitor.num_losses,
    )  # fmt: skip
