"""The engine's scheduling, without a model: what it has the workers run, and what becomes of requests."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts
from megatron.early_exit.inference.engine.engine import Engine, QueueFull
from megatron.early_exit.inference.executor.base import ExecutorError
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings, ScoreParams
from megatron.early_exit.inference.protocol import Admit, CopyPrefix, DrawnToken, Rows, RowsOutput
from megatron.early_exit.inference.results import RequestResult
from tests.unit.fake_executor import COSTS, EXITS, FakeExecutor, answer_of

FULL = GenerationParams(max_tokens=5)
MODES = {
    "full": {},
    "early_exit": {"mode": "early_exit", "exit_thresholds": (0.5, 0.3)},
    "self_speculative": {"mode": "self_speculative", "draft_length": 3},
    "ngram": {"mode": "self_speculative", "draft_source": "ngram", "draft_length": 4},
    "both": {"mode": "self_speculative", "draft_source": "both"},
}
PROMPT = list(range(20))


def make_engine(executor: FakeExecutor | None = None, **changes: object) -> Engine:
    return Engine(executor or FakeExecutor(), EXITS, **{"costs": COSTS, **changes})


def run_all(engine: Engine, num_steps: int = 10**4) -> dict[int, RequestResult]:
    results = {}
    for _ in range(num_steps):
        if not engine.has_work:
            return results
        for event in engine.step():
            if event.result is not None:
                assert event.request_id not in results
                results[event.request_id] = event.result
    raise AssertionError(f"requests are left after {num_steps} steps")


def expected(engine: Engine, prompt: Sequence[int], params: GenerationParams) -> list[int]:
    return answer_of(prompt, params, engine.description.vocab_size, engine.description.num_positions)


def prefill_rows(executor: FakeExecutor, request_id: int | None = None) -> list[Rows]:
    """Rows of prompts in the order of steps: of one request, or of all."""
    rows = [rows for step in executor.steps for rows in step.rows if rows.phase in ("prefill", "score")]
    return [one for one in rows if request_id in (None, one.request_id)]


def check_echo(prompt: Sequence[int], result: RequestResult) -> None:
    """Every token of the prompt has what the position before it says."""
    assert [(one.token, one.log_prob) for one in result.prompt] == [
        (token, None if position == 0 else 1.0 - position) for position, token in enumerate(prompt)
    ]


def operations(executor: FakeExecutor, kind: type) -> list:
    return [one for step in executor.steps for one in step.operations if isinstance(one, kind)]


# Answers, whatever runs beside them.


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_a_request_alone(mode: str, lag: int) -> None:
    executor = FakeExecutor(num_slots=3, lag=lag)
    engine = make_engine(executor, prefill_chunk=7)
    params = GenerationParams(max_tokens=12, **MODES[mode])
    prompts = [PROMPT[: 3 + 5 * number] for number in range(4)] + [[7] * 64]
    ids = [engine.add(prompt, params) for prompt in prompts]
    results = run_all(engine)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert results[request_id].token_ids == expected(engine, prompt, params)
    assert results[ids[-1]].finish_reason == "max_positions"


@pytest.mark.parametrize("has_blocks", [False, True])
@pytest.mark.parametrize("lag", [0, 2])
def test_requests_that_share_prefixes_come_go_and_are_cancelled(lag: int, has_blocks: bool) -> None:
    num_shared = 0
    for seed in range(12):
        chance = random.Random(seed)
        executor = FakeExecutor(num_slots=chance.randrange(1, 5), num_positions=120, has_blocks=has_blocks, lag=lag)
        engine = make_engine(executor, prefill_chunk=chance.choice([5, 16, 64]), ends={49})
        known, asked, results = [PROMPT * 2], {}, {}
        for _ in range(200):
            if chance.random() < 0.3:
                base = chance.choice(known)
                prompt = base[: chance.randrange(len(base) + 1)] + [chance.randrange(3)] * chance.randrange(1, 9)
                prompt = prompt[:110]
                echo = chance.random() < 0.1
                params = GenerationParams(
                    max_tokens=chance.randrange(0 if echo else 1, 20),
                    max_deferred=chance.choice([0, 2, 30]),
                    echo=echo,
                    exit_layers=chance.choice([(), (2,), (4,)]),
                    **{**MODES[chance.choice(list(MODES))], "exit_thresholds": (0.4,)},
                )
                if chance.random() < 0.1:
                    layers = chance.choice([(), (2,)])
                    engine.add_scoring(prompt, ScoreParams(exit_layers=layers, final=not layers))
                else:
                    asked[engine.add(prompt, params)] = prompt, params
            if asked and chance.random() < 0.05:
                request_id = chance.choice(list(asked))
                result = engine.cancel(request_id)
                assert (result is None) == (request_id in results)
                if result is not None:
                    results[request_id] = result
            for event in engine.step():
                if event.result is not None and event.request_id in asked:
                    assert event.request_id not in results
                    results[event.request_id] = event.result
                    known.append(asked[event.request_id][0] + event.result.token_ids)
            assert len(engine._running) <= engine.description.num_slots
        results |= {key: result for key, result in run_all(engine).items() if key in asked}
        assert results.keys() == asked.keys()
        for request_id, (prompt, params) in asked.items():
            tokens = expected(engine, prompt, params)
            if 49 in tokens:
                tokens = tokens[: tokens.index(49) + 1]
            if results[request_id].finish_reason == "cancelled":
                tokens = tokens[: len(results[request_id].tokens)]
            elif params.echo:
                check_echo(prompt, results[request_id])
            assert results[request_id].token_ids == tokens
        num_shared += sum(len(one.prefix) > 0 for one in operations(executor, Admit))
    assert num_shared > 50


# Prompts.


def test_rows_of_prompts_go_to_requests_in_the_order_in_which_they_were_admitted() -> None:
    executor = FakeExecutor(num_slots=4, num_positions=200)
    engine = make_engine(executor, prefill_chunk=10)
    lengths = (25, 8, 40, 3)
    ids = [engine.add([number] * length, FULL) for number, length in enumerate(lengths)]
    run_all(engine)
    counts = [
        [(ids.index(r.request_id), len(r.tokens)) for r in s.rows if r.phase == "prefill"] for s in executor.steps
    ]
    counts = [of_step for of_step in counts if of_step]
    assert counts == [
        [(0, 10)], [(0, 10)], [(0, 5), (1, 5)], [(1, 3), (2, 7)], [(2, 10)], [(2, 10)], [(2, 10)], [(2, 3), (3, 3)],
    ]  # fmt: skip


def steps_until_first_token(engine: Engine, request_id: int, arrive: object = lambda: None) -> int:
    for count in range(1, 1000):
        arrive()
        if any(event.request_id == request_id and event.tokens for event in engine.step()):
            return count
    raise AssertionError("no token in 1,000 steps")


def test_a_long_prompt_under_steady_arrivals_takes_at_most_twice_the_steps_that_it_takes_alone() -> None:
    def long_engine() -> tuple[Engine, list[int]]:
        return make_engine(FakeExecutor(num_slots=16, num_positions=4096)), [1] * 2000

    engine, prompt = long_engine()
    alone = steps_until_first_token(engine, engine.add(prompt, FULL))
    assert alone == 8
    for num_before in (0, 1, 3):
        engine, prompt = long_engine()
        numbers = iter(range(2, 10**6))
        arrive = lambda: engine.add([next(numbers) % 48 + 2] * 300, GenerationParams(max_tokens=20))  # noqa: B023
        for _ in range(num_before):
            arrive()
            engine.step()
        assert steps_until_first_token(engine, engine.add(prompt, FULL), arrive) <= 2 * alone


def test_with_echo_all_rows_of_a_prompt_are_computed() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    engine.add(PROMPT, FULL)
    run_all(engine)
    request_id = engine.add(PROMPT, GenerationParams(max_tokens=5, echo=True))
    check_echo(PROMPT, run_all(engine)[request_id])
    assert operations(executor, Admit)[-1].prefix == ()


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    executor = FakeExecutor(num_slots=4, num_positions=200)
    engine = make_engine(executor, prefill_chunk=16)
    prompts = [PROMPT * 4] * 3 + [PROMPT * 4 + [1]]
    ids = [engine.add(prompt, FULL) for prompt in prompts]
    results = run_all(engine)
    assert [results[one].token_ids for one in ids] == [expected(engine, prompt, FULL) for prompt in prompts]
    assert sum(len(rows.tokens) for rows in prefill_rows(executor)) == 80 + 1 + 1 + 1
    assert len(operations(executor, CopyPrefix)) == 3


@pytest.mark.parametrize("mode", MODES)
def test_the_next_turn_of_a_chat_computes_what_is_new(mode: str) -> None:
    executor = FakeExecutor(num_positions=200)
    engine = make_engine(executor)
    params = GenerationParams(max_tokens=12, max_deferred=4, **MODES[mode])
    ids = PROMPT
    for turn in range(3):
        request_id = engine.add(ids, params)
        answer = run_all(engine)[request_id].token_ids
        assert answer == expected(engine, ids, params)
        new = sum(len(rows.tokens) for rows in prefill_rows(executor, request_id))
        # Of an answer the last row is never computed, and a few before it may be deferred or drafts.
        assert turn == 0 or new <= 10 + 1 + 4
        ids = ids + answer + [turn] * 10
    assert not operations(executor, CopyPrefix)
    assert {one.slot for one in operations(executor, Admit)} == {0}


def test_exits_whose_block_has_not_seen_a_row_do_not_share_it() -> None:
    for has_blocks in (False, True):
        executor = FakeExecutor(has_blocks=has_blocks)
        engine = make_engine(executor)
        for layer in (2, 4):
            params = GenerationParams(max_tokens=3, mode="early_exit", exit_thresholds=(0.5,), exit_layers=(layer,))
            request_id = engine.add([*PROMPT, 1], params)
            assert run_all(engine)[request_id].token_ids == expected(engine, [*PROMPT, 1], params)
        num_computed = sum(len(rows.tokens) for rows in prefill_rows(executor, request_id))
        assert num_computed == (len(PROMPT) if has_blocks else 0)


def test_scores_that_skip_layers_leave_no_rows_to_others() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    engine.add_scoring(PROMPT, ScoreParams(exit_layers=(2,), final=False))
    engine.add([*PROMPT, 1], FULL)  # does not wait for them either
    engine.step()
    assert engine.num_running == 1  # the scores have come
    run_all(engine)
    engine.add_scoring([*PROMPT, 2], ScoreParams(score_from=18))
    run_all(engine)
    assert [len(one.prefix) for one in operations(executor, Admit)] == [0, 0, 18]


# Coming and going.


def test_no_more_requests_run_than_there_are_slots() -> None:
    executor = FakeExecutor(num_slots=3)
    engine = make_engine(executor)
    ids = [engine.add([number], GenerationParams(max_tokens=1 + number % 4)) for number in range(20)]
    assert engine.num_waiting == 20
    results = {}
    while engine.has_work:
        results |= {event.request_id: event.result for event in engine.step() if event.result is not None}
        assert engine.num_running <= 3
        assert engine.num_running + engine.num_waiting + len(results) == 20
    assert results.keys() == set(ids)
    admitted = [one.request_id for one in operations(executor, Admit)]
    assert admitted == ids
    generations = [(one.slot, one.generation) for one in operations(executor, Admit)]
    assert len(set(generations)) == 20


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_cancel_returns_the_result_and_leaves_no_work(num_steps: int) -> None:
    engine = make_engine()
    request_id = engine.add(PROMPT, FULL)
    for _ in range(num_steps):
        engine.step()
    result = engine.cancel(request_id)
    assert result.finish_reason == "cancelled"
    assert result.token_ids == expected(engine, PROMPT, FULL)[:num_steps]
    assert not engine.has_work
    assert engine.step() == []
    assert engine.cancel(request_id) is None


def test_stop_drops_the_tokens_behind_a_stop_string() -> None:
    engine = make_engine()
    request_id = engine.add(PROMPT, FULL)
    for _ in range(4):
        engine.step()
    result = engine.stop(request_id, 2)
    assert (result.finish_reason, result.token_ids) == ("stop", expected(engine, PROMPT, FULL)[:2])
    assert not engine.has_work
    assert engine.stop(request_id, 1) is None


def test_outputs_of_a_request_that_has_ended_are_ignored() -> None:
    """They come when its slot is another's already."""
    executor = FakeExecutor(num_slots=1, lag=2)
    engine = make_engine(executor)
    first = engine.add(PROMPT, FULL)
    engine._admit({})
    engine._submit()
    assert engine.cancel(first).token_ids == []
    second = engine.add([3, 4], FULL)
    engine._admit({})
    engine._submit()
    assert [one.slot for one in operations(executor, Admit)] == [0, 0]
    results = run_all(engine)
    assert results.keys() == {second}
    assert results[second].token_ids == expected(engine, [3, 4], FULL)


