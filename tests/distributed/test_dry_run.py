"""What --dry-run says of a model is what is then built."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.settings import with_tuned_stages
from megatron.early_exit.training.dry_run import describe, stages
from tests.configs import MIXED_HEADS, VOCAB_SIZE, make_config
from tests.distributed.workers import run_distributed
from tests.reference_checkpoint import HEADS, STYLES

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}


def built(cfg: RunConfig) -> tuple[int, list[int], int, int]:
    """(stage, numbers of layers, parameters, trained parameters) of this rank."""
    from megatron.core import parallel_state

    from megatron.early_exit.model.build import build_model
    from tests.distributed.parallel_model import layout

    with layout(cfg):
        model = build_model(cfg, VOCAB_SIZE)
        parameters = [parameter for chunk in model.chunks for parameter in chunk.parameters()]
        return (
            parallel_state.get_pipeline_model_parallel_rank(),
            [layer.layer_number for chunk in model.chunks for layer in chunk.decoder.layers],
            sum(parameter.numel() for parameter in parameters),
            sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        )


@pytest.mark.parametrize(("world_size", "changes"), [
    *((1, HEADS[head]) for head in HEADS if head != "mixed"),
    (1, MIXED_HEADS),
    (2, {**PP2, **MIXED_HEADS}),
    (2, {"tune_exit": True, **PP2, **MIXED_HEADS}),
    *((1, STYLES[style]) for style in STYLES),
    (1, {"qk_layernorm": True}),
    (2, {**TP2, **HEADS["mlp"]}),
    (2, {**TP2, **STYLES["gpt2"], **HEADS["block"]}),
    (2, {**PP2, **HEADS["untied_norm"]}),
    (2, {**PP2, "untie_embeddings_and_output_weights": True}),
    (2, {**PP2, "num_layers_per_virtual_pipeline_stage": 1}),
    (2, {**PP2, "decoder_first_pipeline_num_layers": 1, **HEADS["untied_norm"]}),
    (2, {**PP2, "num_layers": 7, "pipeline_model_parallel_layout": "Ett|t|t*3|tL", "exit_layer_nums": (3, 6)}),
    (2, {"tune_exit": True, "pipeline_model_parallel_size": 3, "num_layers": 7, "pipeline_model_parallel_layout":
         "Et|ttt|t*3L", **HEADS["untied_norm"]}),
    (1, {"tune_exit": True, **HEADS["mlp"]}),
    (2, {"tune_exit": True, **PP2, **HEADS["untied_norm"]}),
    (3, {"tune_exit": True, "pipeline_model_parallel_size": 4, "use_exit_norm": True}),
    (2, {"tune_exit": True, "tune_exit_distillation": 0.5, **PP2, **HEADS["untied_norm"], "exit_layer_nums": (1, 3)}),
    (1, {"tune_exit": True, "tune_exit_distillation": 0.5, **PP2, **HEADS["untied_norm"], "exit_layer_nums": (1, 2),
         "untie_embeddings_and_output_weights": True, "tune_exit_pipeline_parallel_size": 1,
         "cache_hidden_states": "x"}),
], ids=str)  # fmt: skip
def test_parameters_are_counted(world_size: int, changes: dict[str, Any]) -> None:
    cfg = make_config(**changes).resolved(VOCAB_SIZE)
    cfg = with_tuned_stages(cfg) if cfg.training.tune_exit else cfg
    estimates = stages(cfg, world_size)
    for stage, layers, parameters, trained in run_distributed(world_size, built, cfg=cfg):
        one = estimates[stage]
        assert list(one.layers) == layers
        assert (one.parameters, one.trained) == (parameters, trained)
        assert one.weight_bytes == 4 * parameters and one.optimizer_bytes == 8 * trained


def test_logits_of_exits_that_learn_from_some_tokens() -> None:
    """A microbatch has 24 tokens; the last stage has the final head, which sees all."""
    split = {**PP2, "exit_layer_nums": (1, 3)}
    bytes_of = lambda **changes: [
        stage.activation_bytes for stage in stages(make_config(**split, **changes).resolved(VOCAB_SIZE), world_size=2)
    ]
    (first, last), (fewer, same) = bytes_of(), bytes_of(exit_loss_token_fraction=(0.25,))
    assert first - fewer == (24 - 6) * VOCAB_SIZE * 4 and last == same


def test_what_is_printed() -> None:
    cfg = make_config(
        train_iters=10, global_batch_size=8, pipeline_model_parallel_size=2, bf16=True, exit_layer_nums=(1, 3)
    )
    text = describe(cfg, world_size=4)
    for part in (
        "4 ranks = TP 1 x PP 2 x DP 2", "8 sequences of 12 tokens = 96 tokens, 2 microbatches of 2 on each replica",
        "10 iterations, 960 tokens", "vocabulary  96 rows", "layers 1 to 2; exits 1;", "layers 3 to 4; exits 3;",
    ):  # fmt: skip
        assert part in text
