"""What the engine and its workers tell each other: plain data, without tensors.

A step goes from the engine to the workers: operations on slots first, then rows. A row is one token of one slot at one
position. What the heads made of the rows comes back. The engine owns tokens, slots, draft lengths and finish reasons;
a worker owns weights, keys and values, deferred rows and sampling. Settings of a request travel once, at admission.

Rows carry the generation of their slot, which counts the requests that had it, and the epoch of their request, which
counts rejected drafts: outputs of older ones are stale.

Where a model is spread over pipeline stages, the first stage gets the steps, each stage hands its rows on to the next
(`StageInput`), and every stage answers the engine itself.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from typing import Literal

import msgspec

from megatron.early_exit.config.exits import ExitUse
from megatron.early_exit.inference.params import ExitScore, SamplingSettings

FINAL_HEAD = -1
"""In place of an exit index."""

Phase = Literal["prefill", "decode", "draft", "verify", "speculate", "score"]
"""prefill: rows of a prompt, through all layers. decode: the row of a request's last token; the first exit that is
confident gives the next one, else the final head. draft: the same, but its only exit gives the token, however confident
it is. verify: the row of the last draft, through all layers, with the rows of the drafts before it. speculate: the row
of a token that may be a draft, through all layers; on the way its only exit gives the next draft, at the end the final
head draws what the token is compared with. score: rows of given tokens, through as many layers as the heads in
`score_heads` need."""


class ExitDescription(msgspec.Struct, frozen=True):
    """One exit of the model."""

    layer_number: int
    """The layer, counted from 1, that names it."""
    depth: int
    """Layers that a row has run when the exit reads it."""
    has_block: bool
    """Whether it has attention, and so keys and values, of its own."""
    use: ExitUse = "both"
    """Whether tokens leave there, drafts are made there, or both."""

    @property
    def may_leave(self) -> bool:
        return self.use != "draft"

    @property
    def may_draft(self) -> bool:
        return self.use != "leave"


class WorkerDescription(msgspec.Struct, frozen=True):
    """What the engine needs to know of the model and of the memory that its workers have for it."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    """Ids that may be given and drawn."""
    exits: tuple[ExitDescription, ...]
    num_slots: int
    """Requests that run at once."""
    num_positions: int
    """Of the longest sequence: a prompt and its answer but for the answer's last token, which is never fed back."""
    bytes_per_token: int = 0
    """Memory for the keys and values of one position, on each rank; `num_slots` times `num_positions` of them are
    taken."""
    has_approximate_heads: bool = False
    """Whether exits are evaluated first by something cheaper than their own heads."""
    has_probes: bool = False
    """Whether exits have probes."""
    layers_per_stage: tuple[int, ...] = ()
    """Of each pipeline stage; empty: one stage has all."""

    @property
    def num_stages(self) -> int:
        return len(self.layers_per_stage) or 1

    def stage_of(self, exit_index: int) -> int:
        """The stage that has an exit: the one that has the layer that names it."""
        stops = list(itertools.accumulate(self.layers_per_stage or (self.num_layers,)))
        return bisect_left(stops, self.exits[exit_index].layer_number)

    def index_of(self, exit_layer: int) -> int:
        """Index of the exit that `exit_layer` names."""
        return next(index for index, one in enumerate(self.exits) if one.layer_number == exit_layer)


# Operations on slots.


class Admit(msgspec.Struct, frozen=True, tag=True):
    """Give a slot to a request. The keys and values of its first `num_rows` positions are there already."""

    request_id: int
    slot: int
    generation: int
    num_prompt_tokens: int
    prefix: tuple[int, ...]
    """Tokens of the rows that are there already."""
    sampling: SamplingSettings
    exits: tuple[int, ...] = ()
    """Indices of exits that may be evaluated: their blocks must see all rows."""
    max_deferred: int = 0
    """Rows that may be deferred; one more, and they run the remaining layers."""
    top_log_probs: int = 0
    """Report this many of the most probable tokens with each token."""
    log_probs: bool = True
    """Whether log-probabilities and confidences of tokens are wanted, of drafts never; if not, a head that gives tokens
    alone may be asked."""
    min_tokens: int = 0
    """Tokens of the answer before one of `ends` may be drawn."""
    ends: tuple[int, ...] = ()
    """Ids that end the answer; they are needed with `min_tokens` alone."""


