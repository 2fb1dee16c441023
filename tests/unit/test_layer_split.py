"""How layers are split over the stages of a pipeline: by flags, by Megatron's layouts, and back to flags."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.layer_split import layer_numbers, layout_text, parse_layout, split_flags
from megatron.early_exit.config.parallel import ParallelConfig
from megatron.early_exit.config.validate import problems
from tests.configs import make_config, make_settings

FIRST, LAST, LAYOUT, VIRTUAL = (
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout",
    "num_layers_per_virtual_pipeline_stage",
)  # fmt: skip
splits = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(tuple)


def counts_of_core(layout: str) -> tuple[int, ...]:
    return tuple(stage.count(LayerType.decoder) for stage in PipelineParallelLayerLayout.parse_str_to_list(layout))


@pytest.mark.parametrize(("layout", "counts"), [
    ("EtL", (1,)),
    ("Ett|tL", (2, 1)),
    ("Et*3|(tt|)*2,tL", (3, 2, 2, 1)),
    ("E,t*7|(t*8|)*14t*7,L", (7, *(8,) * 14, 7)),
    ("Et(t|t)*3L", (2, 2, 2, 1)),
    ("Et|*1tL", (1, 1)),
    ("Et*10|tL", (10, 1)),
])  # fmt: skip
def test_layouts_say_what_core_reads(layout: str, counts: tuple[int, ...]) -> None:
    assert parse_layout(layout) == counts == counts_of_core(layout)


@st.composite
def layouts(draw: st.DrawFn) -> str:
    """Texts with repetitions of letters and groups, of which core's parser makes something as well."""
    times = st.integers(1, 3).map(lambda count: f"*{count}")
    letter = st.builds(lambda word, more: word + more, st.sampled_from("t|"), st.one_of(st.just(""), times))
    group = st.builds(lambda words, more: f"({''.join(words)}){more}", st.lists(letter, min_size=1, max_size=3), times)
    middle = draw(st.lists(st.one_of(letter, group, st.just(",")), max_size=6))
    return f"E{''.join(middle)}L"


@given(layouts())
def test_any_layout_is_read_as_core_reads_it_or_refused(layout: str) -> None:
    try:
        counts = parse_layout(layout)
    except ValueError as error:
        assert "has no layer" in str(error) and 0 in counts_of_core(layout)
    else:
        assert counts == counts_of_core(layout)


@given(splits)
def test_a_split_is_read_back_from_its_text(counts: tuple[int, ...]) -> None:
    assert parse_layout(layout_text(counts)) == counts == counts_of_core(layout_text(counts))
    assert [number for layers in layer_numbers(counts) for number in layers] == list(range(1, sum(counts) + 1))


@given(st.integers(1, 4).flatmap(lambda ranks: st.tuples(
    st.just(ranks),
    st.one_of(
        st.lists(st.integers(1, 3), min_size=ranks, max_size=ranks),
        st.lists(st.integers(1, 3), min_size=2 * ranks, max_size=2 * ranks) if ranks > 1 else st.just([5]),
    ).map(tuple),
)))  # fmt: skip
def test_flags_of_a_split_ask_for_it(case: tuple[int, tuple[int, ...]]) -> None:
    num_ranks, counts = case
    flags = split_flags(counts, num_ranks)
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
    values = [int(value) if value.isdigit() else value for value in flags[1::2]]
    parallel = ParallelConfig(pipeline_model_parallel_size=num_ranks, **dict(zip(names, values, strict=True)))
    assert parallel.layers_per_stage(sum(counts)) == counts


@pytest.mark.parametrize(("counts", "num_ranks", "flags"), [
    ((4, 4), 2, ""),
    ((3, 5), 2, "--decoder-first-pipeline-num-layers 3"),
    ((7, 8, 8, 7), 4, "--decoder-first-pipeline-num-layers 7 --decoder-last-pipeline-num-layers 7"),
    ((8, 8, 8, 7), 4, "--decoder-last-pipeline-num-layers 7"),
    ((7, 8, 8), 3, "--decoder-first-pipeline-num-layers 7"),
    ((8, 7, 9, 8), 4, "--pipeline-model-parallel-layout Et*8|t*7|t*9|t*8L"),
    ((2, 2, 2, 2), 2, "--num-layers-per-virtual-pipeline-stage 2"),
    ((2, 1, 2, 2), 2, "--pipeline-model-parallel-layout Et*2|t|t*2|t*2L"),
    ((7, *(8,) * 5, 7, 8), 8, "--pipeline-model-parallel-layout Et*7|(t*8|)*5t*7|t*8L"),
])  # fmt: skip
def test_the_simplest_flags_that_say_a_split(counts: tuple[int, ...], num_ranks: int, flags: str) -> None:
    assert " ".join(split_flags(counts, num_ranks)) == flags


@pytest.mark.parametrize(("num_layers", "num_ranks", "settings", "counts"), [
    (8, 2, {}, (4, 4)),
    (8, 2, {VIRTUAL: 2}, (2, 2, 2, 2)),
    (8, 2, {FIRST: 3}, (3, 5)),
    (8, 2, {LAST: 3}, (5, 3)),
    (8, 2, {FIRST: 3, LAST: 5}, (3, 5)),
    (8, 4, {FIRST: 2}, (2, 2, 2, 2)),
    (126, 16, {FIRST: 7, LAST: 7}, (7, *(8,) * 14, 7)),
    (9, 4, {FIRST: 3}, (3, 2, 2, 2)),
    (7, 2, {LAYOUT: "Ett|t|ttt|tL"}, (2, 1, 3, 1)),
    (3, 1, {LAYOUT: "Et*3L"}, (3,)),
])  # fmt: skip
def test_layers_of_every_stage(num_layers: int, num_ranks: int, settings: dict, counts: tuple[int, ...]) -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=num_ranks, **settings)
    assert parallel.layers_per_stage(num_layers) == counts
    assert parallel.num_model_chunks(num_layers) == len(counts) // num_ranks