def test_outputs_of_another_request_of_the_same_slot_are_ignored() -> None:
    def of_another(rows: Rows, output: RowsOutput) -> RowsOutput:
        return msgspec.structs.replace(output, generation=output.generation - 1)

    engine = make_engine(FakeExecutor(spoil=of_another))
    engine.add(PROMPT, FULL)
    for _ in range(3):
        assert engine.step() == []


@pytest.mark.parametrize("seed", [5, -2, 2**63 - 2])
def test_each_of_several_answers_is_that_of_its_own_seed(seed: int) -> None:
    engine = make_engine(executor := FakeExecutor())
    params = GenerationParams(max_tokens=1, sampling=SamplingSettings(temperature=1.0, seed=seed))
    for offset in range(3):
        engine.add(PROMPT, params, seed_offset=offset)
    run_all(engine)
    seeds = [admission.sampling.seed for admission in operations(executor, Admit)]
    assert seeds == {5: [5, 6, 7], -2: [-2, -1, 0], 2**63 - 2: [2**63 - 2, 2**63 - 1, -(2**63)]}[seed]


def test_the_queue_is_bounded() -> None:
    engine = make_engine(FakeExecutor(num_slots=2), max_waiting=1)
    ids = [engine.add([1, 2], FULL) for _ in range(3)]
    with pytest.raises(QueueFull, match="all 2 slots are taken and 1 requests wait"):
        engine.add([1, 2], FULL)
    engine.step()
    with pytest.raises(QueueFull):
        engine.add_scoring([1, 2], ScoreParams())
    engine.cancel(ids[0])
    ids.append(engine.add([1, 2], FULL))
    assert run_all(engine).keys() == set(ids[1:])


