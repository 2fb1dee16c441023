"""Losses and gradients of every parameter equal a single-process reference in plain autograd, in every layout."""

from __future__ import annotations

import pytest
import torch

from tests.configs import MIXED_HEADS, make_config
from tests.distributed.parallel_model import compare_with_reference
from tests.distributed.workers import run_distributed

TP2 = {"tensor_model_parallel_size": 2}
SP2 = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VP2 = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
LAYOUTS = {
    "single": (1, {}),
    "tp2": (2, TP2),
    "sp2": (2, SP2),
    "pp2": (2, PP2),
    "pp2_vp2": (2, VP2),
    "dp2": (2, {}),
    "pp3": (3, {"pipeline_model_parallel_size": 3, "num_layers": 6, "exit_layer_nums": (2, 4)}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "tp2_pp2": (4, {**TP2, **PP2}),
    "sp2_pp2": (4, {**SP2, **PP2}),
    "dp2_pp2_vp2": (4, VP2),
}
HEADS = {
    "tied": {},
    "tied_norm": {"use_exit_norm": True},
    "untied": {"untie_exit_output_weights": True},
    "untied_norm": {"untie_exit_output_weights": True, "use_exit_norm": True},
    "mlp": {"use_exit_mlp": True, "use_exit_norm": True},
    "mlp_untied": {"use_exit_mlp": True, "untie_exit_output_weights": True},
    "block": {"use_exit_block": True, "use_exit_norm": True, "untie_exit_output_weights": True},
    "block_tied": {"use_exit_block": True},
    "pre_exit": {"pre_exit": True, "use_exit_norm": True},
    "mixed": MIXED_HEADS,
    "mixed_pre_exit": {
        "pre_exit": True,
        "exit_layer_nums": (1, 2, 4),
        "exit_layer_weight": (0.2, 0.7, 0.4),
        "use_exit_block": (True, False, False),
        "use_exit_norm": (False, True, True),
        "untie_exit_output_weights": (True, False, True),
    },
}
GPT2_STYLE = {
    "swiglu": False, "normalization": "LayerNorm", "position_embedding_type": "learned_absolute",
    "add_bias_linear": True, "group_query_attention": False, "num_query_groups": 1,
}  # fmt: skip


def check(world_size: int, *, num_microbatches: int = 4, run: dict | None = None, **settings: object) -> None:
    run_distributed(
        world_size,
        compare_with_reference,
        cfg=make_config(**settings),
        num_microbatches=num_microbatches,
        **(run or {}),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    check(world_size, **settings)


UNEVEN = {
    # An exit that ends a stage, and one behind it on the same stage as the final head.
    "pp2_first": (2, {**PP2, "decoder_first_pipeline_num_layers": 1, "exit_layer_nums": (1, 3)}),
    "pp2_last": (2, {**PP2, "num_layers": 5, "decoder_last_pipeline_num_layers": 2, "exit_layer_nums": (1, 3)}),
    # Both exits of one stage, which they begin.
    "pp2_pre_exit": (2, {**PP2, "decoder_first_pipeline_num_layers": 1, "exit_layer_nums": (2, 3), "pre_exit": True}),
    "pp4_ends": (4, {"pipeline_model_parallel_size": 4, "num_layers": 7, "decoder_first_pipeline_num_layers": 2,
                     "decoder_last_pipeline_num_layers": 1, "exit_layer_nums": (2, 4, 7)}),
    "pp4_layout": (4, {"pipeline_model_parallel_size": 4, "num_layers": 8, "exit_layer_nums": (1, 4, 5),
                       "pipeline_model_parallel_layout": "Et|t*3|t|tttL"}),
    "pp2_vp2": (2, {**PP2, "num_layers": 7, "exit_layer_nums": (2, 3, 6),
                    "pipeline_model_parallel_layout": "Ett|t|t*3|tL"}),
    "pp2_vp2_pre_exit": (2, {**PP2, "num_layers": 7, "exit_layer_nums": (3, 4, 7), "pre_exit": True,
                             "pipeline_model_parallel_layout": "Ett|t|t*3|tL"}),
    "tp2_pp2": (4, {**SP2, **PP2, "num_layers": 5, "decoder_first_pipeline_num_layers": 3}),
}  # fmt: skip


@pytest.mark.parametrize("head", ["tied", "mixed_heads"])
@pytest.mark.parametrize("layout", UNEVEN)
def test_stages_of_different_sizes(layout: str, head: str) -> None:
    world_size, settings = UNEVEN[layout]
    count = len(settings.get("exit_layer_nums", (2, 3)))
    heads = {} if head == "tied" else {
        "use_exit_norm": (True, *(False,) * (count - 1)), "untie_exit_output_weights": (*(False,) * (count - 1), True),
        "use_exit_block": (*(False,) * (count - 1), True),
    }  # fmt: skip
    check(world_size, **settings, **heads, exit_layer_weight=(0.3, 0.6, 0.2)[:count])


@pytest.mark.parametrize("settings", [
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    {"overlap_grad_reduce": True},
    {"calculate_per_token_loss": True, "untie_embeddings_and_output_weights": True},
], ids=str)  # fmt: skip
def test_stages_of_different_sizes_with_recomputation_and_reduction(settings: dict) -> None:
    check(2, **UNEVEN["pp2_vp2"][1], **settings, exit_layer_weight=(0.3, 0.6, 0.2))
    check(2, **UNEVEN["pp2_last"][1], **settings)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("layout", ["single", "sp2", "pp2_vp2"])
def test_head_types(layout: str, head: str) -> None:
    world_size, settings = LAYOUTS[layout]
    check(world_size, **settings, **HEADS[head])


@pytest.mark.parametrize("layout", ["tp2", "pp2", "pp3", "pp2_vp2", "dp2_pp2_vp2"])
def test_untied_word_embeddings_with_tied_exits(layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    check(world_size, untie_embeddings_and_output_weights=True, **settings)


@pytest.mark.parametrize("layout", ["single", "tp2", "sp2", "pp2"])
@pytest.mark.parametrize("head", ["tied", "mlp", "block"])
def test_gpt2_style_layers_with_biases_and_learned_positions(layout: str, head: str) -> None:
    world_size, settings = LAYOUTS[layout]
    check(world_size, **settings, **GPT2_STYLE, **HEADS[head])


@pytest.mark.parametrize("settings", [
    {"rotary_percent": 0.5},
    {"rotary_base": 500},
    {"kv_channels": 16},
    {"add_qkv_bias": True},
    {"group_query_attention": False, "num_query_groups": 1},
    {"norm_epsilon": 0.1},
    {"position_embedding_type": "learned_absolute", "max_position_embeddings": 20},
], ids=str)  # fmt: skip
def test_architecture_options(settings: dict) -> None:
    check(2, **TP2, **settings)


@pytest.mark.parametrize("layout", ["single", "tp2", "sp2", "pp2"])
def test_dynamic_token_weights_use_the_full_vocabulary(layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    check(world_size, use_dynamic_exit_layer_weight=True, **settings)


def test_exit_temperatures() -> None:
    check(2, **TP2, exit_layer_temperature=(0.5, 2.0), use_dynamic_exit_layer_weight=True)


@pytest.mark.parametrize("exits", [(1,), (4,), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", ["pp2", "pp4", "pp2_vp2"])
def test_exits_on_any_layer_the_last_one_included(layout: str, exits: tuple[int, ...]) -> None:
    world_size, settings = LAYOUTS[layout]
    check(world_size, **settings, exit_layer_nums=exits, exit_layer_weight=(0.3,) * len(exits))


@pytest.mark.parametrize("layout", ["tp2_pp2", "pp2_vp2"])
def test_pre_exit_on_the_first_layer_of_a_stage_and_on_the_embedding(layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    check(world_size, **settings, exit_layer_nums=(1, 3), pre_exit=True, exit_layer_weight=(0.3, 0.6))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layout", ["single", "pp2", "pp2_vp2"])
@pytest.mark.parametrize("head", ["tied", "mlp", "block", "mixed"])
def test_full_recompute_with_eight_different_microbatches(layout: str, head: str, overlap: bool) -> None:
    world_size, settings = LAYOUTS[layout]
    check(
        world_size, num_microbatches=8, run={"iterations": 2}, **settings, **HEADS[head], overlap_grad_reduce=overlap,
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1,
    )  # fmt: skip


@pytest.mark.parametrize("recompute", [
    {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    {"recompute_granularity": "selective"},
], ids=str)  # fmt: skip
def test_other_recomputation(recompute: dict) -> None:
    check(2, **PP2, **recompute)


@pytest.mark.parametrize("layout", ["single", "pp2", "dp2"])
def test_per_token_loss_with_unequal_masks(layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    check(world_size, calculate_per_token_loss=True, **settings)


@pytest.mark.parametrize("layout", ["single", "pp2", "dp2_pp2_vp2"])
def test_weight_zero_in_the_first_iterations_with_overlapped_reduction(layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    check(world_size, run={"iterations": 3, "weights": (0.0, 0.0)}, overlap_grad_reduce=True, **settings)
    # The second iteration of the same processes, now with weights, must still reduce everything.
    check(world_size, run={"iterations": 3}, overlap_grad_reduce=True, **settings)


def test_more_microbatches_than_stages_and_fewer() -> None:
    check(4, num_microbatches=7, **LAYOUTS["pp4"][1])
    check(4, num_microbatches=2, **LAYOUTS["pp4"][1])


def test_no_attention_across_documents() -> None:
    """A mask of --reset-attention-mask reaches every stage."""
    length = make_config().training.seq_length
    forbidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    forbidden[5:, :5] = True
    mask = forbidden.expand(2, 1, length, length)
    check(2, run={"attention_mask": mask}, **PP2)


def test_no_exits_is_plain_gpt() -> None:
    check(2, exit_layer_nums=(), exit_layer_weight=(), **PP2)
