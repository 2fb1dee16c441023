"""What can be refused before a request is queued. It knows the model and no workers, so that the process that takes
requests can ask as well as the engine's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.inference.certificates import NO_CERTIFICATES, Certificate, Certificates
from megatron.early_exit.inference.engine.exit_policy import ExitPolicy
from megatron.early_exit.inference.params import (
    ExitScore,
    GenerationParams,
    PromptTooLong,
    ScoreParams,
    check_ids,
    check_prompt,
)
from megatron.early_exit.inference.protocol import NEVER_TAKEN, ExitThreshold, WorkerDescription

ExitPlanning = Literal["off", "subsets", "all or none"]
"""Which of the exits that a request names are evaluated. off: all. subsets: those that pay. all or none: all, or none
if all of them do not pay: what was certified for all of them together holds for no other choice."""


@dataclass(frozen=True)
class RequestChecks:
    """Checks of requests against a model and its layout. All raise ValueError."""

    model: WorkerDescription
    exits: ExitConfig
    ends: Collection[int]
    """Ids that end an answer."""
    calibrated: Collection[ExitScore] = ()
    """Scores with which exits can be planned."""
    certificates: Certificates = NO_CERTIFICATES
    no_probes: str = "the checkpoint has none"
    """Why the model has no probes, if it has none."""

    def check(self, params: GenerationParams) -> None:
        """Refuse settings that the model or its layout cannot do."""
        self.thresholds(params)
        self.speculates_across_stages(params, self.draft_exits(params))

    def check_generation(self, prompt_ids: Sequence[int], params: GenerationParams) -> None:
        """Refuse a request for an answer."""
        check_prompt(prompt_ids, self.model.num_positions, self.model.vocab_size)
        self._check_ids(params)
        self.check(params)
        if params.plan_exits and self.exit_score(params) not in self.calibrated:
            raise ValueError(
                f"plan_exits needs a calibration of the exits with exit_score {self.exit_score(params)!r}; "
                "tools/evaluate.py calibrate makes it"
            )

    def _check_ids(self, params: GenerationParams) -> None:
        vocab_size = self.model.vocab_size
        check_ids("stop_tokens", params.stop_tokens, vocab_size)
        check_ids("logit_bias", [token for token, _ in params.sampling.logit_bias], vocab_size)
        if params.min_tokens and params.all_ends(self.ends).issuperset(range(vocab_size)):
            raise ValueError(f"min_tokens is {params.min_tokens}, but each of the {vocab_size} ids ends the answer")

    def check_room(self, prompt_ids: Sequence[int], params: GenerationParams) -> None:
        """Refuse an answer that would end before it has `max_tokens`, as the model takes no longer sequence."""
        num_tokens, num_positions = len(prompt_ids), self.model.num_positions
        most = num_positions - num_tokens + 1  # the last token is not fed back
        if params.max_tokens > most:
            raise PromptTooLong(
                f"the prompt has {num_tokens} tokens and the answer may have {params.max_tokens} (max_tokens); the "
                f"model takes {num_positions} positions, so that at most {most} tokens fit behind this prompt"
            )

    def check_scoring(self, ids: Sequence[int], params: ScoreParams) -> None:
        """Refuse a request for scores."""
        params.check_tokens(ids, self.model.num_positions, self.model.vocab_size)
        params.heads(self.exits)

    def thresholds(self, params: GenerationParams) -> tuple[ExitThreshold, ...]:
        """Exits that these settings evaluate, in the order of layers."""
        score = self.exit_score(params)
        if score == "probe" and not self.model.has_probes:
            raise ValueError(
                f"exit_score 'probe' needs probes of this model's exits ({self.no_probes}); tools/evaluate.py probes "
                "trains them"
            )
        if params.observe_exits:
            leaving = (index for index, one in enumerate(self.model.exits) if one.may_leave)
            return tuple(ExitThreshold(index, NEVER_TAKEN, score) for index in leaving)
        if params.certified_level is None:
            policy = params.exit_policy(self.exits)
            thresholds = {} if policy is None else dict(zip(policy.exit_layers, policy.thresholds, strict=True))
        else:
            ExitPolicy.for_model(self.exits, (1.0,), params.exit_layers)  # refuses exits that no token may leave at
            thresholds = self.certificates.thresholds(params.certified_level, params)
        return tuple(ExitThreshold(self.model.index_of(layer), value, score) for layer, value in thresholds.items())

    def exit_score(self, params: GenerationParams) -> ExitScore:
        """What thresholds are compared with. Raises ValueError if a promise is asked for that the model does not
        have."""
        if params.mode != "early_exit" and not params.observe_exits:
            return "head"
        certificate = self.certificate(params)
        return params.exit_score or "head" if certificate is None else certificate.score

    def planning(self, params: GenerationParams) -> ExitPlanning:
        """How the exits of a request are planned that has been checked."""
        certificate = self.certificate(params)
        if params.plan_exits is not None or certificate is None:
            return "subsets" if params.plan_exits else "off"
        if certificate.score not in self.calibrated:
            return "off"
        return "subsets" if certificate.covers_subsets else "all or none"

    def certificate(self, params: GenerationParams) -> Certificate | None:
        """The one whose promise is asked for."""
        if params.certified_level is None:
            return None
        return self.certificates.find(params.certified_level, params.exit_score)

    def as_certified(self, params: GenerationParams) -> GenerationParams:
        """`params`, and where they ask for a promise the length and the end of the answers that it is about. Raises
        ValueError if there is no such promise."""
        certificate = self.certificate(params)
        if certificate is None:
            return params
        return replace(params, max_tokens=certificate.answers.max_tokens, ignore_eod=certificate.answers.ignore_eod)

    def draft_exits(self, params: GenerationParams) -> tuple[int, ...]:
        """Indices of the exits that may draft, in the order of layers; none: no exit does."""
        return tuple(self.model.index_of(layer) for layer in params.drafting_exits(self.exits))

    def speculates_across_stages(self, params: GenerationParams, draft_exits: Sequence[int]) -> bool:
        """Refuse that if it is asked for and no stage lies behind what drafts."""
        if params.mode != "self_speculative":
            return False
        stage = self.model.stage_of(draft_exits[0]) if draft_exits else 0
        is_possible = stage < self.model.num_stages - 1
        if params.speculation == "across_stages" and not is_possible:
            what = f"that of the draft exit {self.model.exits[draft_exits[0]].layer_number}" if draft_exits else "it"
            raise ValueError(
                f"speculation 'across_stages' needs a pipeline stage behind {what}, and the "
                f"model has {self.model.num_stages} in all; choose an earlier exit, more stages or 'auto'"
            )
        return is_possible and params.speculation != "draft_then_verify"
