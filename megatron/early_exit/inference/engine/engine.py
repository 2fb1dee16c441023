"""Runs many requests at once, each in its own mode: continuous batching with early exits and exact KV caches.

Every step gives each request its next rows (a part of its prompt, its last token, a draft) and has the workers run them
in one batch. The engine owns tokens, slots, draft lengths and finish reasons; it knows token ids, not text, and no
tensors, and has one thread. Where the workers run, and in which layout, is the executor's business.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.inference.certificates import NO_CERTIFICATES, Certificates
from megatron.early_exit.inference.costs import MEASURED_SLOTS, StepCosts
from megatron.early_exit.inference.engine.audit import ExitAudit, RunningAudit
from megatron.early_exit.inference.engine.draft_length import StepLoad
from megatron.early_exit.inference.engine.generation import GenerationRequest, RunningGeneration
from megatron.early_exit.inference.engine.request import Progress, Request, Result, RunningRequest
from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.engine.request_planner import RequestPlanner
from megatron.early_exit.inference.engine.scoring import ScoringRequest
from megatron.early_exit.inference.engine.slots import Assignment, Slots
from megatron.early_exit.inference.engine.speculation import DraftingThenVerifying, RunningSpeculation
from megatron.early_exit.inference.executor.base import Executor, ExecutorError
from megatron.early_exit.inference.params import ExitScore, GenerationParams, ScoreParams
from megatron.early_exit.inference.protocol import (
    FINAL_HEAD,
    CopyPrefix,
    Free,
    Rows,
    RowsOutput,
    SlotOperation,
    Step,
)
from megatron.early_exit.inference.results import FinishReason, GeneratedToken, RequestResult

log = logging.getLogger(__name__)

_NO_SCORES: Mapping[ExitScore, np.ndarray] = MappingProxyType({})

_ROWS_OF_AUDITS = 32
"""In a step that users wait for."""


AnyRequest = TypeVar("AnyRequest", bound=Request)


class QueueFull(RuntimeError):
    """No slot is free and no more requests may wait."""


@dataclass
class Event:
    """What one step did for one request."""

    request_id: int
    tokens: list[GeneratedToken]
    """New tokens."""
    result: Result | None = None
    """Set when the request has ended."""


class Engine:
    """Requests in, tokens out."""

    def __init__(
        self,
        executor: Executor,
        exits: ExitConfig,
        *,
        ends: Collection[int] = (),
        max_waiting: int | None = None,
        prefill_chunk: int = 256,
        costs: StepCosts | None = None,
        exit_scores: Mapping[ExitScore, np.ndarray] = _NO_SCORES,
        certificates: Certificates = NO_CERTIFICATES,
        no_probes: str = "the checkpoint has none",
        audit: ExitAudit | None = None,
    ) -> None:
        """ends: ids that end an answer. max_waiting: requests that may queue for a slot, default any number.
        prefill_chunk: rows of prompts in one step, so that long prompts do not stop the others; over pipeline stages,
        as many steps of them may be in flight as there are stages, and one more. costs: of layers and
        heads, for drafts of adaptive length and planned exits; see `prepare`. exit_scores: [decisions, exits] of each
        kind of score, from records, for planned exits. certificates: those that hold for this model. no_probes: why it
        has no probes, if it has none.
        audit: which answers are checked when they have ended; none by default."""
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk is {prefill_chunk}; it must be at least 1")
        self.executor, self.exits, self.ends = executor, exits, frozenset(ends)
        self.description = executor.description
        self.max_waiting, self.prefill_chunk = max_waiting, prefill_chunk
        self.slots = Slots(self.description.num_slots)
        self.checks = RequestChecks(
            self.description, exits, self.ends, tuple(exit_scores), certificates=certificates, no_probes=no_probes
        )
        self._planner = RequestPlanner(self.description, self.checks, exit_scores, costs)
        self._request_ids, self._step_numbers = itertools.count(), itertools.count()
        self._queue: dict[int, Request] = {}
        self._running: dict[int, RunningRequest] = {}
        """In the order of admission."""
        self.audit = audit or ExitAudit()
        """It has requests of its own, which no count of requests here includes."""
        self._operations: list[SlotOperation] = []
        """For the next step."""
        self._num_planned_for = 0
        self.failure: str | None = None
        """Why the workers have ended; None while they live."""

    # Requests come and go.

    def add(self, prompt_ids: Sequence[int], params: GenerationParams, *, seed_offset: int = 0) -> int:
        """Queue a request for an answer; returns its id. `n` is the caller's business: each call is one answer.

        Raises ValueError if the model cannot do what is asked, QueueFull if too many requests wait, ExecutorError if
        the workers have ended."""
        prompt_ids = list(prompt_ids)
        self.checks.check_generation(prompt_ids, params)
        self._check_room()
        return self._enqueue(
            self._planner.request(
                next(self._request_ids),
                self.slots.prepare(prompt_ids),
                params,
                seed_offset=seed_offset,
                num_requests=min(len(self._running) + len(self._queue) + 1, self.description.num_slots),
                is_audited=self.audit.draws(params),
            )
        )

    def add_scoring(self, ids: Sequence[int], params: ScoreParams) -> int:
        """Queue a request for what heads predict over `ids`; returns its id. The result is a `ScoreResult`. Raises as
        `add`."""
        model, ids = self.description, list(ids)
        self.checks.check_scoring(ids, params)
        heads = tuple(FINAL_HEAD if layer is None else model.index_of(layer) for layer in params.heads(self.exits))
        self._check_room()
        return self._enqueue(
            ScoringRequest(
                request_id=next(self._request_ids),
                prompt=self.slots.prepare(ids, runs_all_layers=heads[-1] == FINAL_HEAD),
                params=params,
                model=model,
                heads=heads,
            )
        )

    def cancel(self, request_id: int) -> Result | None:
        """End a request with what it has so far, which is returned; no step reports it any more. None if it has ended
        already."""
        return self._end(request_id, "cancelled")

    def stop(self, request_id: int, num_tokens: int) -> Result | None:
        """As `cancel`, with finish reason 'stop': the caller found a stop string in the first `num_tokens` tokens."""
        return self._end(request_id, "stop", num_tokens=num_tokens)

    def fail_all(self, error: str) -> list[Event]:
        """End every request with an error."""
        for audit in self.audit.drop_all():
            self._leave(audit, is_clean=False)
        ids = [*self._running, *self._queue]
        return [Event(request_id, [], self._end(request_id, "error", error)) for request_id in ids]

    def prepare(self, params: GenerationParams) -> None:
        """Measure what layers and heads cost, if requests with these settings, which the model can do, depend on it and
        nothing is running.

        Until then a guess does: rows are free, a head costs what it reads. If the workers have ended, `add` says so."""
        if self._planner.needs_costs(params) and not self.has_work:
            self.measure_costs()

    def measure_costs(self) -> StepCosts:
        """What layers and heads cost, measured once; the engine must be idle. A guess if the workers have ended."""
        if self._planner.measured_costs is None:
            num_slots = min(self.description.num_slots, MEASURED_SLOTS)
            self.borrow(num_slots)  # which are overwritten
            try:
                self._planner.measured_costs = self.executor.measure_costs()
            except ExecutorError as error:
                self.failure = str(error)
            finally:
                for slot in range(num_slots):
                    self.slots.free(slot, is_clean=False)
        return self._planner.costs

    def forget_prefixes(self) -> None:
        """Drop the rows that slots keep for later requests to share, so that the next ones compute their prompts; the
        engine must be idle."""
        self.borrow(self.description.num_slots)
        self.give_back(self.description.num_slots)

    def look_after_workers(self) -> None:
        """Notice workers that have ended while there is nothing to run: `failure` says so then, as after a step."""
        try:
            self.executor.poll(timeout=0)  # what may come is of requests that have ended
        except ExecutorError as error:
            self.failure = str(error)

    def _interrupt_audits(self) -> None:
        """Take back the slots of audits that run, for somebody who needs them; they begin again later."""
        for running in reversed(self.audit.running.values()):
            self.audit.put_back(running.request)
            self._leave(running, is_clean=True)
        self.audit.running.clear()

    @property
    def has_work(self) -> bool:
        """Whether there are requests that have not ended. Audits are none: while `audit.has_work`, steps run them."""
        return bool(self._queue or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that queue for a slot."""
        return len(self._queue)

    @property
    def kv_cache_usage(self) -> float:
        """Share of all positions of all slots that running requests have filled."""
        num_rows = sum(request.num_rows for request in self._running.values())
        return num_rows / (self.description.num_slots * self.description.num_positions)

    def _check_room(self) -> None:
        if self.failure is not None:
            raise ExecutorError(self.failure)
        num_free = self.slots.num_free + len(self.audit.running)
        num_waiting = len(self._queue) - num_free  # the others get a slot with the next step
        if self.max_waiting is not None and num_waiting >= self.max_waiting:
            raise QueueFull(
                f"all {self.description.num_slots} slots are taken and {num_waiting} requests wait; try again "
                "later, or start the engine with more slots"
            )

    def _enqueue(self, request: Request) -> int:
        self._queue[request.request_id] = request
        return request.request_id

    def _end(
        self, request_id: int, reason: FinishReason, error: str | None = None, num_tokens: int | None = None
    ) -> Result | None:
        """End a request, queued or running. After an error its slot's rows are of no use to others. num_tokens: of the
        answer that count; None: all."""
        result: Result
        request = self._queue.pop(request_id, None)
        if request is not None:
            result = request.result(reason, error)
        elif request_id in self._running:
            running = self._running.pop(request_id)
            self._leave(running, is_clean=error is None)
            request, result = running.request, running.result(reason, error)
        else:
            return None
        if isinstance(result, RequestResult):
            if num_tokens is not None:
                result = result.stopped_after(num_tokens)
            if isinstance(request, GenerationRequest) and request.is_audited:
                self.audit.take(request, result, next(self._request_ids), self.slots)
        return result

    def _leave(self, running: RunningRequest, is_clean: bool) -> None:
        """Take the slot of a request that runs no more."""
        self._operations.append(Free(running.slot, running.complete_to if is_clean else 0))
        self.slots.free(running.slot, is_clean=is_clean)

    # One step.

    def step(self) -> list[Event]:
        """Give every running request its next rows and take what has come of earlier ones.

        Returns what is new for each request, and the results of those that ended. If the workers have ended, all
        requests end with an error."""
        events: dict[int, Event] = {}
        try:
            self._admit(events)
            self._select_exits_again()
            while self.executor.can_submit and self._submit():
                pass
            # A step whose requests have ended, interrupted for instance, may still be what the executor waits for.
            if not self.executor.can_submit or any(one.is_in_flight for one in self._all_running):
                for output in self.executor.poll():
                    self._receive(output, events)
        except ExecutorError as error:
            self.failure = str(error)
            return [*events.values(), *self.fail_all(self.failure)]
        return list(events.values())

    def borrow(self, count: int) -> tuple[int, ...]:
        """As `Slots.borrow`; the engine must be idle, but for audits."""
        self._interrupt_audits()
        return self.slots.borrow(count)

    def run_step(self, operations: Sequence[SlotOperation], rows: Sequence[Rows]) -> list[RowsOutput]:
        """Run a step for somebody who has borrowed slots (`borrow`), beside the scheduler; the engine must be
        idle. Returns the rows' outputs in the order of slots. Raises ExecutorError."""
        self.executor.submit(Step(next(self._step_numbers), (*self._operations, *operations), tuple(rows)))
        self._operations.clear()
        generations = {(one.slot, one.generation) for one in rows}
        outputs: list[RowsOutput] = []
        while len(outputs) < len(rows):  # beside those of requests that have ended
            outputs += [one for one in self.executor.poll() if (one.slot, one.generation) in generations]
        return sorted(outputs, key=lambda output: output.slot)

    def give_back(self, count: int) -> None:
        """End the use of borrowed slots."""
        for slot in range(count):
            self._operations.append(Free(slot, 0))
            self.slots.free(slot, is_clean=False)

    def _admit(self, events: dict[int, Event]) -> None:
        if len(self._queue) > self.slots.num_free:
            self._interrupt_audits()
        for request, assignment in self._with_slots(self._queue.values()):
            del self._queue[request.request_id]
            running = self._running[request.request_id] = request.start(assignment)
            self._announce(running, assignment)
            reason = running.finished_without_rows()
            if reason is not None:
                events[request.request_id] = Event(request.request_id, [], self._end(request.request_id, reason))
        if not self._queue:
            for audit, assignment in self._with_slots(self.audit.waiting.values()):
                self._announce(self.audit.start(audit, assignment), assignment)

    def _with_slots(self, requests: Iterable[AnyRequest]) -> Iterator[tuple[AnyRequest, Assignment]]:
        """Those that get a slot now, and which, as long as there are free ones."""
        for request in list(requests):
            if not self.slots.num_free:
                return
            has_block = lambda index: self.description.exits[index].has_block
            assignment = self.slots.assign(
                request.prompt, request.max_shared, frozenset(filter(has_block, request.enabled_exits))
            )
            if assignment is not None:  # else another request is about to have computed what this one needs
                yield request, assignment

    def _announce(self, running: RunningRequest, assignment: Assignment) -> None:
        """Have the workers know of a request before its first rows."""
        if assignment.copy_from is not None:
            self._operations.append(CopyPrefix(assignment.copy_from, assignment.slot, assignment.num_shared))
        self._operations.append(running.admission())

    def _select_exits_again(self) -> None:
        """What pays for one request may not pay for many. The block of an exit must have seen all rows, so what was not
        enabled at first cannot be later. What holds for all exits or none is chosen once for an answer."""
        num_running = len(self._running)
        if self._num_planned_for == num_running:
            return
        self._num_planned_for = num_running
        for request in self._running.values():
            if isinstance(request, RunningGeneration) and self._planner.may_plan_again(request.params):
                request.thresholds = self._planner.thresholds(request.params, num_running)

    @property
    def _all_running(self) -> list[RunningRequest]:
        return [*self._running.values(), *self.audit.running.values()]

    def _load(self) -> StepLoad:
        """What the step will be of, once all requests have chosen what to draft."""
        speculating = [one for one in self._running.values() if isinstance(one, RunningSpeculation)]
        drafting = sum(len(one.request.draft_exits) > 0 for one in speculating)
        in_rounds = [one for one in speculating if isinstance(one, DraftingThenVerifying)]
        load = StepLoad(max(len(self._running), 1), max(drafting, 1))
        if self.description.num_stages > 1:  # requests that wait would leave other stages idle
            for one in in_rounds:
                one.choose_draft(load)
            return load
        load.is_verifying = any(one.has_finished_draft for one in in_rounds)
        load.is_drafting = any(one.is_drafting for one in in_rounds)
        if not load.is_drafting:  # else those who would begin wait as well
            for one in in_rounds:
                one.choose_draft(load)
            load.is_drafting = any(one.is_drafting for one in in_rounds)
        return load

    def _submit(self) -> bool:
        """Submit a step. False if no request has rows to run now."""
        in_flight = sum(request.num_prompt_rows_in_flight for request in self._all_running)
        most = (self.description.num_stages + 1) * self.prefill_chunk
        budget = min(self.prefill_chunk, max(most - in_flight, 0))
        rows: list[Rows] = []
        load = self._load()
        for request in self._all_running:
            if request.request_id in self.audit.running and self._running:
                budget = min(budget, _ROWS_OF_AUDITS)
            following = request.next_rows(budget, load)
            if following is not None:
                rows.append(request.submit(following))
                budget -= len(following.tokens) if following.phase in ("prefill", "score") else 0
        if rows:
            self.executor.submit(Step(next(self._step_numbers), tuple(self._operations), tuple(rows)))
            self._operations.clear()
        return bool(rows)

    def _receive(self, output: RowsOutput, events: dict[int, Event]) -> None:
        audit = self.audit.running.get(output.request_id)
        request = audit or self._running.get(output.request_id)
        if request is None or output.generation != request.generation:
            return  # it has ended since
        try:
            progress = request.receive(output)
        except Exception as error:  # whatever it is, it is this request's
            log.info("request %d failed", output.request_id, exc_info=True)
            message = f"its tokens could not be used ({type(error).__name__}: {error})"
            progress = Progress(finish_reason="error", error=message)
        if progress.error is None:  # else it may be in no state to say
            self.slots.advance(request.slot, request.tokens, request.complete_to)
        if audit is not None:
            self._receive_audit(audit, progress)
            return
        result = None
        if progress.finish_reason is not None:
            result = self._end(output.request_id, progress.finish_reason, progress.error)
        if progress.tokens or result is not None:
            # Stages answer by themselves, so a step may bring several outputs of one request.
            event = events.setdefault(output.request_id, Event(output.request_id, []))
            event.tokens.extend(progress.tokens)
            event.result = result

    def _receive_audit(self, running: RunningAudit, progress: Progress) -> None:
        if progress.finish_reason is not None:
            del self.audit.running[running.request_id]
            self._leave(running, is_clean=progress.error is None)
            self.audit.finish(running.request, running.result(progress.finish_reason, progress.error))
