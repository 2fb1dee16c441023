"""What `--data-path` and `--split` mean."""

from __future__ import annotations

import pytest

from megatron.early_exit.config.data import parse_blend, split_shares


def test_parse_blend() -> None:
    assert parse_blend(["a"]) == (["a"], None)
    assert parse_blend(["a", "b", "c", "d"]) == (["a", "b", "c", "d"], None)
    assert parse_blend(["0.3", "a", "0.7", "b"]) == (["a", "b"], [0.3, 0.7])
    for bad in (["0.3", "a", "b"], ["0.3", "a", "b", "0.7"], ["a", "0.3"], ["0.3"], ["1", "2"]):
        with pytest.raises(ValueError, match="a blend is PREFIX"):
            parse_blend(bad)
    for bad in (["0", "a", "1", "b"], ["-1", "a", "2", "b"], ["nan", "a", "2", "b"]):
        with pytest.raises(ValueError, match="weights must be positive"):
            parse_blend(bad)
    with pytest.raises(ValueError, match="each prefix once"):
        parse_blend(["a", "a"])
    assert parse_blend([]) == ([], None)


@pytest.mark.parametrize("split", ["969,30,1", "969, 30, 1", "969/30/1", "969 30 1"])
def test_split(split: str) -> None:
    assert split_shares(split) == [969, 30, 1]


def test_missing_shares_are_0() -> None:
    assert split_shares("1") == [1, 0, 0]
    assert split_shares("0.9,0.1") == [0.9, 0.1, 0]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("", "up to three shares"),
        ("1,x", "up to three shares"),
        ("1,1,1,1", "up to three shares"),
        ("1,-1", "up to three shares"),
        ("1,inf", "up to three shares"),
        ("0,1,0", "leaves nothing for training"),
    ],
)
def test_broken_split(split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_shares(split)
