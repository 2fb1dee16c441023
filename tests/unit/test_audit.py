"""The live audit in the engine's scheduling: what is checked, when, and that nobody notices."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron.early_exit.inference.certificates import AnswerSettings, Certificate, Certificates
from megatron.early_exit.inference.engine.audit import LOSS_BUCKETS, AuditReport, ExitAudit
from megatron.early_exit.inference.engine.engine import Engine, QueueFull
from megatron.early_exit.inference.engine.risk_monitor import RiskMonitor
from megatron.early_exit.inference.fingerprint import ExitFingerprint
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings
from megatron.early_exit.inference.protocol import FINAL_HEAD, Rows
from megatron.early_exit.inference.results import RequestResult
from tests.unit.fake_executor import EXITS, FakeExecutor, answer_of, predict
from tests.unit.test_scheduler import PROMPT, make_engine, run_all

EARLY = GenerationParams(max_tokens=12, mode="early_exit", exit_thresholds=(0.4,))
PROMPTS = [[7] * 3, PROMPT, PROMPT + [1, 2, 3], [9] * 30, PROMPT[:17] + [5]]


def audited_engine(executor: FakeExecutor | None = None, share: float = 1.0, **changes: object) -> Engine:
    return make_engine(executor, audit=ExitAudit(share, **changes))


def run_audits(engine: Engine, num_steps: int = 1000) -> dict[str, AuditReport]:
    """Of each promise, when all are done."""
    for _ in range(num_steps):
        if not engine.audit.has_work:
            return {one.promise: one for one in engine.audit.reports()}
        assert engine.step() == [], "nobody hears of audits"
    raise AssertionError(f"audits are left after {num_steps} steps")


def expected_loss(prompt: Sequence[int], answer: Sequence[int], skip: int = 0, vocab_size: int = 50) -> float:
    """What a plain loop says."""
    wrong = [
        answer[index] != predict([*prompt, *answer[:index]], FINAL_HEAD, vocab_size)[0]
        for index in range(skip, len(answer))
    ]
    return sum(wrong) / len(wrong)


def audit_rows(executor: FakeExecutor) -> list[Rows]:
    return [rows for step in executor.steps for rows in step.rows if rows.phase == "score"]


@pytest.mark.parametrize("has_blocks", [False, True])
@pytest.mark.parametrize("lag", [0, 2])
def test_losses_are_those_of_a_plain_loop(lag: int, has_blocks: bool) -> None:
    executor = FakeExecutor(lag=lag, has_blocks=has_blocks)
    engine = audited_engine(executor)
    ids = [engine.add(prompt, EARLY) for prompt in PROMPTS]
    results = run_all(engine)
    losses = [expected_loss(p, results[one].token_ids) for p, one in zip(PROMPTS, ids, strict=True)]
    assert 0 < sum(losses) < len(losses)
    report = run_audits(engine)["none"]
    assert (report.num_audited, report.num_not_auditable, report.num_dropped) == (len(PROMPTS), 0, 0)
    assert report.loss_sum == pytest.approx(sum(losses))
    assert report.mean_loss == pytest.approx(sum(losses) / len(losses))
    assert (report.evidence, report.num_alarms) == (None, 0)
    above = lambda bound: sum(loss <= bound for loss in losses)
    assert [sum(report.loss_counts[: index + 1]) for index in range(len(LOSS_BUCKETS))] == [*map(above, LOSS_BUCKETS)]


def test_an_answer_that_fills_all_positions_is_checked_to_its_end() -> None:
    engine = audited_engine(FakeExecutor(num_positions=24))
    request_id = engine.add(PROMPT, EARLY)
    result = run_all(engine)[request_id]
    assert (result.finish_reason, len(result.tokens)) == ("max_positions", 5)
    assert run_audits(engine)["none"].loss_sum == pytest.approx(expected_loss(PROMPT, result.token_ids))


def test_rows_of_the_prompt_are_those_of_the_answer_that_has_ended() -> None:
    executor = FakeExecutor()
    engine = audited_engine(executor)
    engine.add(PROMPT, EARLY)
    run_all(engine)
    run_audits(engine)
    (rows,) = audit_rows(executor)
    assert (rows.first, rows.stop) == (len(PROMPT) - 1, len(PROMPT) + EARLY.max_tokens - 1)


# What is drawn, and what can be checked.


def drawn(prompts: Sequence[Sequence[int]], share: float, params: GenerationParams = EARLY) -> list[int]:
    """Which of these requests are audited."""
    engine, found = audited_engine(FakeExecutor(num_positions=128), share), []
    for number, prompt in enumerate(prompts):
        engine.add(prompt, params)
        run_all(engine)
        found += [number] if engine.audit.has_work else []
        run_audits(engine)
    return found


def test_a_share_of_requests_is_drawn_whatever_they_are() -> None:
    chance = random.Random(0)
    prompts = [[chance.randrange(50) for _ in range(chance.randrange(1, 20))] for _ in range(200)]
    found = drawn(prompts, 0.1)
    assert 10 <= len(found) <= 32
    assert drawn([[1]] * 200, 0.1, GenerationParams(max_tokens=2, mode="early_exit")) == found
    assert drawn(prompts[:20], 0.0) == []


def test_other_modes_are_not_drawn_and_do_not_change_who_is() -> None:
    engine = audited_engine(share=1.0)
    for mode in ("full", "self_speculative"):
        engine.add(PROMPT, GenerationParams(max_tokens=3, mode=mode))
    run_all(engine)
    assert engine.audit.reports() == ()
    first, second = ExitAudit(0.3), ExitAudit(0.3)
    alone = [first.draws(EARLY) for _ in range(50)]
    assert [second.draws(EARLY) for _ in range(50) if not second.draws(GenerationParams())] == alone


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "all"])
def test_a_share_that_is_none_is_refused(share: object) -> None:
    with pytest.raises(ValueError, match="audit_share is"):
        ExitAudit(share)


@pytest.mark.parametrize("sampling", [
    SamplingSettings(temperature=0.7),
    SamplingSettings(repetition_penalty=1.1),
    SamplingSettings(logit_bias=((3, 5.0),)),
], ids=["sampled", "penalised", "biased"])  # fmt: skip
def test_only_what_takes_the_most_probable_token_is_checked(sampling: SamplingSettings) -> None:
    executor = FakeExecutor()
    engine = audited_engine(executor)
    engine.add(PROMPT, GenerationParams(max_tokens=3, mode="early_exit", sampling=sampling))
    run_all(engine)
    report = run_audits(engine)["none"]
    assert (report.num_audited, report.num_not_auditable, report.num_dropped) == (0, 1, 0)
    assert report.mean_loss is None and not audit_rows(executor)


def test_tokens_before_min_tokens_are_left_out() -> None:
    """The final head alone may want an end there; the fake model knows no ends, so the counts tell."""
    engine = audited_engine()
    params = GenerationParams(max_tokens=12, min_tokens=5, mode="early_exit", exit_thresholds=(0.4,))
    request_id = engine.add(PROMPT, params)
    answer = run_all(engine)[request_id].token_ids
    expected = expected_loss(PROMPT, answer, skip=5)
    assert expected != expected_loss(PROMPT, answer)
    assert run_audits(engine)["none"].loss_sum == pytest.approx(expected)
    engine.add(PROMPT, GenerationParams(max_tokens=5, min_tokens=5, mode="early_exit"))
    run_all(engine)
    assert run_audits(engine)["none"].num_not_auditable == 1


# Whatever ends a request.


def begun(engine: Engine, num_tokens: int, **changes: object) -> int:
    """A request that has so many tokens, or a few more."""
    request_id = engine.add(PROMPT, GenerationParams(**{"max_tokens": 30, "mode": "early_exit", **changes}))
    count = 0
    while count < num_tokens:
        count += sum(len(event.tokens) for event in engine.step())
    return request_id


def test_what_a_cancelled_or_stopped_request_has_generated_counts() -> None:
    engine = audited_engine(FakeExecutor(lag=1))
    cancelled = engine.cancel(begun(engine, 6, exit_thresholds=(0.3,)))
    stopped = engine.stop(begun(engine, 8, exit_thresholds=(0.2,)), 5)
    assert len(cancelled.tokens) >= 6 and len(stopped.tokens) == 5
    report = run_audits(engine)["none"]
    assert report.num_audited == 2
    expected = expected_loss(PROMPT, cancelled.token_ids) + expected_loss(PROMPT, stopped.token_ids)
    assert report.loss_sum == pytest.approx(expected)


def test_who_leaves_before_the_first_token_leaves_nothing_to_check() -> None:
    engine = audited_engine()
    ids = [engine.add([number] * 30, EARLY) for number in range(6)]
    engine.cancel(ids[-1])  # queued
    engine.step()
    for one in ids:
        engine.cancel(one)
    assert run_audits(engine)["none"].num_not_auditable == 6 - run_audits(engine)["none"].num_audited


def test_a_request_that_fails_is_not_checked() -> None:
    fail = lambda rows, output: (
        output
        if rows.first < 25
        else type(output)(
            **{name: getattr(output, name) for name in ("request_id", "slot", "generation", "epoch", "stop")},
            error="NaN",
        )
    )
    engine = audited_engine(FakeExecutor(spoil=fail))
    request_id = engine.add(PROMPT, EARLY)
    assert run_all(engine)[request_id].error == "NaN"
    report = run_audits(engine)["none"]
    assert (report.num_audited, report.num_dropped) == (0, 1)


def test_a_check_that_fails_is_dropped_and_its_slot_is_free() -> None:
    def fail(rows: Rows, output: object) -> object:
        if rows.phase != "score":
            return output
        names = ("request_id", "slot", "generation", "epoch", "stop")
        return type(output)(**{name: getattr(output, name) for name in names}, error="NaN")

    engine = audited_engine(FakeExecutor(spoil=fail))
    engine.add(PROMPT, EARLY)
    run_all(engine)
    report = run_audits(engine)["none"]
    assert (report.num_audited, report.num_dropped, engine.slots.num_free) == (0, 1, 4)


def test_audits_end_with_the_workers() -> None:
    executor = FakeExecutor(num_slots=2)
    engine = audited_engine(executor)
    engine.prefill_chunk = 4  # a check takes several steps
    for number in range(3):
        engine.add([number] * 20, EARLY)
    run_all(engine)
    engine.step()
    assert engine.audit.running and engine.audit.has_work
    engine.add(PROMPT, EARLY)
    executor.close()
    assert [event.result.error for event in engine.step()] == ["rank 1 has ended"]
    assert not engine.audit.has_work
    (report,) = engine.audit.reports()
    assert report.num_audited + report.num_dropped == 4 and report.num_dropped >= 3


# Promises.


def certificate(level: float = 0.9, risk: str = "A-max", threshold: float = 0.0) -> Certificate:
    """What no calibration would certify: exits of the fake model are wrong once in three times."""
    fingerprint = ExitFingerprint("weights", EXITS.exit_layer_nums, "fp32", None, None, "tokenizer", ())
    return Certificate(
        level, 0.05, risk, fingerprint, AnswerSettings(EARLY.max_tokens), {2: threshold}, refusal=None, p_value=0.01,
        calibration_risk=0.0, num_prompts={},
    )  # fmt: skip


def audited_promises(certificates: Sequence[Certificate], asked: Sequence[str], num_prompts: int) -> Engine:
    """After so many prompts with each of these thresholds."""
    engine = make_engine(audit=ExitAudit(1.0), certificates=Certificates(tuple(certificates)))
    for thresholds in asked:
        for number in range(num_prompts):
            engine.add([number, 1, 2], replace(EARLY, exit_thresholds=thresholds))
        run_all(engine)
        while engine.audit.has_work:
            engine.step()
    return engine


def test_a_promise_that_does_not_hold_raises_an_alarm_that_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    good = certificate(0.99, threshold=1.0)
    engine = audited_promises([certificate(0.9), good], ["certified:0.9", "certified:0.99", 0.0], 40)
    reports = {one.promise: one for one in engine.audit.reports()}
    assert list(reports) == ["0.9", "0.99", "none"]
    assert reports["0.9"].num_audited == reports["0.99"].num_audited == 40
    assert reports["0.9"].num_alarms > 0 and reports["0.9"].mean_loss == reports["none"].mean_loss > 0.2
    assert (reports["0.99"].num_alarms, reports["0.99"].mean_loss) == (0, 0.0) and reports["0.99"].evidence <= 1
    assert (reports["none"].num_alarms, reports["none"].evidence) == (0, None)
    words = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(words) == reports["0.9"].num_alarms
    assert "certified:0.9'" in words[0] and "10.00% of the tokens" in words[0] and "calibrate again" in words[0]


def test_the_evidence_is_that_of_the_monitor_over_the_losses_of_each_promise() -> None:
    engine = audited_promises([certificate(0.7), certificate(0.6)], ["certified:0.7", "certified:0.6"], 9)
    for report in engine.audit.reports():
        monitor = RiskMonitor(1 - float(report.promise))
        for number in range(9):
            answer = answer_of([number, 1, 2], replace(EARLY, exit_layers=(2,), exit_thresholds=0.0), 50, 64)
            monitor.observe(expected_loss([number, 1, 2], answer))
        assert report.evidence == pytest.approx(monitor.evidence)
        assert report.num_alarms == monitor.num_alarms


def test_the_loss_is_the_certificate_s() -> None:
    """B: whether anything differs. C is about texts, which nobody has here: shares of tokens are counted alone."""
    level = "certified:0.9"
    (share,), (any_,), (of_text,) = (
        audited_promises([certificate(risk=risk)], [level], 30).audit.reports() for risk in ("A-max", "B", "C")
    )
    assert any_.loss_sum == 30 - share.loss_counts[0] > share.loss_sum and any_.num_alarms > 0
    assert (of_text.loss_sum, of_text.evidence, of_text.num_alarms) == (share.loss_sum, None, 0)


# Nobody notices.


def test_answers_come_in_the_same_steps_as_without_audits() -> None:
    def steps_to_ends(share: float) -> dict[int, int]:
        engine, ends = audited_engine(FakeExecutor(num_slots=2), share), {}
        ids = [engine.add([number] * 20, EARLY) for number in range(6)]
        for step in range(1000):
            if not engine.has_work:
                break
            assert engine.num_running <= 2 and engine.num_running + engine.num_waiting + len(ends) == len(ids)
            ends |= {ids.index(event.request_id): step for event in engine.step() if event.result is not None}
        return ends

    assert steps_to_ends(1.0) == steps_to_ends(0.0)


def test_audits_take_no_slot_while_a_request_waits_and_give_it_back_to_one_that_comes() -> None:
    executor = FakeExecutor(num_slots=1)
    engine = audited_engine(executor)
    engine.prefill_chunk = 4  # a check takes several steps
    first = engine.add([1] * 20, EARLY)
    second = engine.add([2] * 20, EARLY)
    results = {}
    while second not in results:
        results |= {event.request_id: event.result for event in engine.step() if event.result is not None}
        assert engine.has_work is False or not engine.audit.running
    assert len(engine.audit.waiting) == 2 and not audit_rows(executor)
    engine.step()
    assert engine.audit.running and not engine.has_work and (engine.num_running, engine.kv_cache_usage) == (0, 0.0)
    third = engine.add([3] * 20, EARLY)
    engine.step()
    assert engine.num_running == 1 and not engine.audit.running
    results |= run_all(engine)
    expected = sum(expected_loss([n] * 20, results[one].token_ids) for n, one in ((1, first), (2, second), (3, third)))
    report = run_audits(engine)["none"]
    assert (report.num_audited, report.num_dropped) == (3, 0)
    assert report.loss_sum == pytest.approx(expected)


def test_audits_wait_also_for_a_request_that_waits_for_another_s_prompt() -> None:
    """Though there are slots: those are its own."""
    engine = make_engine(FakeExecutor(num_slots=3), audit=ExitAudit(1.0), prefill_chunk=4)
    engine.add([1, 2], EARLY)
    run_all(engine)
    ids = [engine.add([3] * 40, EARLY) for _ in range(2)]
    engine.step()
    assert (engine.num_running, engine.num_waiting, engine.slots.num_free) == (1, 1, 2)
    assert len(engine.audit.waiting) == 1 and not engine.audit.running
    results = run_all(engine)
    assert results[ids[0]].token_ids == results[ids[1]].token_ids
    assert run_audits(engine)["none"].num_audited == 3


def test_audits_do_not_make_the_queue_full() -> None:
    engine = make_engine(FakeExecutor(num_slots=1), audit=ExitAudit(1.0), max_waiting=0, prefill_chunk=4)
    engine.add(PROMPT, EARLY)
    run_all(engine)
    engine.step()
    assert engine.audit.running
    engine.add(PROMPT, EARLY)  # takes the slot of the audit
    with pytest.raises(QueueFull):
        engine.add(PROMPT, EARLY)


def test_beside_requests_audits_run_few_rows_in_a_step() -> None:
    executor = FakeExecutor(num_positions=300)
    engine = audited_engine(executor)
    engine.add([1], GenerationParams(max_tokens=150, mode="early_exit"))
    run_all(engine)
    engine.add([2], GenerationParams(max_tokens=100))
    run_all(engine)
    assert [len(rows.tokens) for rows in audit_rows(executor)] == [32, 32, 32, 32, 22]
    assert not engine.audit.has_work


def test_where_too_many_wait_the_oldest_are_dropped() -> None:
    engine = make_engine(FakeExecutor(num_slots=1), audit=ExitAudit(1.0, max_waiting=2))
    ids = [engine.add([number] * 20, EARLY) for number in range(5)]
    results = run_all(engine)
    report = run_audits(engine)["none"]
    assert (report.num_audited, report.num_dropped) == (2, 3)
    assert report.loss_sum == pytest.approx(sum(expected_loss([n] * 20, results[ids[n]].token_ids) for n in (3, 4)))


def test_who_borrows_slots_may_have_those_of_audits() -> None:
    executor = FakeExecutor(num_slots=1)
    engine = make_engine(executor, audit=ExitAudit(1.0), prefill_chunk=4, costs=None)
    request_id = engine.add(PROMPT, EARLY)
    result: RequestResult = run_all(engine)[request_id]
    engine.step()
    assert engine.audit.running
    engine.prepare(GenerationParams(mode="self_speculative"))
    report = run_audits(engine)["none"]
    assert report.loss_sum == pytest.approx(expected_loss(PROMPT, result.token_ids))
