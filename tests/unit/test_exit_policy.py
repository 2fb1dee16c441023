"""Which exits are asked and when they are taken, and how input that does not fit the model is refused."""

from __future__ import annotations

import pytest

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.inference.engine.exit_policy import ExitPolicy
from megatron.early_exit.inference.protocol import ExitThreshold

EXITS = ExitConfig(exit_layer_nums=(2, 4, 7))


def should_exit(policy: ExitPolicy, layer: int, confidence: float) -> bool:
    """What a worker does with the threshold of an exit."""
    return ExitThreshold(0, policy.thresholds[policy.exit_layers.index(layer)]).is_reached(confidence)


def test_one_threshold_serves_all_exits():
    policy = ExitPolicy.for_model(EXITS, [0.5])
    assert policy == ExitPolicy(exit_layers=(2, 4, 7), thresholds=(0.5, 0.5, 0.5))


def test_thresholds_follow_the_order_of_the_named_exits():
    assert ExitPolicy.for_model(EXITS, [0.9, 0.1], [7, 2]) == ExitPolicy((2, 7), (0.1, 0.9))
    assert ExitPolicy.for_model(EXITS, [0.1, 0.2, 0.3]) == ExitPolicy((2, 4, 7), (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("threshold", "confidence", "exits"),
    [
        (0.5, 0.49999, False),
        (0.5, 0.5, True),
        (0.5, 0.6, True),
        (1.0, 0.9999999, False),
        (1.0, 1.0, True),  # the probability rounded to 1
        (1.0000001, 1.0, False),
        (40.0, 1.0, False),
        (0.0, 0.0, True),
        (-1.0, 0.0, True),
        (float("inf"), 1.0, False),
    ],
)
def test_exit_from_the_threshold_on(threshold, confidence, exits):
    assert should_exit(ExitPolicy.for_model(EXITS, [threshold]), 4, confidence) is exits


def test_each_exit_has_its_own_threshold():
    policy = ExitPolicy.for_model(EXITS, [0.9, 0.3], [2, 4])
    assert not should_exit(policy, 2, 0.5)
    assert should_exit(policy, 4, 0.5)


@pytest.mark.parametrize(
    ("exits", "thresholds", "exit_layers", "message"),
    [
        (EXITS, [0.5], [2, 3, 9], "no exit named 3 9; its exits are 2 4 7"),
        (EXITS, [0.5], [2, 2], "twice"),
        (EXITS, [0.5, 0.6], [], "2 values for 3 exits"),
        (EXITS, [0.5, 0.6], [4], "2 values for 1 exits"),
        (EXITS, [], [], "0 values"),
        (EXITS, [float("nan")], [], "not a number"),
        (ExitConfig(), [0.5], [], "the model has no exits"),
    ],
)
def test_what_does_not_fit_is_refused(exits, thresholds, exit_layers, message):
    with pytest.raises(ValueError, match=message):
        ExitPolicy.for_model(exits, thresholds, exit_layers)