def test_fail_all_ends_every_request_and_the_engine_goes_on() -> None:
    executor = FakeExecutor(num_slots=2)
    engine = make_engine(executor)
    ids = [engine.add([*PROMPT, number], FULL) for number in range(3)]
    engine.step()
    engine.step()
    events = engine.fail_all("no memory is left")
    assert sorted(event.request_id for event in events) == ids
    assert {(event.result.finish_reason, event.result.error) for event in events} == {("error", "no memory is left")}
    assert not engine.has_work
    request_id = engine.add([*PROMPT, 1], FULL)
    assert run_all(engine)[request_id].token_ids == expected(engine, [*PROMPT, 1], FULL)
    assert operations(executor, Admit)[-1].prefix == ()  # nobody knows what those rows are


def test_workers_that_end_end_all_requests() -> None:
    executor = FakeExecutor(num_slots=1)
    engine = make_engine(executor)
    ids = [engine.add(PROMPT, FULL) for _ in range(2)]
    engine.step()
    executor.has_ended = True
    events = engine.step()
    assert sorted(event.request_id for event in events) == ids
    assert {event.result.error for event in events} == {"rank 1 has ended"}
    assert not engine.has_work
    with pytest.raises(ExecutorError, match="rank 1 has ended"):
        engine.add(PROMPT, FULL)