class CopyPrefix(msgspec.Struct, frozen=True, tag=True):
    """Give slot `target` the keys and values of the first `count` positions of slot `source`."""

    source: int
    target: int
    count: int


class Free(msgspec.Struct, frozen=True, tag=True):
    """The request of a slot has ended: its rows that have not run are dropped."""

    slot: int
    complete_to: int
    """Keys and values of the positions before it stay, for others to copy. Those behind it are overwritten: nobody has
    seen whether they are finite, and a masked NaN still spoils a sum."""


class Gather(msgspec.Struct, frozen=True, tag=True):
    """Slots 0, 1, ... get the first `count` positions of the slots `sources`, all at once (beam search)."""

    sources: tuple[int, ...]
    count: int


SlotOperation = Admit | CopyPrefix | Free | Gather


# Rows.


NEVER_TAKEN = math.inf
"""A threshold of exits that are only observed."""


class ExitThreshold(msgspec.Struct, frozen=True, array_like=True):
    """An exit to evaluate, and the score from which on it gives the token."""

    exit: int
    threshold: float
    score: ExitScore = "head"

    @property
    def is_observed(self) -> bool:
        """Whether the exit is evaluated to know what it would say, and never taken."""
        return self.threshold == NEVER_TAKEN

    def is_reached(self, score: float) -> bool:
        return score >= self.threshold


class Rows(msgspec.Struct, frozen=True):
    """Consecutive positions of one slot, to be run in one step. A slot has at most one of them in a step."""

    request_id: int
    slot: int
    generation: int
    epoch: int
    phase: Phase
    first: int
    """Position of the first token."""
    tokens: tuple[int, ...]
    exits: tuple[ExitThreshold, ...] = ()
    """Exits to evaluate on the last row, in the order of layers."""
    sample_from: int | None = None
    """The final head draws a token for each position from this one on; None: for none. It may lie before `first`: the
    drafts that are verified with this row were deferred."""
    score_heads: tuple[int, ...] = ()
    """Heads whose predictions for the positions from `score_from` on are wanted: exit indices in the order of layers,
    `FINAL_HEAD` last."""
    score_from: int = 0
    targets: tuple[int, ...] = ()
    """Tokens whose log-probabilities are wanted, of the scored positions in order; it may be shorter than they are."""
    score_top: int = 0
    """Report this many of the most probable tokens of each scored position."""
    score_logits: bool = False
    """Report all logits of scored positions."""
    score_states: bool = False
    """Report the hidden states of scored positions that exits read."""

    @property
    def stop(self) -> int:
        """Position behind the last token."""
        return self.first + len(self.tokens)

    def target_of(self, position: int) -> int | None:
        """The token whose log-probability is wanted at a scored position, if there is one."""
        index = position - max(self.score_from, self.first)
        return self.targets[index] if index < len(self.targets) else None


