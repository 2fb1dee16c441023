"""Monitor of a promised risk: its evidence by hand, false alarms no more often than promised, real ones soon."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import count

import pytest

from megatron.early_exit.inference.engine.risk_monitor import RiskMonitor


def losses_until_alarm(draw: Callable[[], float], alpha: float, delta: float, most: int = 100_000) -> int:
    monitor = RiskMonitor(alpha, delta)
    return next(number for number in count(1) if monitor.observe(draw()) or number == most)


def test_evidence_by_hand() -> None:
    monitor = RiskMonitor(0.1, delta=0.01)
    first_bet = 0.05 / (0.1 / 8 + 0.05**2)  # half of alpha above it; the variance that is pretended
    monitor.observe(0.4)
    assert monitor.evidence == pytest.approx(1 + first_bet * 0.3)
    mean = 0.1 + 0.3 / 21
    variance = 20 / 21 * (0.1 / 8 + 0.3**2 / 21)
    excess = max(mean - 0.1, 0.05)
    before = monitor.evidence
    monitor.observe(0.0)
    assert monitor.evidence == pytest.approx(before * (1 - excess / (variance + excess**2) * 0.1))
    for _ in range(30):
        monitor.observe(0.0)
    low = monitor.evidence
    assert low < 1
    monitor.observe(0.1)  # a loss of just alpha: the evidence restarts at 1
    assert monitor.evidence == 1
    assert (monitor.num_losses, monitor.num_alarms) == (33, 0)
    assert monitor.mean_loss == pytest.approx(0.5 / 33)


@pytest.mark.parametrize("loss", [0.0, 0.009, 0.01])
def test_evidence_is_never_all_lost(loss: float) -> None:
    """Equal losses teach a variance of nearly 0, by which alone bets would take more than there is."""
    monitor = RiskMonitor(0.01)
    for _ in range(3000):
        monitor.observe(loss)
        assert 0.5 <= monitor.evidence <= 1
    assert monitor.num_alarms == 0


def test_an_alarm_starts_anew() -> None:
    monitor = RiskMonitor(0.01, delta=0.05)
    alarms = [monitor.observe(0.2) for _ in range(20)]
    assert alarms.count(True) == monitor.num_alarms > 1
    assert not alarms[alarms.index(True) + 1]
    monitor = RiskMonitor(0.01, delta=0.05)
    while not monitor.observe(0.2):
        assert 1 < monitor.evidence < 20
    assert monitor.evidence == 1


@pytest.mark.parametrize("law", ["binary", "tokens", "whole_answers"])
@pytest.mark.parametrize(("alpha", "delta"), [(0.05, 0.05), (0.2, 0.2)])
def test_false_alarms_are_as_far_apart_as_promised(law: str, alpha: float, delta: float) -> None:
    """The mean of 400 runs, less three standard errors, would have to exceed 1 / delta to prove more; it must not prove
    less. And the promise is not empty: at this risk alarms do come."""
    generator = random.Random(law)
    draw = {
        "binary": lambda: float(generator.random() < alpha),
        "tokens": lambda: sum(generator.random() < alpha for _ in range(16)) / 16,
        "whole_answers": lambda: 0.5 * (generator.random() < 2 * alpha),
    }[law]
    runs = [losses_until_alarm(draw, alpha, delta, most=5000) for _ in range(400)]
    mean = sum(runs) / len(runs)
    error = math.sqrt(sum((run - mean) ** 2 for run in runs)) / len(runs)
    assert mean + 3 * error >= 1 / delta
    assert min(runs) < 5000


def test_a_broken_promise_is_noticed_whatever_came_before() -> None:
    generator = random.Random(1)
    good = lambda: sum(generator.random() < 0.0025 for _ in range(64)) / 64
    bad = lambda: sum(generator.random() < 0.03 for _ in range(64)) / 64
    delays = []
    for _ in range(30):
        monitor = RiskMonitor(0.01)
        assert not any(monitor.observe(good()) for _ in range(2000))
        delays.append(next(number for number in count(1) if monitor.observe(bad())))
    assert sorted(delays)[15] <= 30


@pytest.mark.parametrize("loss", [-0.1, 1.1, math.nan])
def test_what_is_no_loss_is_refused_and_changes_nothing(loss: float) -> None:
    monitor = RiskMonitor(0.1)
    with pytest.raises(ValueError, match="a loss lies in"):
        monitor.observe(loss)
    assert (monitor.num_losses, monitor.evidence, monitor.mean_loss) == (0, 1.0, 0.0)


@pytest.mark.parametrize(("alpha", "delta"), [(0.0, 0.1), (1.0, 0.1), (0.1, 0.0), (math.nan, 0.1)])
def test_impossible_promises_are_refused(alpha: float, delta: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        RiskMonitor(alpha, delta)
