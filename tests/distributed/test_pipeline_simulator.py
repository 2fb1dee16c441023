"""Pipeline stages in thousands of orders of events: the engine over them answers as over one process, whatever comes
first, and all layers cache what the reference computes."""

from __future__ import annotations

import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.engine.beam_search import Beam, beam_search
from megatron.early_exit.inference.engine.engine import Engine, Event
from megatron.early_exit.inference.engine.request import Result
from megatron.early_exit.inference.engine.slots import Slots
from megatron.early_exit.inference.executor.local import LocalExecutor
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings, ScoreParams
from megatron.early_exit.inference.protocol import FINAL_HEAD, Admit, ExitThreshold, Rows, StageInput, StageRows, Step
from megatron.early_exit.inference.results import GeneratedToken, RequestResult
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.inbox import Inbox
from megatron.early_exit.inference.worker.scheduled_rows import ScheduledRows
from megatron.early_exit.inference.worker.slot_state import SlotState
from megatron.early_exit.inference.worker.stage import FlowControl, Stage
from megatron.early_exit.inference.worker.weight_reading import decoder_weights
from megatron.early_exit.inference.worker.worker import Worker
from tests.configs import VOCAB_SIZE
from tests.distributed.engines import COSTS, check_against_reference, reference_over, run_all
from tests.distributed.pipeline_simulator import Part, SimulatedPipeline, SimulatedRank, StageRecord
from tests.distributed.test_scores import check_scores
from tests.reference_checkpoint import HEADS, STYLES, decoding_config, reference_description, reference_tensors

NUM_SLOTS = 3
BLOCK_SIZE = 4
"""Tokens of a prefix that others share: few, so that short prompts do."""
LAYOUTS = ((2, 2), (1, 3), (3, 1), (1, 1, 2), (2, 1, 1), (1, 1, 1, 1))
"""Layers of each stage, with exits after layers 1, 2 and 3: in the middle of stages and at their ends."""
MOST_STEPS = 3000
"""Of the engine, for a few requests."""
Settings = GenerationParams | ScoreParams