class Step(msgspec.Struct, frozen=True):
    """What the workers do next: all operations in order, then all rows."""

    number: int
    operations: tuple[SlotOperation, ...] = ()
    rows: tuple[Rows, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(len(rows.tokens) for rows in self.rows)


# What comes back.

TokenLogProb = tuple[int, float]


class Prediction(msgspec.Struct, frozen=True, array_like=True):
    """What one head predicts for the next token."""

    exit: int
    """Index, or `FINAL_HEAD`."""
    token: int
    """Its most probable token."""
    confidence: float | None
    """What the exit's threshold was compared with: that token's probability, or the output of the exit's probe. None if
    it was not computed (`Admit.log_probs`)."""
    is_approximate: bool = False
    """Whether an approximate head predicted it and the exit's own head was not evaluated."""


class DrawnToken(msgspec.Struct, frozen=True):
    """A token that a head gave."""

    token: int
    log_prob: float | None
    """Log-probability (nats) in the head's distribution, before penalty, temperature, top-k and top-p; None if it was
    not computed (`Admit.log_probs`)."""
    confidence: float | None
    """The head's largest probability; None as well."""
    exit: int
    """Index of the exit, or `FINAL_HEAD`."""
    predictions: tuple[Prediction, ...] = ()
    """Of all evaluated heads in order; the last one gave the token."""
    top_log_probs: tuple[TokenLogProb, ...] = ()
    caught_up: bool = False
    """Whether the row went on through the remaining layers, with those that were deferred before it, because no more
    rows may be deferred."""


class HeadScores(msgspec.Struct, frozen=True):
    """What one head says about some positions, each list with one value a position."""

    exit: int
    """Index, or `FINAL_HEAD`."""
    tokens: list[int]
    """Most probable token."""
    confidences: list[float]
    """Its probability."""
    log_probs: list[float]
    """Of the targets (nats); empty if there are none."""
    top_log_probs: list[list[TokenLogProb]]
    """Empty if none were asked for."""
    logits: bytes | None = None
    """[positions, vocabulary] fp32 in the machine's byte order."""
    states: bytes | None = None
    """[positions, h] fp32 in the machine's byte order: what an exit's head reads."""


class RowsOutput(msgspec.Struct, frozen=True):
    """What became of some rows. The one that `answers` a `Rows` may be preceded by others about it, and followed by one
    that tells that they have run all layers."""

    request_id: int
    slot: int
    generation: int
    epoch: int
    stop: int
    """Position behind the last of its rows."""
    tokens: tuple[DrawnToken, ...] = ()
    scores: tuple[HeadScores, ...] = ()
    layer_passes: int = 0
    """(row, layer) pairs that were computed; rows that were deferred before count where they ran."""
    layer_runs: int = 0
    """Times that a layer or an exit block ran rows of this slot."""
    complete_to: int = 0
    """Positions before this one have keys and values in all layers; 0 from a stage that does not know."""
    answers: int = 1
    """How many `Rows` have now got all that was wanted of them. 0: it tells of drafts, of scores by some of the heads,
    or of rows that were answered before and have now run all layers."""
    error: str | None = None
    """Why there are no tokens; the request ends with it."""


# Between pipeline stages.


class StageRows(msgspec.Struct, frozen=True, tag=True):
    """Rows of one slot that come to a stage: those of a `Rows`, and earlier ones that they take along."""

    rows: Rows
    """Its first position is that of the newest ones; `exits` are those that are still to be evaluated."""
    first: int
    """Position of the first row that comes."""
    tokens: tuple[int, ...]
    """Of all rows that come."""
    answers: int = 1
    """`Rows` that are still to be answered; 0: they fill the caches of the layers to come, and evaluate no head."""
    predictions: tuple[Prediction, ...] = ()
    """Of the heads before, for the newest row."""
    layer_passes: int = 0
    layer_runs: int = 0

    @classmethod
    def of(cls, rows: Rows) -> StageRows:
        """Rows as they come from the engine."""
        return cls(rows, rows.first, rows.tokens)

    @property
    def stop(self) -> int:
        return self.rows.stop

    @property
    def num_rows(self) -> int:
        return self.stop - self.first

    @property
    def is_fill(self) -> bool:
        return self.answers == 0

    @property
    def num_fill_rows(self) -> int:
        """Rows of it that are owed no token, of those that come by themselves."""
        return self.num_rows if self.is_fill else 0


class StageInput(msgspec.Struct, frozen=True):
    """What a stage hands on to the next, with the hidden states of the rows, [rows, h], one after the other. It arrives
    in the order in which it was sent."""

    operations: tuple[SlotOperation, ...] = ()
    """To be done when they arrive, before these rows and before others that wait."""
    rows: tuple[StageRows, ...] = ()


class StageLoad(msgspec.Struct, frozen=True):
    """What one pipeline stage has done since it was loaded; a model on one stage has one of these."""

    busy_seconds: float = 0.0
    """That it has run rows."""
    passes: int = 0
    """Batches that it has run."""
    rows: int = 0
    """In all of them."""
    backlog: int = 0
    """Rows that have come to it and have not run."""


class Pass(msgspec.Struct, frozen=True):
    """Which of the rows that have come a stage runs next. The first tensor-parallel rank of the stage chooses; the
    others, to which the same comes, do the same."""

    num_inputs: int
    """Inputs that had come before it, in all."""
    rows: tuple[int, ...]
    """Which `StageRows` to run, by their number in the order in which they came, in the order of slots; those of one
    slot run together."""
    fill_budget: int
    """Rows that may go on to the next stage though they are owed no token; more of them are deferred."""
