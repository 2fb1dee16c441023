"""What a new request evaluates and drafts: which exits, by what earlier requests have seen and by what layers and heads
cost on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np

from megatron.early_exit.inference.costs import StepCosts, guessed_costs
from megatron.early_exit.inference.engine.draft_acceptance import Experience, Source
from megatron.early_exit.inference.engine.draft_length import DraftRates, DraftWindow, StepLoad
from megatron.early_exit.inference.engine.drafter import Drafter, DraftSettings
from megatron.early_exit.inference.engine.exit_selection import ExitSelector
from megatron.early_exit.inference.engine.generation import GenerationRequest
from megatron.early_exit.inference.engine.request_checks import RequestChecks
from megatron.early_exit.inference.engine.slots import PromptBlocks
from megatron.early_exit.inference.engine.speculation import SpeculativeRequest, SpeculativeRequestAcrossStages
from megatron.early_exit.inference.params import ExitScore, GenerationParams
from megatron.early_exit.inference.protocol import ExitThreshold, WorkerDescription

_USUAL_DRAFT = 4
"""Tokens, of the draft by which exits are compared before a request begins."""


class RequestPlanner:
    """Makes requests of settings that have been checked. What drafts were worth is remembered for later ones."""

    def __init__(
        self,
        model: WorkerDescription,
        checks: RequestChecks,
        exit_scores: Mapping[ExitScore, np.ndarray],
        costs: StepCosts | None,
    ) -> None:
        """exit_scores: as of `ExitSelector`. costs: of layers and heads; None: a guess until they are measured."""
        self._model, self._checks = model, checks
        self._selector = ExitSelector(model, exit_scores)
        self.measured_costs = costs
        self._experience = Experience()
        """Of drafts."""
        self._rates: dict[StepCosts, DraftRates] = {}

    @property
    def costs(self) -> StepCosts:
        return self.measured_costs or guessed_costs(self._model)

    def needs_costs(self, params: GenerationParams) -> bool:
        """Whether these settings depend on what layers and heads cost."""
        if params.plan_exits or (params.plan_exits is None and params.certified_level is not None):
            return True
        if params.mode != "self_speculative":
            return False
        adapts = params.draft_length is None or params.draft_source == "both"
        return adapts or len(self._checks.draft_exits(params)) > 1

    def request(
        self,
        request_id: int,
        prompt: PromptBlocks,
        params: GenerationParams,
        *,
        seed_offset: int,
        num_requests: int,
        is_audited: bool,
    ) -> GenerationRequest:
        """num_requests: that will run together with this one, as far as one can tell."""
        request = GenerationRequest(
            request_id=request_id,
            prompt=prompt,
            params=params,
            sampling=params.sampling.of_sample(seed_offset),
            model=self._model,
            ends=self._checks.ends,
            thresholds=self.thresholds(params, num_requests),
            certificate=self._checks.certificate(params),
            is_audited=is_audited,
        )
        return request if params.mode != "self_speculative" else self._speculative(request)

    # Exits that tokens leave at.

    def thresholds(self, params: GenerationParams, num_requests: int) -> tuple[ExitThreshold, ...]:
        """Exits that may give tokens, in the order of layers: all that are named, or those that pay."""
        candidates, planning = self._checks.thresholds(params), self._checks.planning(params)
        if planning == "off":
            return candidates
        costs = self._costs_of(params, candidates)
        return self._selector.select(candidates, num_requests, costs, planning == "all or none")

    def may_plan_again(self, params: GenerationParams) -> bool:
        """Whether other exits may be selected in the middle of an answer."""
        if self._checks.planning(params) != "subsets":
            return False
        return not any(self._model.exits[one.exit].has_block for one in self._checks.thresholds(params))

    def _costs_of(self, params: GenerationParams, thresholds: Sequence[ExitThreshold] = ()) -> StepCosts:
        """Of a request that may leave at `thresholds`: greedy tokens alone may cost less. Of drafts nothing else is
        needed."""
        is_argmax = params.sampling.is_plain_argmax
        tokens_only = is_argmax and not params.log_probs
        return self.costs.for_tokens(
            of_drafts=is_argmax and params.mode == "self_speculative",
            of_probed=tokens_only and any(one.score == "probe" for one in thresholds),
            of_final=tokens_only,
        )

    # Drafts.

    def _speculative(self, plain: GenerationRequest) -> SpeculativeRequest:
        """The same request, with drafts."""
        params, exits = plain.params, self._checks.draft_exits(plain.params)
        across_stages = self._checks.speculates_across_stages(params, exits)
        exits = self._candidates(exits, params, across_stages)
        settings = DraftSettings(
            exits=exits,
            uses_ngrams=params.draft_source != "exit",
            is_greedy=plain.sampling.is_plain_argmax,
            fixed_length=params.draft_length,
            longest=params.max_draft_length if params.draft_length is None else params.draft_length,
            min_confidence=params.draft_min_confidence,
        )
        drafter = Drafter(settings, self._model.exits, self.draft_rates(params), self._experience)
        common = {one.name: getattr(plain, one.name) for one in fields(plain)}
        if not across_stages:
            return SpeculativeRequest(**common, draft_exits=exits, drafter=drafter)
        window = DraftWindow(params.draft_length, self._model.num_stages, self.costs)
        return SpeculativeRequestAcrossStages(**common, draft_exits=exits, drafter=drafter, window=window)

    def _candidates(self, exits: tuple[int, ...], params: GenerationParams, across_stages: bool) -> tuple[int, ...]:
        """Of the exits that may draft, those among which a request chooses. The block of an exit must have seen all of
        its rows and costs a layer in each of them: of these exits only one is a candidate, if it is the best so far.
        Across stages one exit drafts all along."""
        if len(exits) < 2:
            return exits
        if across_stages:
            return exits[:1]
        rates, load, is_greedy = self.draft_rates(params), StepLoad(), params.sampling.is_plain_argmax

        def promise(index: int) -> float:
            expected = self._experience.of(Source("exit", index), is_greedy).expected_tokens(_USUAL_DRAFT)
            return max(rates.of_exit(self._model.exits[index], expected, load))

        best = max(exits, key=promise)
        return tuple(index for index in exits if index == best or not self._model.exits[index].has_block)

    def draft_rates(self, params: GenerationParams) -> DraftRates:
        """Requests of equal costs share them."""
        costs = self._costs_of(params)
        if costs not in self._rates:
            self._rates[costs] = DraftRates(costs, self._model.num_layers)
        return self._rates[costs]
