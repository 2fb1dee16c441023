"""Exit weights and temperatures: numbers worked out by hand."""

from __future__ import annotations

import pytest

from megatron.early_exit.checkpoint.exits import exits_of_layers, merged_exits
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.config.model import ModelConfig


def exits(**settings) -> ExitConfig:
    return ExitConfig(exit_layer_nums=(2, 4), **settings)


def test_default_weights_are_one_from_the_start():
    assert exits().weights_at(0) == (1.0, 1.0)
    assert exits(exit_layer_weight=(0.25, 0.5)).weights_at(0) == (0.25, 0.5)
    assert ExitConfig().weights_at(0) == ()


@pytest.mark.parametrize(
    ("style", "iteration", "expected"),
    [
        ("linear", 0, (0.0, 1.0)),
        ("linear", 1, (0.25, 0.875)),  # a quarter of the way from 0 to 1 and from 1 to 0.5
        ("linear", 2, (0.5, 0.75)),
        ("linear", 3, (0.75, 0.625)),
        ("linear", 4, (1.0, 0.5)),
        ("linear", 1000, (1.0, 0.5)),
        ("cosine", 0, (0.0, 1.0)),
        ("cosine", 1, (0.14644660940672624, 0.9267766952966369)),  # (1 - cos 45 degrees) / 2 of the way
        ("cosine", 2, (0.5, 0.75)),
        ("cosine", 3, (0.8535533905932737, 0.5732233047033631)),
        ("cosine", 4, (1.0, 0.5)),
    ],
)
def test_scheduled_weights(style, iteration, expected):
    config = exits(
        exit_layer_weight=(1.0, 0.5),
        exit_layer_weight_init=(0.0, 1.0),
        exit_layer_weight_warmup_iters=4,
        exit_layer_weight_warmup_style=style,
    )
    assert config.weights_at(iteration) == pytest.approx(expected)


def test_warmup_without_initial_weights_starts_at_zero_as_in_ee_llm():
    config = exits(exit_layer_weight=(0.2, 0.4), exit_layer_weight_warmup_iters=10)
    assert config.weights_at(0) == (0.0, 0.0)
    assert config.weights_at(5) == pytest.approx((0.1, 0.2))


@pytest.mark.parametrize(
    ("temperatures", "expected"), [((), [1.0, 1.0]), ((2.0,), [2.0, 2.0]), ((2.0, 0.5), [2.0, 0.5])]
)
def test_temperatures(temperatures, expected):
    config = exits(exit_layer_temperature=temperatures)
    assert [config.temperature_of(position) for position in range(2)] == expected


@pytest.mark.parametrize(
    ("fractions", "expected"), [((), [1.0, 1.0]), ((0.5,), [0.5, 0.5]), ((0.25, 1.0), [0.25, 1.0])]
)
def test_token_fractions(fractions, expected):
    config = exits(exit_loss_token_fraction=fractions)
    assert [config.token_fraction_of(position) for position in range(2)] == expected


@pytest.mark.parametrize(
    ("fractions", "text"),
    [
        ((), ""),
        ((1.0,), ""),
        ((0.5,), "losses over 0.5 of the tokens"),
        ((0.25, 1.0), "losses over 0.25, 1 of the tokens"),
    ],
)
def test_token_fractions_in_words(fractions, text):
    assert exits(exit_loss_token_fraction=fractions).described_token_fractions() == text


def test_index_of_an_exit():
    assert exits().index_of(4) == 1
    assert exits().index_of(3) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1024),
        ({"ffn_hidden_size": 100}, 100),
        ({"swiglu": True}, 640),  # 8 x 256 / 3 = 682.7, down to a multiple of 64 as in Megatron
        ({"hidden_size": 4096, "swiglu": True}, 10880),
        ({"hidden_size": 16, "swiglu": True}, 64),
    ],
)
def test_mlp_width_after_defaults(settings, expected):
    sizes = {"num_layers": 2, "hidden_size": 256, "num_attention_heads": 8}
    assert ModelConfig(**(sizes | settings)).ffn_size == expected


def test_exits_that_are_merged_or_left_out_keep_their_token_fractions():
    present, wanted = exits(exit_loss_token_fraction=(0.5,)), ExitConfig((3,), exit_loss_token_fraction=(0.25,))
    both = merged_exits(present, wanted, (2, 3, 4))
    assert both.exit_loss_token_fraction == (0.5, 0.25, 0.5)
    assert exits_of_layers(both, (3, 4)).exit_loss_token_fraction == (0.25, 0.5)
