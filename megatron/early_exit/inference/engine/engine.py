"""Runs many requests at once, each in its own mode: continuous batching with early exits and exact KV caches.

Every step feeds each request its next rows (a part of its prompt, its last token, a draft) and walks them up the layers
in one batch. Rows that exit leave the batch and wait where they left; when a later row of the same request passes that
layer, they go on with it. So no layer sees a row twice, and every cache entry is what the full model computes. A draft
is a row that always exits; verifying is a row that does not, with the drafts as those that waited.

Going past a layer takes all earlier rows of the request along, so earlier rows are never less deep than later ones: the
waiting rows of a request are a few runs of consecutive positions, and each layer has cached a prefix of its rows.

The engine knows token ids, not text, and one thread. All tensor-parallel ranks make the same calls.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.inference.calibration import ExitCalibration
from megatron.early_exit.inference.engine.costs import ROW_COUNTS, StepCosts
from megatron.early_exit.inference.engine.draft_length import Draft, DraftLength, verify
from megatron.early_exit.inference.engine.exit_policy import ExitPolicy
from megatron.early_exit.inference.engine.exit_selection import select_exits
from megatron.early_exit.inference.engine.request import RunningRequest
from megatron.early_exit.inference.params import GenerationParams, check_prompt
from megatron.early_exit.inference.results import (
    FinishReason,
    GeneratedToken,
    HeadPrediction,
    PromptToken,
    RequestResult,
)
from megatron.early_exit.inference.worker.cost_measurement import measure_costs
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.head_output import HeadOutput
from megatron.early_exit.inference.worker.sampling import Sampler
from megatron.early_exit.inference.worker.stage_runner import Feed, Walk

log = logging.getLogger(__name__)

_NOT_FINITE = "the model's logits are not finite: its weights hold NaN or infinite values, or overflow"

# Shorter common beginnings are computed again rather than copied.
_MIN_SHARED_PREFIX = 16


class QueueFull(RuntimeError):
    """No slot is free and no more requests may wait."""


@dataclass
class Event:
    """What one step did for one request."""

    request_id: int
    tokens: list[GeneratedToken]
    """New ones."""
    result: RequestResult | None = None
    """Set when the request has ended."""


class Engine:
    """Requests in, tokens out."""

    def __init__(
        self,
        decoder: Decoder,
        exits: ExitConfig,
        *,
        ends: Collection[int] = (),
        max_waiting: int | None = None,
        prefill_chunk: int = 256,
        costs: StepCosts | None = None,
        calibration: ExitCalibration | None = None,
    ) -> None:
        """ends: ids that end an answer. max_waiting: requests that may queue for a slot, default any number.
        prefill_chunk: rows of prompts in one step, so that long prompts do not stop the others. costs: of layers and
        heads, for drafts of adaptive length and planned exits; measured here when first needed by default. calibration:
        needed for planned exits."""
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk is {prefill_chunk}; it must be at least 1")
        self.decoder, self.exits, self.ends = decoder, exits, frozenset(ends)
        self.max_waiting, self.prefill_chunk = max_waiting, prefill_chunk
        self._costs, self._calibration = costs, calibration
        self._walk = Walk(decoder)
        self._ids = itertools.count()
        self._queue: deque[RunningRequest] = deque()
        self._running: list[RunningRequest] = []
        self._free_slots = list(range(decoder.cache.num_slots))
        self._ended: list[Event] = []
        self._plans: dict[tuple, tuple[int, ...]] = {}
        self._planned_for = 0

    # Requests come and go.

    def add(self, prompt_ids: Sequence[int], params: GenerationParams, *, seed_offset: int = 0) -> int:
        """Queue a request; returns its id. `n` is the caller's business: each call is one answer.

        Raises ValueError if the model cannot do what is asked, QueueFull if too many requests wait."""
        prompt_ids = list(prompt_ids)
        check_prompt(prompt_ids, self.decoder.num_positions, self.decoder.vocab_size)
        outside = [token for token in params.stop_tokens if not 0 <= token < self.decoder.vocab_size]
        if outside:
            raise ValueError(f"stop_tokens {outside[:5]} are outside of the vocabulary of {self.decoder.vocab_size}")
        policy, draft_layer = params.exit_policy(self.exits), params.drafting_exit(self.exits)
        num_waiting = len(self._queue) - len(self._free_slots)  # the others get a slot with the next step
        if self.max_waiting is not None and num_waiting >= self.max_waiting:
            raise QueueFull(
                f"all {self.decoder.cache.num_slots} slots are taken and {num_waiting} requests wait; try again "
                "later, or start the engine with more slots"
            )
        num_requests = min(len(self._running) + len(self._queue) + 1, self.decoder.cache.num_slots)
        asked = () if policy is None else self._exits_to_ask(policy, params, num_requests)
        draft_exit = None if draft_layer is None else self.exits.index_of(draft_layer)
        sampling = params.sampling
        # The last generated token is not fed back: it takes no position.
        room = self.decoder.num_positions - len(prompt_ids) + 1
        request = RunningRequest(
            request_id=next(self._ids),
            params=params,
            num_prompt_tokens=len(prompt_ids),
            tokens=prompt_ids,
            policy=policy,
            asked=asked if draft_exit is None else (draft_exit,),
            sampler=Sampler(replace(sampling, seed=(sampling.seed + seed_offset) % 2**63)),
            stop_tokens=frozenset(params.stop_tokens),
            max_tokens=min(params.max_tokens, room),
            draft_exit=draft_exit,
        )
        if draft_exit is not None:
            request.draft_length = DraftLength(
                params.draft_length,
                params.max_draft_length,
                self.decoder.exits[draft_exit].depth,
                self.decoder.num_layers,
                None if params.draft_length else self._get_costs(),
            )
        self._queue.append(request)
        return request.request_id

    def cancel(self, request_id: int) -> bool:
        """End a request with what it has so far; the next step reports it. False if it has ended already."""
        for request in [*self._queue, *self._running]:
            if request.request_id == request_id:
                self._end(request, "cancelled")
                return True
        return False

    def stop(self, request_id: int, num_tokens: int) -> bool:
        """As `cancel`, with finish reason 'stop': the caller found a stop string in the first `num_tokens` tokens."""
        for request in self._running:
            if request.request_id == request_id:
                del request.generated[num_tokens:]
                self._end(request, "stop")
                return True
        return False

    def fail_all(self, error: str) -> list[Event]:
        """End every request with an error; returns all that was to be reported."""
        for request in [*self._queue, *self._running]:
            self._end(request, "error", error)
        return self._take_ended()

    def _exits_to_ask(self, policy: ExitPolicy, params: GenerationParams, num_requests: int) -> tuple[int, ...]:
        """Indices of the policy's exits, or with `plan_exits` of those of them that pay for so many requests."""
        indices = tuple(self.exits.index_of(layer) for layer in policy.exit_layers)
        if not params.plan_exits:
            return indices
        if self._calibration is None:
            raise ValueError("plan_exits needs a calibration of the exits; tools/calibrate_exits.py makes it")
        costs = self._get_costs()
        key = (indices, policy.thresholds, num_requests, costs)
        if key not in self._plans:
            self._plans[key] = select_exits(
                self._calibration.confidences[:, list(indices)],
                policy.thresholds,
                [self.decoder.exits[index].depth for index in indices],
                self.decoder.num_layers,
                costs,
                num_requests,
            )
        return tuple(indices[i] for i in self._plans[key])

    def _plan_again(self) -> None:
        """What pays for one request may not pay for many."""
        if self._planned_for == len(self._running):
            return
        self._planned_for = len(self._running)
        for request in self._running:
            # The block of an exit must have seen all rows, so what was not asked at first cannot be asked later.
            has_block = any(exit_.block is not None for exit_ in self.decoder.exits)
            if request.params.plan_exits and request.policy is not None and not has_block:
                request.asked = self._exits_to_ask(request.policy, request.params, len(self._running))

    @property
    def has_work(self) -> bool:
        return bool(self._queue or self._running or self._ended)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that queue for a slot."""
        return len(self._queue)

    def _get_costs(self) -> StepCosts:
        if self._costs is None:
            # Timing writes to a slot. Until one is free a guess does: rows are free, a head costs what it reads.
            if not self._free_slots:
                return _guessed_costs(self.decoder)
            self._costs = measure_costs(self.decoder, self._free_slots[0])
        return self._costs

    def _end(self, request: RunningRequest, reason: FinishReason, error: str | None = None) -> None:
        if request.slot is None:
            self._queue.remove(request)
        else:
            self._running.remove(request)
            self._free_slots.append(request.slot)
            self._free_slots.sort()
        exit_layers = {self.decoder.exits[index].layer_number for index in request.asked}
        exit_layers |= {token.exit_layer for token in request.generated if not token.is_final}
        result = request.result(reason, tuple(sorted(exit_layers)), self.decoder.num_layers, error)
        self._ended.append(Event(request.request_id, [], result))

    def _take_ended(self) -> list[Event]:
        ended, self._ended = self._ended, []
        return ended

    def _admit(self) -> None:
        for request in list(self._queue):
            if not self._free_slots:
                return
            donor, num_shared = self._longest_shared_prefix(request)
            if donor is not None and donor.is_prefilling:
                continue  # it will have computed what this one needs
            self._queue.remove(request)
            request.slot = self._free_slots.pop(0)
            request.admitted = time.perf_counter()
            self._running.append(request)
            if donor is not None:
                self.decoder.cache.copy_slot(donor.slot, request.slot, num_shared)
                request.num_rows = num_shared

    def _longest_shared_prefix(self, request: RunningRequest) -> tuple[RunningRequest | None, int]:
        """A running request whose prompt begins like this one's, and how many rows of it can be copied."""
        best, best_length = None, _MIN_SHARED_PREFIX - 1
        if request.params.echo:
            return None, 0  # it needs the logits of all rows
        for other in self._running:
            if not set(self._walk.blocks_of(request)) <= set(self._walk.blocks_of(other)):
                continue
            limit = min(request.prefill_stop, other.prefill_stop, request.num_prompt_tokens - 1)
            pairs = zip(request.tokens[:limit], other.tokens[:limit], strict=True)
            length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if length > best_length:
                best, best_length = other, length
        return best, best_length if best is not None else 0

    # One step.

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Feed every running request its next rows. Returns what is new for each, and the results of those that ended.

        After an exception (no memory, a lost rank) the state of the running requests is unknown: call `fail_all`."""
        self._admit()
        self._plan_again()
        for request in list(self._running):
            if request.max_tokens == 0 and not request.is_prefilling:
                self._end(request, "max_tokens")
        feeds = self._make_feeds()
        events = [Event(feed.request.request_id, []) for feed in feeds]
        if feeds:
            self._walk.run(feeds)
            for feed, event in zip(feeds, events, strict=True):
                self._consume_or_end(feed, event)
        results = {event.request_id: event.result for event in self._take_ended()}
        for event in events:
            event.result = results.pop(event.request_id, None)
        events += [Event(request_id, [], result) for request_id, result in results.items()]
        return [event for event in events if event.tokens or event.result is not None]

    def _make_feeds(self) -> list[Feed]:
        budget = self.prefill_chunk
        feeds = []
        for request in sorted(self._running, key=lambda r: r.slot):
            if request.is_prefilling:
                count = min(request.prefill_stop - request.num_rows, budget)
                if count == 0:
                    continue
                budget -= count
                feed = self._prefill_feed(request, count)
            elif request.draft_exit is not None:
                feed = self._speculation_feed(request)
            else:
                is_forced = request.policy is not None and request.num_waiting >= request.params.max_deferred
                asks = () if is_forced else request.asked
                feed = Feed(request, request.tokens[-1:], asks, is_forced=is_forced, wanted_from=request.num_rows)
            feed.first = request.num_rows
            request.num_rows += len(feed.tokens)
            feeds.append(feed)
        return feeds

    @staticmethod
    def _prefill_feed(request: RunningRequest, count: int) -> Feed:
        first, stop = request.num_rows, request.num_rows + count
        feed = Feed(request, request.tokens[first:stop], is_prefill=True)
        if request.params.echo:
            feed.wanted_from = first
        elif stop == request.num_prompt_tokens:
            feed.wanted_from = stop - 1
        return feed

    def _speculation_feed(self, request: RunningRequest) -> Feed:
        if request.num_to_draft is None:
            # Verification yields one token more than it accepts; the rows of all drafts need positions.
            room = min(
                request.max_tokens - len(request.generated) - 1, self.decoder.num_positions - len(request.tokens)
            )
            request.num_to_draft = max(min(request.draft_length.next(len(self._running)), room), 0)
        token = request.drafts[-1].token if request.drafts else request.tokens[-1]
        if len(request.drafts) < request.num_to_draft:
            return Feed(request, [token], (request.draft_exit,), is_draft=True)
        return Feed(request, [token], wanted_from=len(request.tokens) - 1)

    # What the heads said becomes tokens.

    def _consume_or_end(self, feed: Feed, event: Event) -> None:
        """What goes wrong while one request's tokens are chosen ends that request, and no other."""
        try:
            self._consume(feed, event)
        except Exception as error:
            log.info("request %d failed", feed.request.request_id, exc_info=True)
            if feed.request in self._running:
                message = f"its tokens could not be chosen ({type(error).__name__}: {error})"
                self._end(feed.request, "error", message)

    def _consume(self, feed: Feed, event: Event) -> None:
        request = feed.request
        if not feed.is_finite:
            # What a later request does not see of its slot is masked, but a masked NaN still spoils a sum.
            self.decoder.cache.clear_slot(request.slot)
            self._end(request, "error", _NOT_FINITE)
            return
        if request.params.echo and feed.is_prefill:
            self._read_prompt(feed)
        if feed.is_draft:
            self._draft(feed)
        elif feed.taken is not None:
            index, output, row = feed.taken
            self._emit(feed, event, *self._choose(request, output, row), output, row, index)
        elif feed.final is not None and request.num_rows >= request.num_prompt_tokens:
            if request.draft_exit is not None:
                self._verify(feed, event)
            else:
                output, row = feed.final
                row += feed.stop - 1 - feed.wanted_from
                feed.predictions.append(HeadPrediction(None, output.token(row), output.confidence(row)))
                self._emit(feed, event, *self._choose(request, output, row), output, row)

    @staticmethod
    def _choose(request: RunningRequest, output: HeadOutput, row: int) -> tuple[int, float]:
        """(token, its log-probability). Only sampling needs the whole vocabulary's logits on every rank."""
        sampler = request.sampler
        if sampler.settings.is_plain_argmax:
            return output.token(row), output.max_log_prob(row)
        token = sampler.sample(output.logits(row), request.tokens, len(request.generated))
        return token, output.log_probs(row)[token].item()

    def _emit(
        self,
        feed: Feed,
        event: Event,
        token: int,
        log_prob: float,
        output: HeadOutput,
        row: int,
        exit_index: int | None = None,
        is_draft: bool = False,
    ) -> bool:
        """Add the token to the answer. Returns whether the request has ended with it."""
        request = feed.request
        layer = self.decoder.num_layers if exit_index is None else self.decoder.exits[exit_index].layer_number
        generated = GeneratedToken(
            token=token,
            exit_layer=layer,
            is_final=exit_index is None,
            confidence=output.confidence(row),
            log_prob=log_prob,
            predictions=tuple(feed.predictions),
            is_forced=feed.is_forced,
            is_draft=is_draft,
            top_log_probs=_top_log_probs(output, row, request.params.top_log_probs),
        )
        event.tokens.append(generated)
        request.tokens_of_prefill += feed.is_prefill
        reason = request.emit(generated, self.ends)
        if reason is not None:
            self._end(request, reason)
        return reason is not None

    def _read_prompt(self, feed: Feed) -> None:
        request = feed.request
        output, row = feed.final
        if not request.prompt:
            request.prompt.append(PromptToken(request.tokens[0], None))
        for position in range(feed.wanted_from, min(feed.stop, request.num_prompt_tokens - 1)):
            token = request.tokens[position + 1]
            log_prob = output.log_probs(row)[token].item()
            top = _top_log_probs(output, row, request.params.top_log_probs)
            request.prompt.append(PromptToken(token, log_prob, top))
            row += 1

    def _draft(self, feed: Feed) -> None:
        request, (_, output, row) = feed.request, feed.taken
        if request.sampler.settings.is_plain_argmax:
            request.drafts.append(Draft(output.token(row), None))
            return
        history = request.tokens + [draft.token for draft in request.drafts]
        index = len(request.generated) + len(request.drafts)
        probabilities = request.sampler.probabilities(output.logits(row), history, index)
        token = request.sampler.draw(probabilities)
        request.drafts.append(Draft(token, None if request.sampler.settings.is_greedy else probabilities))

    def _verify(self, feed: Feed, event: Event) -> None:
        """Accept drafts as far as the full model's distributions allow, and add one token of its own."""
        request, (output, first_row) = feed.request, feed.final
        drafts, num_accepted = request.drafts, 0
        request.drafts, request.num_to_draft = [], None
        request.drafted += len(drafts)
        for row, draft in enumerate([*drafts, None], start=first_row):
            is_accepted = False
            if request.sampler.settings.is_plain_argmax:
                token, log_prob = output.token(row), output.max_log_prob(row)
                is_accepted = draft is not None and token == draft.token
            else:
                probabilities = request.sampler.probabilities(
                    output.logits(row), request.tokens, len(request.generated)
                )
                if draft is None:
                    token = request.sampler.draw(probabilities)
                else:
                    is_accepted, token = verify(draft, probabilities, request.sampler)
                log_prob = output.log_probs(row)[token].item()
            num_accepted += is_accepted
            request.accepted += is_accepted
            feed.predictions = [HeadPrediction(None, output.token(row), output.confidence(row))]
            ended = self._emit(feed, event, token, log_prob, output, row, is_draft=is_accepted)
            if ended or not is_accepted:
                break
        request.draft_length.observe(len(drafts), num_accepted)
        # Rows of rejected drafts are as if never fed: the next ones overwrite their keys and values.
        request.num_rows = len(request.tokens) - 1


def _top_log_probs(output: HeadOutput, row: int, count: int) -> tuple[tuple[int, float], ...]:
    if count == 0:
        return ()
    log_probs = output.log_probs(row)
    values, ids = log_probs.topk(min(count, log_probs.numel()))
    return tuple(
        (token, value) for token, value in zip(ids.tolist(), values.tolist(), strict=True) if value > -torch.inf
    )


def _guessed_costs(decoder: Decoder) -> StepCosts:
    layer, head = 12.0 * decoder.weights.embedding.size(1), float(decoder.weights.embedding.size(0))
    same = lambda cost: (cost,) * len(ROW_COUNTS)
    return StepCosts(same(layer), same(head), same(head), same(head))