class Model:
    """One tiny model: the engine over one process answers each request once, and stages are made once."""

    def __init__(self, head: str, style: str) -> None:
        self.cfg: RunConfig = decoding_config(**HEADS[head], **STYLES[style])
        self._whole = self.decoder(range(self.cfg.model.num_layers))
        self._answers: dict[tuple, Result] = {}
        self._stages: dict[tuple[int, ...], list[list[Decoder]]] = {}
        self._references: dict[tuple[int, ...], dict] = {}
        self._engine = self.engine(LocalExecutor(Worker(self._whole)))
        self.description = self._engine.description
        self.thresholds = self._common_thresholds()

    def decoder(self, layers: range) -> Decoder:
        description = reference_description(self.cfg)
        weights = decoder_weights(reference_tensors(self.cfg), description, layers=layers)
        return Decoder(weights, num_slots=NUM_SLOTS, vocab_size=VOCAB_SIZE, use_graphs=False)

    def engine(self, executor: object, prefill_chunk: int = 3) -> Engine:
        engine = Engine(executor, self.cfg.exits, costs=COSTS, prefill_chunk=prefill_chunk, ends={5, 46})
        engine.slots = Slots(engine.description.num_slots, BLOCK_SIZE)
        return engine

    def beams(self, prompt: Sequence[int], width: int) -> list[Beam]:
        """Those of one process."""
        return search(self._engine, prompt, width)

    def keys_and_values(self, tokens: list[int]) -> dict[Part, tuple[Tensor, Tensor]]:
        """Of each layer and exit block, by the reference."""
        key = tuple(tokens)
        if key not in self._references:
            reference, _ = reference_over(self.cfg, tokens)
            names = {layer: f"decoder.layers.{layer}" for layer in range(self.cfg.model.num_layers)}
            for index, layer_number in enumerate(self.cfg.exits.exit_layer_nums):
                if self.cfg.exits.head_of(index).block:
                    names["block", index] = f"decoder.layers.{layer_number - 1}.exit_head.block"
            self._references[key] = {part: reference.keys_and_values(name) for part, name in names.items()}
        return self._references[key]

    def stages(self, layers_per_stage: tuple[int, ...], num_ranks: int = 1) -> list[list[Decoder]]:
        """Decoders of the ranks of each stage."""
        made = self._stages.setdefault(layers_per_stage, [[] for _ in layers_per_stage])
        first = 0
        for ranks, count in zip(made, layers_per_stage, strict=True):
            while len(ranks) < num_ranks:
                ranks.append(self.decoder(range(first, first + count)))
            first += count
        return [ranks[:num_ranks] for ranks in made]

    def answer(self, prompt: Sequence[int], params: Settings) -> Result:
        """That of one process, which follows from the reference."""
        key = tuple(prompt), params
        if key not in self._answers:
            add(self._engine, prompt, params)
            (result,) = run_all(self._engine).values()
            if isinstance(params, ScoreParams):
                check_scores(self.cfg, params, list(prompt), result)
            else:
                check_against_reference(self.cfg, list(prompt), params, result, VOCAB_SIZE)
            self._answers[key] = result
        return self._answers[key]

    def _common_thresholds(self) -> tuple[float, ...]:
        """For each exit one that about half of its confidences reach."""
        params = GenerationParams(max_tokens=20, mode="early_exit", exit_thresholds=(1.0,), sampling=SAMPLED)
        read = [one for token in self._answer_of(params).tokens for one in token.predictions]
        of_exits = [sorted({one.confidence for one in read if one.exit_layer == layer}) for layer in (1, 2, 3)]
        return tuple((values[len(values) // 2] + values[len(values) // 2 - 1]) / 2 for values in of_exits)

    def _answer_of(self, params: GenerationParams) -> RequestResult:
        self._engine.add(PROMPTS[0], params)
        return run_all(self._engine).popitem()[1]


SAMPLED = SamplingSettings(temperature=1.0, seed=5)
PENALISED = SamplingSettings(temperature=0.8, top_k=20, repetition_penalty=1.3, presence_penalty=0.5, seed=3)
PROMPTS = [[17], [80, 3], [5, 17, 80, 3, 41, 9, 9], [5, 17, 80, 3, 41, 9, 30, 2, 77, 6], [5, 17, 80, 3, 41]]


@functools.cache
def model(head: str, style: str = "llama") -> Model:
    return Model(head, style)


def search(engine: Engine, prompt: Sequence[int], width: int) -> list[Beam]:
    return beam_search(engine, prompt, beam_width=width, max_tokens=5, num_return=width)


def add(engine: Engine, prompt: Sequence[int], params: Settings) -> int:
    if isinstance(params, ScoreParams):
        return engine.add_scoring(prompt, params)
    return engine.add(prompt, params)


# What is asked for.


def some_params(choices: Random, of: Model) -> Settings:
    """Few enough that one process answers each once."""
    sampling = pick(choices, [SamplingSettings(), SAMPLED, PENALISED])
    common = {"max_tokens": pick(choices, [5, 2, 8]), "sampling": sampling}
    kind = choices.randrange(5)
    if kind == 0:
        return GenerationParams(**common, echo=choices.randrange(4) == 1)
    if kind in (1, 2):
        return GenerationParams(
            **common, mode="early_exit",
            exit_thresholds=pick(choices, [of.thresholds, (0.0, 0.0, 0.0), (1.0, 0.0, 1.0), (1.0, *of.thresholds[1:])]),
            max_deferred=pick(choices, [32, 0, 2]), top_log_probs=2 * (choices.randrange(4) == 1),
        )  # fmt: skip
    if kind == 3:
        source = pick(choices, ["exit", "ngram", "both"])
        return GenerationParams(
            **common, mode="self_speculative", draft_length=pick(choices, [2, 1, 4, None]), draft_source=source,
            draft_exit=None if source == "ngram" else pick(choices, [1, 2, 3, None]),
            speculation=pick(choices, ["auto", "draft_then_verify"]),
        )  # fmt: skip
    return pick(choices, [
        ScoreParams(), ScoreParams(exit_layers=(1,), final=False), ScoreParams(exit_layers=(3, 2), final=False),
        ScoreParams(exit_layers=(), top_log_probs=2), ScoreParams(exit_layers=(2,)),
    ])  # fmt: skip


def pick(choices: Random, values: Sequence) -> object:
    return values[choices.randrange(len(values))]


@dataclass
class Asked:
    prompt: list[int]
    params: Settings
    stops_after: int | None
    """Tokens after which it is stopped or cancelled."""
    has_stop_string: bool


class Client:
    """Adds requests to an engine, cancels and stops some, answers some with the next turn of a chat, and compares what
    comes with one process."""

    def __init__(self, of: Model, engine: Engine, choices: Random, num_requests: int) -> None:
        self.of, self.engine, self.choices, self.num_to_come = of, engine, choices, num_requests
        self.asked: dict[int, Asked] = {}
        self.results: dict[int, Result] = {}
        self._tokens: defaultdict[int, list[GeneratedToken]] = defaultdict(list)

    def run(self, after_step: Callable[[], None] = lambda: None) -> None:
        self.ask(pick(self.choices, PROMPTS))
        for _ in range(MOST_STEPS):
            if not self.engine.has_work and not self.num_to_come:
                return
            while self.num_to_come and (not self.engine.has_work or self.choices.randrange(3) == 0):
                self.ask(pick(self.choices, PROMPTS))
            for event in self.engine.step():
                self._take(event)
            after_step()
        raise AssertionError("the engine does not come to an end")

    def ask(self, prompt: Sequence[int]) -> None:
        self.num_to_come -= 1
        params = some_params(self.choices, self.of)
        ends_early = self.choices.randrange(4) == 1
        stops_after = self.choices.randrange(4) if ends_early else None
        request_id = add(self.engine, prompt, params)
        self.asked[request_id] = Asked(list(prompt), params, stops_after, self.choices.randrange(2) == 1)

    def _take(self, event: Event) -> None:
        request_id, result = event.request_id, event.result
        tokens, asked = self._tokens[request_id], self.asked[request_id]
        tokens += event.tokens
        if isinstance(result, RequestResult):
            assert tokens == list(result.tokens), "steps bring all tokens of the result, one after the other"
        if result is None and asked.stops_after is not None and len(tokens) >= asked.stops_after:
            if asked.has_stop_string and asked.stops_after:
                result = self.engine.stop(request_id, asked.stops_after)
            else:
                result = self.engine.cancel(request_id)
        if result is None:
            return
        self.results[request_id] = result
        self.check(asked, result)
        if self.num_to_come and self.choices.randrange(3) == 1 and isinstance(result, RequestResult):
            self.ask([*asked.prompt, *result.token_ids, 7][:20])

    def check(self, asked: Asked, result: Result) -> None:
        compare(self.of.answer(asked.prompt, asked.params), result)


def compare(expected: Result, result: Result) -> None:
    if not isinstance(result, RequestResult):
        if result.error == "cancelled":
            return
        assert result.error is None, result.error
        assert len(result.heads) == len(expected.heads)
        for mine, theirs in zip(result.heads, expected.heads, strict=True):
            assert (mine.exit_layer, mine.tokens) == (theirs.exit_layer, theirs.tokens)
            assert mine.confidences == pytest.approx(theirs.confidences, rel=1e-5)
            assert mine.log_probs == pytest.approx(theirs.log_probs, rel=1e-5, abs=1e-5)
        return
    assert result.error is None
    is_cut = result.finish_reason in ("cancelled", "stop")
    assert is_cut or result.finish_reason == expected.finish_reason
    tokens = expected.tokens[: len(result.tokens)] if is_cut else expected.tokens
    described = lambda tokens: [(one.token, one.exit_layer, one.is_final) for one in tokens]
    assert described(result.tokens) == described(tokens)
    numbers = lambda tokens: [value for one in tokens for value in (one.log_prob, one.confidence)]
    assert numbers(result.tokens) == pytest.approx(numbers(tokens), rel=1e-5, abs=1e-5)
    for mine, theirs in zip(result.tokens, tokens, strict=True):
        readings = lambda token: [(one.exit_layer, one.token, one.is_approximate) for one in token.predictions]
        assert readings(mine) == readings(theirs)
        assert [token for token, _ in mine.top_log_probs] == [token for token, _ in theirs.top_log_probs]
    if not is_cut:
        echoed = lambda result: [one.log_prob or 0.0 for one in result.prompt]
        assert echoed(result) == pytest.approx(echoed(expected), rel=1e-5, abs=1e-5)


# What is cached.


def check_kept_rows(of: Model, engine: Engine, pipeline: SimulatedPipeline) -> None:
    """All requests have ended: every layer has what the reference computes of the rows that the engine will give to
    others; behind them are rows that others had left, or zeros."""
    for slot, kept in enumerate(engine.slots._slots):
        count = kept.complete_to
        check_rows(of, pipeline, slot, kept.tokens[:count], kept.blocks, count)
        for rank in pipeline.ranks:
            rows = rank.record.decoder.cache._cache[:, slot]
            assert rows.isfinite().all()
            assert not rows[:, pipeline.kept_to[slot] :].any(), f"rows of slot {slot} are not zero"


def check_running_rows(of: Model, engine: Engine, pipeline: SimulatedPipeline) -> None:
    """The pipeline has come to rest: every layer has what the reference computes of the rows that it has run, and where
    nothing holds fill rows back, these are all but those that the last stage defers."""
    for request in engine._running.values():
        if request.num_rows == request.num_shared:
            continue  # the stages may not have heard of it
        # Rows behind a rejected draft stay where no later ones have come yet.
        num_rows = request.complete_to if request.epoch else request.num_rows
        tokens = (request.tokens + getattr(request, "drafts", []))[:num_rows]
        blocks = frozenset(request.request.enabled_exits)
        check_rows(of, pipeline, request.slot, tokens, blocks)
        params = request.request.params
        runs_all = isinstance(params, GenerationParams) and params.mode != "self_speculative"
        if runs_all and pipeline.flow == FlowControl():
            for rank, part in parts(pipeline, request.slot, blocks):
                if rank.stage.is_last:
                    continue  # which defers rows as one process does
                assert rank.record.num_rows[part][request.slot] == request.num_rows


def parts(pipeline: SimulatedPipeline, slot: int, blocks: frozenset[int]) -> Iterator[tuple[SimulatedRank, Part]]:
    """Layers, and the blocks of these exits."""
    for rank in pipeline.ranks:
        yield from ((rank, part) for part in rank.record.num_rows if isinstance(part, int) or part[1] in blocks)


def check_rows(
    of: Model,
    pipeline: SimulatedPipeline,
    slot: int,
    tokens: list[int],
    blocks: frozenset[int],
    count: int | None = None,
) -> None:
    """The layers, and these blocks of exits, have what the reference computes of the slot's first `count` rows (default
    those that each has run)."""
    expected = of.keys_and_values(tokens) if tokens else {}
    for rank, part in parts(pipeline, slot, blocks):
        num_rows = rank.record.num_rows[part][slot] if count is None else count
        num_rows = min(num_rows, len(tokens))
        if num_rows:
            ours = cached(of, rank.record, part, slot, num_rows)
            for mine, theirs in zip(ours, expected[part], strict=True):
                error = (mine - theirs[:num_rows]).abs().max().item()
                assert error < 1e-5 * max(1.0, theirs.abs().max().item()), f"{part}, slot {slot}"


def cached(of: Model, record: StageRecord, part: Part, slot: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values, each [count, kv heads, d], the channels of keys in the model's order."""
    index = list(record.num_rows).index(part)
    keys, values = (one[index][0].transpose(0, 1) for one in record.decoder.cache.keys_and_values(slot, 1, count))
    m = of.cfg.model
    if m.position_embedding_type == "rope":
        size = int(m.head_size * m.rotary_percent)
        keys = torch.cat([keys[..., :size:2], keys[..., 1:size:2], keys[..., size:]], -1)
    return keys, values


# All orders.

FLOWS = [
    FlowControl(), FlowControl(fill_credit=3), FlowControl(fill_credit=1, max_rows=2), FlowControl(fill_credit=0),
    FlowControl(fill_min_rows=4), FlowControl(fill_credit=3, fill_min_rows=4, max_rows=4),
]  # fmt: skip
ORDERS = float(os.environ.get("ORDERS", 1))
"""Tries this many times as many orders, where the engine or the stages have changed: ORDERS=5 pytest ..."""
MANY = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


def make(of: Model, choices: Random, num_ranks: int = 1) -> tuple[Engine, SimulatedPipeline]:
    description = msgspec.structs.replace(of.description, num_slots=pick(choices, [3, 2, 1]))
    stages = of.stages(pick(choices, LAYOUTS), num_ranks)
    pipeline = SimulatedPipeline(stages, description, choices, pick(choices, FLOWS))
    return of.engine(pipeline, prefill_chunk=pick(choices, [3, 2, 256])), pipeline


def finish(of: Model, engine: Engine, pipeline: SimulatedPipeline) -> None:
    """After all requests have ended, and the slots have been given back."""
    engine.run_step((), ())
    pipeline.drain()
    pipeline.deliver_what_is_kept_back()
    assert not +pipeline.num_fill_out, "credit has not come back"
    check_kept_rows(of, engine, pipeline)


@pytest.mark.parametrize(("head", "style"), [
    *((head, "llama") for head in HEADS), ("tied", "gpt2"), ("block", "rotary_percent"), ("mlp", "qkv_bias")
])  # fmt: skip
@settings(MANY, max_examples=round(40 * ORDERS))
@given(choices=st.randoms(use_true_random=False))
def test_in_any_order_requests_are_answered_as_by_one_process(head: str, style: str, choices: Random) -> None:
    run_at_random(model(head, style), choices)


def run_at_random(of: Model, choices: Random) -> tuple[Client, SimulatedPipeline]:
    engine, pipeline = make(of, choices)

    def rest() -> None:
        if choices.randrange(10) == 1:
            pipeline.drain()
            check_running_rows(of, engine, pipeline)

    client = Client(of, engine, choices, num_requests=2 + choices.randrange(4))
    client.run(rest)
    finish(of, engine, pipeline)
    return client, pipeline


def test_random_orders_meet_everything_that_is_to_be_shown() -> None:
    """Fill rows, cancelled requests, stops, slots that are used again, shared prefixes, rejected drafts, accepted ones
    in both ways to speculate."""
    met: Counter[str] = Counter()
    for seed in range(40):
        client, pipeline = run_at_random(model("tied"), Random(seed))
        met["fill rows"] += sum(pipeline.num_fill_sent.values())
        met += pipeline.met
        for result in client.results.values():
            if isinstance(result, RequestResult):
                met[result.finish_reason] += 1
                met["accepted"] += result.statistics.accepted
    seldom = {name: met[name] for name in (
        "fill rows", "cancelled", "stop", "eod", "slot used again", "shared prefix", "prefill in flight", "new epoch",
        "accepted", "draft", "verify", "speculate", "score",
    ) if met[name] < 3}  # fmt: skip
    assert not seldom, met


@settings(MANY, max_examples=round(30 * ORDERS))
@given(choices=st.randoms(use_true_random=False))
def test_followers_that_get_their_inputs_late_do_the_same(choices: Random) -> None:
    """The second rank of each stage is a copy of the first."""
    of = model("block")
    engine, pipeline = make(of, choices, num_ranks=2)
    Client(of, engine, choices, num_requests=2 + choices.randrange(3)).run()
    finish(of, engine, pipeline)


@settings(MANY, max_examples=round(20 * ORDERS))
@given(choices=st.randoms(use_true_random=False))
def test_beams(choices: Random) -> None:
    of = model("untied_norm")
    engine, pipeline = make(of, choices)
    for width in (1, 3):
        if width > engine.description.num_slots:
            continue
        prompt = pick(choices, PROMPTS)
        expected, beams = of.beams(prompt, width), search(engine, prompt, width)
        assert [beam.tokens for beam in beams] == [beam.tokens for beam in expected]
        assert [beam.score for beam in beams] == pytest.approx([beam.score for beam in expected], rel=1e-5)
        Client(of, engine, choices, num_requests=1).run()
    finish(of, engine, pipeline)


# What goes wrong.

POISON = 95
"""A token of some prompts."""


def on_poison(rank: SimulatedRank, layer: int, do: Callable[[Tensor, list[int]], None]) -> None:
    """When `layer` of a rank has run rows of the token, `do` gets the hidden states and the numbers of these rows."""
    decoder, slots = rank.record.decoder, rank.stage.worker.slots
    run_layers = decoder.run_layers

    def poisoned(hidden: Tensor, attention: object, first: int, last: int) -> tuple[Tensor, Tensor]:
        if not first <= layer < last:
            return run_layers(hidden, attention, first, last)
        residual = hidden
        for start, stop in ((first, layer + 1), (layer + 1, last)):
            if start < stop:
                hidden, residual = run_layers(hidden, attention, start, stop)
            positions = [(slot, first + i) for slot, first, count in attention.segments for i in range(count)]
            found = [row for row, (slot, position) in enumerate(positions) if slots[slot].ids[position] == POISON]
            if stop == layer + 1 and found:
                do(hidden, found)
        return hidden, residual

    decoder.run_layers = poisoned


def spoil(hidden: Tensor, rows: list[int]) -> None:
    hidden[rows] = torch.nan


def lose(hidden: Tensor, rows: list[int]) -> None:
    raise RuntimeError("the device is lost")


class Careless(Client):
    """Some of its prompts hold the token."""

    def __init__(self, *args: object, spares_others: bool, is_read: bool) -> None:
        """spares_others: only requests with the token may end with an error. is_read: there is a layer behind the one
        that is spoiled."""
        super().__init__(*args)
        self.spares_others, self.is_read, self.num_errors = spares_others, is_read, 0

    def ask(self, prompt: Sequence[int]) -> None:
        if self.choices.randrange(3) == 1:
            index = self.choices.randrange(len(prompt))
            prompt = [*prompt[:index], POISON, *prompt[index + 1 :]]
        super().ask(prompt)

    def check(self, asked: Asked, result: Result) -> None:
        if result.error in (None, "cancelled"):
            super().check(asked, result)
            assert not self.must_fail(asked, result)
            return
        self.num_errors += 1
        if self.spares_others:
            is_drafted = isinstance(result, RequestResult) and asked.params.mode == "self_speculative"
            assert (
                POISON in asked.prompt or is_drafted or POISON in self.of.answer(asked.prompt, asked.params).token_ids
            )

    def must_fail(self, asked: Asked, result: Result) -> bool:
        """Whether all layers ran a row of the token before the last token came, and one behind its layer read it."""
        params, ended = asked.params, isinstance(result, RequestResult) and result.finish_reason != "cancelled"
        return ended and params.mode == "full" and POISON in asked.prompt and len(result.tokens) > 0 and self.is_read


def count_errors(do: Callable, choices: Random) -> int:
    """Requests that ended with an error, of some."""
    of = model(pick(choices, ["untied_norm", "block"]))
    engine, pipeline = make(of, choices)
    layer = choices.randrange(of.cfg.model.num_layers)
    (rank,) = (one for one in pipeline.ranks if layer in one.record.num_rows)
    on_poison(rank, layer, do)
    is_read = layer < of.cfg.model.num_layers - 1
    client = Careless(of, engine, choices, 3 + choices.randrange(4), spares_others=do is spoil, is_read=is_read)
    client.run()
    finish(of, engine, pipeline)
    return client.num_errors


@pytest.mark.parametrize("do", [spoil, lose])
@settings(MANY, max_examples=round(30 * ORDERS))
@given(choices=st.randoms(use_true_random=False))
def test_what_fails_in_a_stage_ends_the_requests_that_it_meets(do: Callable, choices: Random) -> None:
    """Rows of a token are not finite behind a layer of some stage, or their pass raises: the engine goes on, and what
    such rows leave behind spoils no other request, those that get the slot next included."""
    count_errors(do, choices)


@pytest.mark.parametrize("do", [spoil, lose])
def test_something_does_fail(do: Callable) -> None:
    assert sum(count_errors(do, Random(seed)) for seed in range(20)) >= 10


@settings(MANY, max_examples=round(20 * ORDERS))
@given(choices=st.randoms(use_true_random=False))
def test_an_exit_that_is_not_finite_ends_requests_that_draft_or_score_with_it(choices: Random) -> None:
    of = model("untied_norm")
    engine, pipeline = make(of, choices)
    (rank,) = (one for one in pipeline.ranks if 1 in one.record.num_rows)
    exit_output = rank.record.decoder.exit_output

    def spoiled(index: int, hidden: Tensor, **settings: bool) -> object:
        return exit_output(index, hidden * torch.nan if index == 1 else hidden, **settings)

    rank.record.decoder.exit_output = spoiled
    ids = [add(engine, PROMPTS[2], params) for params in EVALUATE_EXIT_2 + SPARE_EXIT_2]
    results = run_all(engine)
    del rank.record.decoder.exit_output
    for one, params in zip(ids, EVALUATE_EXIT_2 + SPARE_EXIT_2, strict=True):
        if params in EVALUATE_EXIT_2:
            assert "not finite" in (results[one].error or ""), params
        else:
            compare(of.answer(PROMPTS[2], params), results[one])
    finish(of, engine, pipeline)


EVALUATE_EXIT_2 = [
    *(
        GenerationParams(max_tokens=4, mode="self_speculative", draft_exit=2, draft_length=2, speculation=speculation)
        for speculation in ("auto", "draft_then_verify")
    ),
    ScoreParams(exit_layers=(1, 2)),
]
SPARE_EXIT_2 = [
    GenerationParams(max_tokens=4), GenerationParams(max_tokens=4, mode="early_exit", exit_layers=(1,)),
    GenerationParams(max_tokens=4, mode="self_speculative", draft_exit=1, draft_length=2),
    ScoreParams(exit_layers=(1,)),
]  # fmt: skip


# By hand: what random orders may miss.


def arrived(slot: int, first: int, count: int = 1, **changes: object) -> StageRows:
    """Rows of a slot that decode, by default without an exit to evaluate."""
    answers = changes.pop("answers", 1)
    fields = {"request_id": slot, "generation": 1, "epoch": 0, "phase": "decode", "sample_from": first + count - 1}
    rows = Rows(slot=slot, first=first, tokens=(7,) * count, **{**fields, **changes})
    return StageRows(rows, first, rows.tokens, answers=answers)


def inbox_of(*rows: StageRows) -> Inbox:
    inbox = Inbox()
    for one in rows:
        inbox.add(one, torch.full((len(one.tokens), 2), float(one.first)))
    return inbox


def test_a_newer_epoch_drops_what_it_replaces_alone() -> None:
    inbox = inbox_of(arrived(0, 3, phase="speculate"), arrived(0, 4, phase="speculate"), arrived(1, 4))
    inbox.add(arrived(0, 4, phase="speculate", epoch=1), torch.zeros(1, 2))
    taken, _ = inbox.take(inbox.choose(512, 64))
    assert [(one.rows.slot, one.rows.epoch, one.first, one.stop) for one, _ in taken] == [(0, 1, 3, 5), (1, 0, 4, 5)]


def test_a_freed_slot_drops_its_rows_and_says_how_many_were_fill_rows() -> None:
    inbox = inbox_of(arrived(0, 3, answers=0), arrived(0, 4, count=2, answers=0), arrived(0, 6), arrived(1, 0))
    assert inbox.drop(0) == 3
    assert len(inbox.choose(512, 64)) == 1


def test_fill_rows_without_credit_wait_for_a_row_that_takes_them_along() -> None:
    inbox = inbox_of(arrived(0, 3, answers=0), arrived(0, 4, answers=0), arrived(1, 9, answers=0))
    assert inbox.choose(512, 0, is_link_free=False) == []
    inbox.add(arrived(0, 5), torch.full((1, 2), 5.0))
    ((rows, hidden),), num_fill_rows = inbox.take(inbox.choose(512, 0, is_link_free=False))
    assert (rows.first, rows.stop, rows.answers, num_fill_rows) == (3, 6, 1, 2)
    assert hidden[:, 0].tolist() == [3.0, 4.0, 5.0]


def test_rows_that_will_not_exit_are_capped_and_others_are_not() -> None:
    may_exit = arrived(3, 5, exits=(ExitThreshold(0, 0.5),))
    inbox = inbox_of(*(arrived(slot, 5) for slot in range(3)), may_exit, arrived(4, 0, count=3, phase="prefill"))
    chosen, _ = inbox.take(inbox.choose(512, 64, max_not_exiting=2))
    assert [one.rows.slot for one, _ in chosen] == [0, 1, 3, 4]


def test_a_prompt_is_not_kept_waiting_by_those_that_decode() -> None:
    inbox, passes = Inbox(), []
    inbox.add(arrived(3, 0, count=8, phase="prefill"), None)
    inbox.add(arrived(4, 0, count=2, phase="prefill"), None)
    for position in range(5, 8):
        for slot in range(3):
            inbox.add(arrived(slot, position), None)
        taken, _ = inbox.take(inbox.choose(8, 64))
        passes.append([(one.rows.slot, one.num_rows) for one, _ in taken])
    decoding = [(0, 1), (1, 1), (2, 1)]
    assert passes == [[*decoding, (3, 8)], [*decoding, (4, 2)], decoding]


@pytest.mark.parametrize("credit", [1, 3])
def test_a_first_stage_that_outruns_the_others_keeps_to_its_credit(credit: int) -> None:
    """All tokens come from its exit, and the cap on deferred rows is far away."""
    of = model("tied")
    params = GenerationParams(max_tokens=12, mode="early_exit", exit_thresholds=(0.0,), ignore_eod=True)
    for seed in range(20):
        pipeline = SimulatedPipeline(
            of.stages((1, 1, 2)), of.description, Random(seed), FlowControl(fill_credit=credit)
        )
        engine = of.engine(pipeline)
        for prompt in PROMPTS[:3]:
            engine.add(prompt, params)
        run_all(engine)
        assert 0 < pipeline.most_fill_out[1] <= credit
        finish(of, engine, pipeline)


def test_a_stage_hands_on_operations_without_rows() -> None:
    of = model("tied")
    (ranks, _) = of.stages((2, 2))
    stage = Stage(Worker(ranks[0]), 0, 2)
    admit = Admit(0, 0, 1, num_prompt_tokens=2, prefix=(), sampling=SamplingSettings())
    stage.receive(Step(0, (admit,)))
    output = stage.run(stage.choose(), lambda outputs: None)
    assert output == (StageInput((admit,)), None, 0, 0)
    assert stage.choose() is None


def test_rows_that_are_taken_along_are_not_scored_again() -> None:
    """A chunk that failed goes on as fill rows, and the next chunk of its request takes them along."""
    slot = SlotState(Admit(1, 0, 0, 9, (), SamplingSettings()), [], 0)
    rows = Rows(1, 0, 0, 0, "score", 5, (8, 9), score_heads=(0, FINAL_HEAD), score_from=1, targets=(9, 4))
    one = ScheduledRows(StageRows(rows, first=2, tokens=(5, 6, 7, 8, 9)), slot)
    positions = list(one.positions(one.scored_from))
    assert positions == [5, 6] and [rows.target_of(position) for position in positions] == [9, 4]
    later = msgspec.structs.replace(rows, score_from=6, targets=(4,))
    assert ScheduledRows(StageRows.of(later), slot).scored_from == 6
