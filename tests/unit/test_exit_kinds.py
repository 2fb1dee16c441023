"""What the heads of a model's exits are made of, and what each exit is for."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.early_exit.config import exits as exits_module
from megatron.early_exit.config.data import DataConfig
from megatron.early_exit.config.description import EXIT_STRUCTURE_FIELDS
from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.exits import ExitConfig, ExitHeadKind, exit_kind_problems, head_settings
from megatron.early_exit.config.flags import parse_run_config
from megatron.early_exit.config.serialize import from_dict, to_dict
from megatron.early_exit.inference.params import GenerationParams
from megatron.early_exit.inference.protocol import ExitDescription, WorkerDescription
from megatron.early_exit.server import page, run
from megatron.early_exit.server.engine_messages import Ready
from megatron.early_exit.server.openai_api import models

BASE = "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 8 --lr 1e-3 --train-iters 1 --mock-data"
KINDS = [
    kind for parts in itertools.product((False, True), repeat=len(dataclasses.fields(ExitHeadKind)))
    if not ((kind := ExitHeadKind(*parts)).mlp and kind.block)
]  # fmt: skip


def parse(flags: str):
    return parse_run_config(f"{BASE} --vocab-size 100 {flags}".split(), world_size=1, warn=lambda _: None)


def exits(flags: str) -> ExitConfig:
    return parse(f"--exit-layer-nums 1 2 3 {flags}").exits


def test_one_value_for_all_or_one_for_each() -> None:
    one = exits("--use-exit-block true false false --use-exit-norm --untie-exit-output-weights false")
    assert one.heads == (ExitHeadKind(norm=True, block=True), ExitHeadKind(norm=True), ExitHeadKind(norm=True))
    assert exits("--use-exit-norm true true true") == exits("--use-exit-norm true") == exits("--use-exit-norm")
    assert exits("--use-exit-norm").use_exit_norm is True
    assert exits("--use-exit-norm --no-use-exit-norm") == exits("")
    assert one.heads_of((2, 3, 7)) == one.heads[1:]


def test_uses() -> None:
    one = exits("--exit-uses draft leave both")
    assert [one.use_of(index) for index in range(3)] == ["draft", "leave", "both"]
    assert [one.may_leave(index) for index in range(3)] == [False, True, True]
    assert [one.may_draft(index) for index in range(3)] == [True, False, True]
    assert exits("--exit-uses both both both") == exits("--exit-uses both") == exits("")
    assert exits("--exit-uses draft draft draft") == exits("--exit-uses draft") != exits("")
    assert exits("--exit-uses draft").use_of(2) == "draft"


def test_yaml_and_flags_say_the_same(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "use-exit-block: [true, false, false]\nexits: {use_exit_norm: true, exit_uses: [draft, leave, both]}"
    )
    flags = "--use-exit-block true false false --use-exit-norm --exit-uses draft leave both"
    assert exits(f"--config {path}") == exits(flags)


@pytest.mark.parametrize(("flags", "problem"), [
    ("--use-exit-norm yes", "--use-exit-norm: expected true or false, got 'yes'"),
    ("--use-exit-norm true false", "--use-exit-norm has 2 values for 3 exits: give 1 or 3"),
    ("--use-exit-norm true false --tune-exit --load x", "--use-exit-norm has 2 values for 3 exits: give 1 or 3"),
    ("--exit-uses speculate", "--exit-uses: expected one of leave, draft, both, got 'speculate'"),
    ("--exit-uses", "--exit-uses: a value is missing"),
])  # fmt: skip
def test_values_that_are_none(flags: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        exits(flags)
    assert problem in str(caught.value)


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), st.data())
@settings(deadline=None)  # the first example pays for what is imported
def test_heads_are_kept_whatever_their_kinds(kinds: list[ExitHeadKind], data: st.DataObject) -> None:
    """From heads to settings, to plain data of a YAML file, and back."""
    uses = tuple(data.draw(st.sampled_from(("leave", "draft", "both"))) for _ in kinds)
    layers = tuple(range(1, len(kinds) + 1))
    one = ExitConfig(exit_layer_nums=layers, exit_uses=uses, **head_settings(kinds))
    assert one.heads == tuple(kinds)
    assert tuple(map(one.use_of, range(len(kinds)))) == uses
    assert list(exit_kind_problems(one)) == []
    cfg = dataclasses.replace(parse("--exit-layer-nums 1"), exits=one)
    assert from_dict(to_dict(cfg)).exits == one


def test_heads_in_words() -> None:
    assert exits("--use-exit-norm").described_heads() == "head = norm + shared output projection"
    mixed = exits(
        "--use-exit-mlp false true false --untie-exit-output-weights false false true --exit-uses draft leave both"
    )
    assert mixed.described_heads() == (
        "head of 1 = shared output projection, 2 = MLP branch + shared output projection, 3 = own output projection;"
        " use of 1 = draft, 2 = leave, 3 = both"
    )


def test_what_a_server_says_of_uses() -> None:
    """In the API, to the page, and when it starts."""
    model = WorkerDescription(
        4, 8, 50, tuple(ExitDescription(layer, layer, False, use) for layer, use in ((1, "draft"), (2, "leave"))), 2, 64
    )
    config = ExitConfig(exit_layer_nums=(1, 2), exit_uses=("draft", "leave"))
    ready = Ready(
        description=model, exits=config, ends=(), tokenizer=DataConfig(), calibrated=(), checkpoint="folder",
        iteration=0, memory="", stages="",
    )  # fmt: skip
    loaded = SimpleNamespace(ready=ready, tokenizer=SimpleNamespace(chat_template=None))
    server = SimpleNamespace(defaults=GenerationParams(), chat_template=None)
    context = SimpleNamespace(model_name="m", started=0.0, config=server, ready_model=lambda: loaded)
    described = models._model(context)
    assert (described.exit_layers, described.exit_uses) == ([1, 2], ["draft", "leave"])
    of_page = page._describe(context)
    assert (of_page.exit_layers, of_page.leaving_layers, of_page.drafting_layers) == ([1, 2], [2], [1])
    assert (of_page.defaults.exit_layers, of_page.defaults.draft_exit) == ([2], 1)
    assert "exits 1 (draft), 2 (leave)" in run._in_words(loaded, "m")


def test_every_part_of_a_head_is_compared_with_a_checkpoint_s() -> None:
    assert {*exits_module._SETTING_OF_PART} == {field.name for field in dataclasses.fields(ExitHeadKind)}
    assert {*exits_module._SETTING_OF_PART.values()} <= set(EXIT_STRUCTURE_FIELDS)