@pytest.mark.parametrize(("num_ranks", "settings", "words"), [
    (3, {}, ["--num-layers 4 is not divisible by --pipeline-model-parallel-size 3", "--decoder-first-pipeline"]),
    (1, {FIRST: 2}, ["--decoder-first-pipeline-num-layers 2", "--pipeline-model-parallel-size 1: one stage has all"]),
    (2, {FIRST: 4}, ["--decoder-first-pipeline-num-layers 4", "0 layers are left for 1 stage"]),
    (2, {LAST: 7}, ["--decoder-last-pipeline-num-layers 7", "0 layers are left for 1 stage"]),
    (2, {LAST: 0}, ["--decoder-last-pipeline-num-layers 0: must be at least 1"]),
    (2, {FIRST: 1, LAST: 2}, ["3 layers on 2 stages, not --num-layers 4"]),
    (3, {FIRST: 1}, ["3 layers are left for 2 stages of equal size", "--pipeline-model-parallel-layout"]),
    (2, {FIRST: 1, VIRTUAL: 1}, ["--num-layers-per-virtual-pipeline-stage 1", "--pipeline-model-parallel-layout"]),
    (2, {LAYOUT: "Ett|ttL", VIRTUAL: 1}, ["Ett|ttL with --num-layers-per-virtual-pipeline-stage 1: the layout says"]),
    (2, {LAYOUT: "Ett|ttL", FIRST: 2}, ["with --decoder-first-pipeline-num-layers 2", "give one of them"]),
    (2, {LAYOUT: "Ett|tL"}, ["3 layers, not --num-layers 4"]),
    (2, {LAYOUT: "Et|t|ttL"}, ["3 stages, no multiple of --pipeline-model-parallel-size 2"]),
    (1, {LAYOUT: "Ett|ttL"}, ["2 stages with --pipeline-model-parallel-size 1"]),
    (2, {LAYOUT: "E|ttttL"}, ["stage 0 has no layer"]),
    (2, {LAYOUT: "Etttt|L"}, ["stage 1 has no layer"]),
    (2, {LAYOUT: "Et*4|mL"}, ["multi-token prediction"]),
    (2, {LAYOUT: "tt|EttL"}, ["embedding (E) stands once, at the beginning"]),
    (2, {LAYOUT: "Ett|Ltt"}, ["loss (L) stands once, at the end"]),
    (2, {LAYOUT: "Ett|ttLL"}, ["loss (L) stands once"]),
    (2, {LAYOUT: "Etx|ttL"}, ["'x|ttL' is no part of a layout"]),
    (2, {LAYOUT: "E(tt)|ttL"}, ["'(tt)|ttL' is no part of a layout"]),
    (2, {LAYOUT: "E(t*90000)*90000|L"}, ["more than 100,000 layers"]),
    (2, {LAYOUT: ""}, ["embedding (E)"]),
    (2, {FIRST: 3, "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3},
     ["--recompute-num-layers 3 does not divide the 1 layers"]),
])  # fmt: skip
def test_what_cannot_be_split(num_ranks: int, settings: dict, words: list[str]) -> None:
    settings = {**settings, "pipeline_model_parallel_size": num_ranks, "mock_data": True, "train_iters": 1}
    found = problems(make_settings(**settings), num_ranks)
    assert len(found) == 1 and all(word in found[0] for word in words), found
    with pytest.raises(ConfigError, match=re.escape(words[0])):
        make_config(**settings)


@pytest.mark.parametrize(("settings", "word"), [
    ({"tune_exit": True, "use_exit_norm": True, "pretrained_checkpoint": "x"}, "forward passes need no interleaving"),
    ({"fill_explicit_bubbles": True}, "both together are not supported"),
    ({"global_batch_size": 6}, "drop --pipeline-model-parallel-layout with several stages on a rank"),
])  # fmt: skip
def test_interleaving_by_a_layout_has_the_limits_of_interleaving(settings: dict, word: str) -> None:
    settings = {"mock_data": True, "train_iters": 1, "num_layers": 5, "global_batch_size": 8, **settings}
    found = problems(
        make_settings(**settings, pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|tt|t|tL"), 2
    )
    assert [problem for problem in found if word in problem], found


def test_what_follows_from_the_layers_of_a_stage() -> None:
    config = make_config(
        num_layers=9, pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=3, exit_layer_nums=(3, 4, 8)
    )
    assert config.layers_per_stage == (3, 2, 2, 2) and config.exit_stages == (0, 1, 3)
    assert config.build.stage_layers == (range(1, 4), range(4, 6), range(6, 8), range(8, 10))
    tuned = make_config(
        num_layers=9, pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=3, exit_layer_nums=(1, 4),
        tune_exit=True, use_exit_norm=True, pretrained_checkpoint="x", tune_exit_pipeline_parallel_size=2,
    )  # fmt: skip
    assert tuned.num_stages_with_exits == 2 and tuned.build.stage_layers == (range(1, 4), range(4, 5))
    interleaved = make_config(
        num_layers=7, pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Ett|t|ttt|tL",
        exit_layer_nums=(3, 7),
    )  # fmt: skip
    assert interleaved.exit_stages == (1, 3)