def test_workers_that_end_are_noticed_while_there_is_nothing_to_run() -> None:
    executor = FakeExecutor(num_slots=1)
    engine = make_engine(executor)
    engine.look_after_workers()
    assert engine.failure is None
    executor.has_ended = True
    engine.look_after_workers()
    assert engine.failure == "rank 1 has ended"
    with pytest.raises(ExecutorError, match="rank 1 has ended"):
        engine.add(PROMPT, FULL)


def test_a_request_whose_rows_fail_ends_alone_and_is_no_donor() -> None:
    def fail_late(rows: Rows, output: RowsOutput) -> RowsOutput:
        return msgspec.structs.replace(output, tokens=(), error="not finite") if 18 in rows.tokens else output

    executor = FakeExecutor(num_slots=2, spoil=fail_late)
    engine = make_engine(executor, prefill_chunk=17)
    bad, good = engine.add(PROMPT, FULL), engine.add([1, 2], FULL)
    results = run_all(engine)
    assert (results[bad].finish_reason, results[bad].error) == ("error", "not finite")
    assert results[good].token_ids == expected(engine, [1, 2], FULL)
    engine.add(PROMPT, FULL)
    run_all(engine)
    assert operations(executor, Admit)[-1].prefix == ()


@pytest.mark.parametrize("mode", MODES)
def test_a_request_whose_outputs_cannot_be_used_ends_alone(mode: str) -> None:
    def of_no_exit(rows: Rows, output: RowsOutput) -> RowsOutput:
        if rows.request_id != 0 or rows.phase not in ("decode", "verify"):
            return output
        return msgspec.structs.replace(output, tokens=(DrawnToken(1, -1.0, 0.5, exit=9),))

    engine = make_engine(FakeExecutor(spoil=of_no_exit))
    params = GenerationParams(max_tokens=12, **MODES[mode])
    bad, good = engine.add(PROMPT, params), engine.add([1, 2], params)
    results = run_all(engine)
    assert results[bad].finish_reason == "error"
    assert "its tokens could not be used" in results[bad].error
    assert results[good].token_ids == expected(engine, [1, 2], params)


