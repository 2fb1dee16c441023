"""What is counted and timed, for Prometheus.

Counters follow answers, of which a request has prompts times n; HTTP responses are counted by status apart from them.
All labels are bounded: by the model's exits and stages, and by lists that stand here.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from megatron.early_exit.inference.engine.audit import LOSS_BUCKETS, AuditReport
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.text_engine import OutputDelta, RequestOutput
from megatron.early_exit.server.answer_fields import OPENAI_FINISH_REASONS
from megatron.early_exit.server.async_engine import AsyncEngine, OpenAnswer
from megatron.early_exit.server.mailbox import Answers

_PREFIX = "early_exit_"
_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0
)  # fmt: skip


class ServerMetrics:
    """Observes an engine (`EngineObserver`) and HTTP responses. Its registry is its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._responses = self._counter(
            "http_responses", "HTTP responses by status; 499: the client has gone", "status"
        )
        self._finished = self._counter("request_success", "Answers that have ended", "finished_reason")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were taken, each once for all n")
        self._tokens = self._counter(
            "generation_tokens", "Tokens of answers by the head that gave them", "exit_layer", "mode"
        )
        self._drafted = self._counter("drafted_tokens", "Tokens that were drafted, of answers that have ended")
        self._accepted = self._counter("accepted_tokens", "Of these, tokens that all layers accepted")
        self._ngram_drafted = self._counter("ngram_drafted_tokens", "Of the drafted tokens, those from earlier text")
        self._ngram_accepted = self._counter("ngram_accepted_tokens", "Of these, tokens that all layers accepted")
        self._passes = self._counter("layer_passes", "Rows times layers run after the prompt, of ended answers", "mode")
        self._runs = self._counter("layer_runs", "Runs of a layer after the prompt, of ended answers", "mode")
        self._full_passes = self._counter(
            "full_model_layer_passes", "What the full model needs of both (1 - ratio: the share saved)", "mode"
        )
        self._first_token = self._histogram("time_to_first_token", "From the request to the first token of an answer")
        self._between_tokens = self._histogram(
            "inter_token_latency", "From one token of an answer to the next; 0 for those that come together"
        )
        self._whole = self._histogram("e2e_request_latency", "From the request to the end of an answer")
        self._queue = self._histogram("request_queue_time", "That an answer waited in the engine for a slot")

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, words, labels, registry=self._registry)

    def _histogram(self, name: str, words: str) -> Histogram:
        return Histogram(f"{_PREFIX}{name}_seconds", words, buckets=_SECONDS, registry=self._registry)

    def watch(self, engine: AsyncEngine) -> None:
        """Report what this engine is doing whenever somebody asks."""
        self._registry.register(_EngineCollector(engine))

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self._registry)

    def on_response(self, status: int) -> None:
        """An HTTP request has ended."""
        self._responses.labels(status).inc()

    def on_answers(self, answers: Answers) -> None:
        self._prompt_tokens.inc(sum(map(len, answers.prompt_ids)))

    def on_delta(self, delta: OutputDelta, answer: OpenAnswer) -> None:
        now = time.monotonic()
        for (layer, is_final), count in Tally((one.exit_layer, one.is_final) for one in delta.tokens).items():
            self._tokens.labels("final" if is_final else layer, answer.params.mode).inc(count)
        for index in range(len(delta.tokens)):
            if answer.last_token is None:
                self._first_token.observe(now - answer.started)
            else:
                self._between_tokens.observe(0.0 if index else now - answer.last_token)
            answer.last_token = now
        if delta.is_finished:
            self._whole.observe(now - answer.started)
            self._add_end(delta.output, answer.params.mode)

    def on_cancel(self, params: GenerationParams) -> None:
        self._finished.labels("cancelled").inc()

    def _add_end(self, output: RequestOutput, mode: str) -> None:
        if output.error is not None:
            self._finished.labels("error").inc()
            return
        result = output.check()
        costs = result.statistics
        self._finished.labels(OPENAI_FINISH_REASONS.get(result.finish_reason, result.finish_reason)).inc()
        self._queue.observe(costs.queue_seconds)
        self._drafted.inc(costs.drafted)
        self._accepted.inc(costs.accepted)
        self._ngram_drafted.inc(costs.ngram_drafted)
        self._ngram_accepted.inc(costs.ngram_accepted)
        self._passes.labels(mode).inc(costs.layer_passes)
        self._runs.labels(mode).inc(costs.layer_runs)
        self._full_passes.labels(mode).inc(costs.full_layer_passes)


class _EngineCollector:
    """What the engine is doing now, read when it is asked for."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        running = min(engine.load.num_running, engine.num_admitted)
        yield _gauge("num_requests_running", "Answers that have a slot", running)
        yield _gauge("num_requests_waiting", "Answers that were admitted and have none", engine.num_admitted - running)
        yield _gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1", engine.load.kv_cache_usage)
        yield _gauge("ready", "Whether requests are taken", int(engine.is_ready))
        busy = CounterMetricFamily(
            f"{_PREFIX}stage_busy_seconds", "That a pipeline stage has run rows", labels=["stage"]
        )
        passes = CounterMetricFamily(f"{_PREFIX}stage_passes", "Batches that a stage has run", labels=["stage"])
        rows = CounterMetricFamily(f"{_PREFIX}stage_rows", "Rows in them", labels=["stage"])
        backlog = GaugeMetricFamily(f"{_PREFIX}stage_backlog_rows", "Rows that lie at a stage", labels=["stage"])
        for stage, load in enumerate(engine.stage_loads):
            busy.add_metric([str(stage)], load.busy_seconds)
            passes.add_metric([str(stage)], load.passes)
            rows.add_metric([str(stage)], load.rows)
            backlog.add_metric([str(stage)], load.backlog)
        yield from (busy, passes, rows, backlog)
        yield from _audit_metrics(engine.audits)


def _audit_metrics(reports: Sequence[AuditReport]) -> Iterator[Metric]:
    """What audits have found, by promise."""
    counter = lambda name, words: CounterMetricFamily(_PREFIX + name, words, labels=["promise"])
    audited = counter("audited_requests", "Early-exit answers whose every token the final head has checked")
    others = counter("audit_not_auditable", "Answers that were drawn, but are no greedy ones or have no tokens")
    dropped = counter("audit_dropped", "Answers that were drawn, but never checked: too many waited, or they failed")
    alarms = counter("audit_alarms", "Times that the test of a promise has found it broken")
    losses = HistogramMetricFamily(
        f"{_PREFIX}audit_loss", "Share of an answer's tokens that the full model would not have taken",
        labels=["promise"],
    )  # fmt: skip
    evidence = GaugeMetricFamily(
        f"{_PREFIX}audit_evidence", "That the promise is broken; 1: none, 20: alarm", labels=["promise"]
    )
    for one in reports:
        labels = [one.promise]
        audited.add_metric(labels, one.num_audited)
        others.add_metric(labels, one.num_not_auditable)
        dropped.add_metric(labels, one.num_dropped)
        bounds = map(floatToGoString, LOSS_BUCKETS)
        buckets = [*zip(bounds, accumulate(one.loss_counts), strict=True), ("+Inf", one.num_audited)]
        losses.add_metric(labels, buckets, one.loss_sum)
        if one.evidence is not None:
            evidence.add_metric(labels, one.evidence)
            alarms.add_metric(labels, one.num_alarms)
    yield from (audited, others, dropped, losses, evidence, alarms)


def _gauge(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, words, value=value)