# What layers and heads cost.


class Timed(FakeExecutor):
    """Counts how often costs are measured."""

    num_measured = 0

    def measure_costs(self) -> StepCosts:
        self.num_measured += 1
        return super().measure_costs()


@pytest.mark.parametrize("params", [
    GenerationParams(max_tokens=4, mode="self_speculative"),
    GenerationParams(max_tokens=4, mode="self_speculative", draft_length=2),
    GenerationParams(max_tokens=4, mode="early_exit", plan_exits=True),
], ids=["drafts that adapt", "drafts of the exit that promises most", "planned exits"])  # fmt: skip
def test_costs_are_measured_when_an_idle_engine_is_told_to_and_never_by_add(params: GenerationParams) -> None:
    executor, scores = Timed(), np.full((4, len(EXITS.exit_layer_nums)), 0.5, np.float32)
    engine = make_engine(executor, costs=None, exit_scores={"head": scores})
    engine.prepare(FULL)
    engine.add(PROMPT, params)
    engine.prepare(params)  # something is to be run
    run_all(engine)
    assert executor.num_measured == 0
    for _ in range(2):
        engine.prepare(params)
        assert executor.num_measured == 1
    engine.add(PROMPT, params)
    run_all(engine)
    assert executor.num_measured == 1


@pytest.mark.parametrize("source", ["ngram", "exit", "both"])
@pytest.mark.parametrize("num_requests", [1, 32])
def test_steps_of_many_requests_are_those_without_drafts_where_rows_are_not_free(
    source: str, num_requests: int
) -> None:
    """Eight rows take as long as one, and then time grows with their number."""
    growing = tuple(max(1.0, rows / 8) for rows in ROW_COUNTS)
    steps, tokens = {}, {}
    for params in (
        GenerationParams(max_tokens=30, ignore_eod=True),
        GenerationParams(max_tokens=30, ignore_eod=True, mode="self_speculative", draft_source=source),
    ):
        executor = FakeExecutor(num_slots=num_requests, vocab_size=3)  # so that text repeats
        engine = make_engine(executor, costs=StepCosts(growing, growing, growing, growing))
        ids = [engine.add([number % 3, 1], params) for number in range(num_requests)]
        results = run_all(engine)
        tokens[params.mode] = [results[one].token_ids for one in ids]
        # Of the prompt's last row the first token is due, which without drafts belongs to the prompt.
        steps[params.mode] = [
            [(rows.slot, rows.tokens, rows.exits) for rows in step.rows] for step in executor.steps[-29:]
        ]
    assert tokens["self_speculative"] == tokens["full"]
    assert (steps["self_speculative"] == steps["full"]) == (num_requests == 32)


def test_a_prompt_without_an_answer() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    for prompt in ([1], PROMPT):
        request_id = engine.add(prompt, GenerationParams(max_tokens=0, echo=True))
        result = run_all(engine)[request_id]
        assert (result.finish_reason, result.token_ids) == ("max_tokens", [])
        check_echo(prompt, result)
    engine.add(PROMPT, FULL)
    run_all(engine)
    assert len(operations(executor, Admit)[-1].prefix) == 19
