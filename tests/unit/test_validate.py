"""Cross-field checks: each impossible combination gives one problem that names the values, and good ones give none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.fields import build_settings, config_fields
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.settings import RunSettings
from megatron.early_exit.config.validate import problems, validate, warnings

BASE = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "lr": 1e-3,
    "train_iters": 100,
    "mock_data": True,
    "vocab_size": 128,
}


def config(**settings) -> RunSettings:
    """The base run with changes; None leaves a base setting out."""
    return build_settings({name: value for name, value in (BASE | settings).items() if value is not None})


def only_problem(world_size: int = 1, **settings) -> str:
    found = problems(config(**settings), world_size)
    assert len(found) == 1, found
    return found[0]


def test_base_run_is_fine():
    assert problems(config(), 1) == []
    assert warnings(config()) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"exit_layer_nums": (0,)}, ["no layer 0", "1 to --num-layers 4"]),
        ({"exit_layer_nums": (2, 9)}, ["--exit-layer-nums 2 9", "no layer 9"]),
        ({"exit_layer_nums": (2, 2)}, ["2 stands twice", "give 2"]),
        ({"exit_layer_nums": (3, 2)}, ["not ascending", "give 2 3"]),
        ({"exit_layer_nums": (2, 3), "exit_layer_weight": (0.5,)}, ["--exit-layer-weight has 1 values for 2 exits"]),
        (
            {"exit_layer_nums": (2,), "exit_layer_weight_init": (0.5, 1.0), "exit_layer_weight_warmup_iters": 5},
            ["--exit-layer-weight-init has 2 values for 1 exits"],
        ),
        ({"exit_layer_nums": (2,), "exit_layer_weight_init": (0.5,)}, ["never used without", "warmup-iters"]),
        ({"exit_layer_nums": (2,), "exit_layer_weight": (-0.5,)}, ["-0.5", "cannot be negative"]),
        ({"exit_layer_nums": (1, 2, 3), "exit_layer_temperature": (1.0, 2.0)}, ["2 values for 3 exits", "1 or 3"]),
        ({"exit_layer_nums": (2,), "exit_layer_temperature": (0.0,)}, ["greater than 0"]),
        ({"exit_layer_nums": (1, 2, 3), "exit_loss_token_fraction": (1.0, 0.5)}, ["2 values for 3 exits", "1 or 3"]),
        ({"exit_layer_nums": (1, 2), "exit_loss_token_fraction": (1.0, 0.0)}, ["fraction 1.0 0.0", "greater than 0"]),
        ({"exit_layer_nums": (2,), "exit_loss_token_fraction": (1.5,)}, ["fraction 1.5", "at most 1"]),
        ({"exit_layer_nums": (2,), "exit_loss_token_fraction": (float("nan"),)}, ["fraction nan"]),
        ({"exit_loss_token_fraction": (0.5,)}, ["--exit-loss-token-fraction without exits"]),
        ({"exit_layer_nums": (2,), "use_exit_mlp": True, "pre_exit": True}, ["--use-exit-mlp with --pre-exit"]),
        ({"exit_layer_nums": (2,), "use_exit_mlp": True, "use_exit_block": True}, ["not both"]),
        (
            {"exit_layer_nums": (1, 2, 3), "use_exit_block": (True, False)},
            ["--use-exit-block has 2 values for 3 exits: give 1 or 3"],
        ),
        ({"exit_layer_nums": (2,), "exit_uses": ("draft", "leave")}, ["--exit-uses has 2 values for 1 exits: give 1"]),
        (
            {"exit_layer_nums": (1, 2, 3), "use_exit_mlp": (False, True, True), "use_exit_block": (True, False, True)},
            ["--use-exit-mlp with --use-exit-block (exit 3)"],
        ),
        (
            {"exit_layer_nums": (1, 2, 3), "use_exit_mlp": (False, True, True), "pre_exit": True},
            ["--use-exit-mlp with --pre-exit (exits 2, 3)"],
        ),
        ({"exit_uses": ("draft",)}, ["--exit-uses without exits"]),
        ({"use_dynamic_exit_layer_weight": True}, ["--use-dynamic-exit-layer-weight without exits"]),
        ({"pre_exit": True, "use_exit_norm": True}, ["--pre-exit, --use-exit-norm without exits"]),
        ({"exit_layer_nums": (2,), "exit_layer_weight_warmup_iters": -1}, ["warmup-iters -1", "at least 0"]),
    ],
)
def test_exits(settings, expected):
    problem = only_problem(**settings)
    assert all(part in problem for part in expected), problem


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_attention_heads": 3}, ["--hidden-size 64", "--num-attention-heads 3"]),
        (
            {"group_query_attention": True, "num_query_groups": 3},
            ["--num-attention-heads 4", "--num-query-groups 3"],
        ),
        ({"max_position_embeddings": 16}, ["--max-position-embeddings 16", "--seq-length 32"]),
        ({"position_embedding_type": "rope", "kv_channels": 5}, ["5 channels"]),
        ({"position_embedding_type": "rope", "rotary_percent": 0.2}, ["3 channels", "0.2"]),
        ({"rotary_percent": 1.5}, ["--rotary-percent 1.5"]),
        ({"hidden_dropout": 1.0}, ["--hidden-dropout 1.0", "less than 1"]),
        ({"padded_vocab_size": 0}, ["--padded-vocab-size 0", "at least 1"]),
        ({"padded_vocab_size": 64}, ["--padded-vocab-size 64", "--vocab-size 128"]),
        ({"norm_epsilon": 0.0}, ["--norm-epsilon", "greater than 0"]),
    ],
)
def test_model(settings, expected):
    problem = only_problem(**settings)
    assert all(part in problem for part in expected), problem


@pytest.mark.parametrize(
    ("world_size", "settings", "expected"),
    [
        (3, {"tensor_model_parallel_size": 2}, ["3 ranks", "(2) x", "= 2"]),
        (1, {"pipeline_model_parallel_size": 2}, ["1 ranks", "= 2"]),
        (3, {"pipeline_model_parallel_size": 3}, ["--num-layers 4", "--pipeline-model-parallel-size 3"]),
        (8, {"tensor_model_parallel_size": 8}, ["--num-attention-heads 4", "--tensor-model-parallel-size 8"]),
        (
            4,
            {"tensor_model_parallel_size": 4, "group_query_attention": True, "num_query_groups": 2},
            ["--num-query-groups 2", "size 4"],
        ),
        (2, {"tensor_model_parallel_size": 2, "ffn_hidden_size": 129}, ["MLP width", "129"]),
        (2, {"tensor_model_parallel_size": 2, "padded_vocab_size": 129}, ["--padded-vocab-size 129"]),
        (
            2,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 33},
            ["--seq-length 33", "--sequence-parallel"],
        ),
        (1, {"sequence_parallel": True}, ["--sequence-parallel needs"]),
        (1, {"num_layers_per_virtual_pipeline_stage": 1}, ["no pipeline to interleave"]),
        (
            2,
            {"pipeline_model_parallel_size": 2, "num_layers": 8, "num_layers_per_virtual_pipeline_stage": 3},
            ["stage 3", "4 layers of a stage"],
        ),
        (
            2,
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1, "global_batch_size": 3},
            ["gives 3 microbatches", "multiple of --pipeline-model-parallel-size 2"],
        ),
        (1, {"recompute_granularity": "full"}, ["--recompute-method", "--recompute-num-layers"]),
        (1, {"recompute_method": "uniform"}, ["--recompute-method uniform", "--recompute-granularity full"]),
        (
            1,
            {"recompute_granularity": "selective", "recompute_num_layers": 1},
            ["--recompute-num-layers 1", "only used with"],
        ),
        (
            1,
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3},
            ["--recompute-num-layers 3", "4 layers of a model chunk"],
        ),
        (1, {"use_distributed_optimizer": True, "optimizer": "sgd"}, ["--optimizer sgd"]),
    ],
)
def test_layout(world_size, settings, expected):
    problem = only_problem(world_size, **settings)
    assert all(part in problem for part in expected), problem


@pytest.mark.parametrize(
    ("world_size", "settings", "expected"),
    [
        (2, {"global_batch_size": 3}, ["--global-batch-size 3", "data-parallel size (2)", "= 2"]),
        (1, {"global_batch_size": 8, "rampup_batch_size": (2, 2)}, ["START INCREMENT SAMPLES", "2 values"]),
        (1, {"global_batch_size": 8, "rampup_batch_size": (8, 2, 100)}, ["starts at 8", "less than"]),
        (1, {"global_batch_size": 8, "rampup_batch_size": (2, 4, 100)}, ["4 does not divide", "8 - 2 = 6"]),
        (1, {"global_batch_size": 8, "rampup_batch_size": (2, 2, 0)}, ["at least 1"]),
        (2, {"global_batch_size": 8, "rampup_batch_size": (2, 3, 9)}, ["2 and 3 must be divisible", "= 2"]),
        (1, {"train_iters": None, "train_samples": 4, "global_batch_size": 8}, ["--train-samples 4", "of 8"]),
    ],
)
def test_batches(world_size, settings, expected):
    problem = only_problem(world_size, **settings)
    assert all(part in problem for part in expected), problem


def test_every_batch_of_a_ramp_must_suit_the_interleaved_schedule():
    settings = {
        "pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 1,
        "global_batch_size": 8,
        "train_iters": None,
        "train_samples": 1000,
    }
    assert problems(config(**settings, rampup_batch_size=(2, 2, 100)), 2) == []
    assert "global batch of 3" in only_problem(2, **settings, rampup_batch_size=(2, 1, 100))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train_iters": None}, ["give --train-iters or --train-samples"]),
        ({"train_samples": 100}, ["--train-iters 100 and --train-samples 100", "give one"]),
        ({"lr": 0.0}, ["--lr 0.0", "greater than 0"]),
        ({"min_lr": 0.1}, ["--min-lr 0.1 is greater than --lr 0.001"]),
        ({"lr_warmup_iters": 100}, ["--lr-warmup-iters 100", "100 iters"]),
        ({"lr_warmup_iters": 50, "lr_decay_iters": 20}, ["--lr-warmup-iters 50", "20 iters"]),
        ({"lr_warmup_iters": 5, "lr_warmup_fraction": 0.1}, ["give one"]),
        ({"lr_warmup_fraction": 1.0}, ["--lr-warmup-fraction 1.0", "less than 1"]),
        ({"lr_decay_samples": 50}, ["--lr-decay-samples 50 with --train-iters", "--lr-decay-iters"]),
        (
            {"train_iters": None, "train_samples": 1000, "lr_warmup_iters": 5},
            ["--lr-warmup-iters 5 with --train-samples"],
        ),
        ({"clip_grad": -1.0}, ["--clip-grad -1.0", "at least 0"]),
        ({"bf16": True, "fp16": True}, ["--bf16 and --fp16"]),
        ({"exit_duration_in_mins": 0.0}, ["--exit-duration-in-mins 0.0", "greater than 0"]),
        (
            {"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True},
            ["contradict"],
        ),
        ({"wandb_exp_name": "a"}, ["--wandb-exp-name without --wandb-project"]),
    ],
)
def test_training(settings, expected):
    problem = only_problem(**settings)
    assert all(part in problem for part in expected), problem


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mock_data": False, "tokenizer_type": "NullTokenizer"}, ["no data"]),
        ({"data_path": ("a",)}, ["--data-path and --mock-data", "one source"]),
        (
            {"mock_data": False, "tokenizer_type": "NullTokenizer", "data_path": ("0.5", "a", "b", "c")},
            ["a blend is PREFIX PREFIX"],
        ),
        (
            {"mock_data": False, "tokenizer_type": "NullTokenizer", "valid_data_path": ("a",)},
            ["--valid-data-path without --train-data-path"],
        ),
        (
            {"mock_data": False, "data_path": ("a",), "split": "100,0,0", "tokenizer_type": "NullTokenizer"},
            ["--eval-iters 100 asks for validation, but --split 100,0,0 leaves it no data"],
        ),
        (
            {"mock_data": False, "train_data_path": ("a",), "tokenizer_type": "NullTokenizer"},
            ["--eval-iters 100 asks for validation, but --valid-data-path is missing"],
        ),
        ({"split": "1,2,3,4"}, ["--split 1,2,3,4"]),
        ({"split": "0,1"}, ["leaves nothing for training"]),
        ({"vocab_size": None}, ["--mock-data", "--vocab-size"]),
        ({"mock_data": False, "data_path": ("a",)}, ["HuggingFaceTokenizer needs --tokenizer-model"]),
        (
            {"mock_data": False, "data_path": ("a",), "tokenizer_model": "/nowhere/tok"},
            ["--tokenizer-model /nowhere/tok: no such"],
        ),
        (
            {"mock_data": False, "data_path": ("a",), "tokenizer_model": __file__},
            [__file__, "needs the folder"],
        ),
        (
            {
                "mock_data": False,
                "data_path": ("a",),
                "tokenizer_type": "SentencePieceTokenizer",
                "tokenizer_model": "/",
            },
            ["needs the .model file"],
        ),
        (
            {"mock_data": False, "data_path": ("a",), "tokenizer_type": "NullTokenizer", "vocab_size": None},
            ["NullTokenizer needs --vocab-size"],
        ),
    ],
)
def test_data(settings, expected):
    problem = only_problem(**settings)
    assert all(part in problem for part in expected), problem


def test_save_interval_needs_save():
    assert "--save-interval 5 without --save" in only_problem(save_interval=5)
    assert "--keep-last 0" in only_problem(keep_last=0, save="x")


def test_load_must_exist_unless_it_is_the_folder_to_save_to(tmp_path):
    empty = str(tmp_path / "run")
    assert f"--load {empty}: no such folder" in only_problem(load=empty)
    assert problems(config(load=empty, save=empty), 1) == []
    assert problems(config(load=empty, save=empty + "/"), 1) == []
    assert "no such folder" in only_problem(load=empty, save=empty, exit_on_missing_checkpoint=True)
    assert "no such folder" in only_problem(load=empty, save=empty, load_iteration=5)
    (tmp_path / "run").mkdir()
    assert "latest_checkpointed_iteration.txt is missing" in only_problem(load=empty)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("5")
    assert problems(config(load=empty), 1) == []
    assert "iter_0000004 is missing" in only_problem(load=empty, load_iteration=4)


def test_finetune_needs_a_checkpoint():
    assert "--finetune without --load" in only_problem(finetune=True)


def test_a_config_of_contradictions_cannot_be_made():
    """From Python too, and after every replace."""
    config_of = lambda **settings: RunConfig(**vars(config(**settings)))
    with pytest.raises(ConfigError) as error:
        config_of(exit_layer_nums=(9,), bf16=True, fp16=True, hidden_size=65)
    assert len(error.value.problems) == 3
    good = config_of(exit_layer_nums=(2,))
    for changed in (
        {"exits": replace(good.exits, exit_layer_nums=(99,))},
        {"exits": replace(good.exits, exit_layer_weight=(1.0, 2.0))},
        {"model": replace(good.model, num_layers=0)},
        {"training": replace(good.training, bf16=True, fp16=True)},
        {"parallel": replace(good.parallel, recompute_granularity="full")},
        {"pipeline": replace(good.pipeline, exits_in_bubbles=True)},
    ):
        with pytest.raises(ConfigError):
            replace(good, **changed)
    with pytest.raises(ConfigError):
        replace(good.resolved(128), exits=replace(good.exits, exit_layer_nums=(99,)))
    # What files and the number of ranks decide is checked when the run starts.
    assert replace(good, checkpoint=replace(good.checkpoint, load="nowhere")).checkpoint.load == "nowhere"


def test_all_problems_are_raised_together():
    with pytest.raises(ConfigError) as error:
        validate(config(exit_layer_nums=(9,), bf16=True, fp16=True, global_batch_size=3), 2)
    assert len(error.value.problems) == 3
    assert all(problem in str(error.value) for problem in error.value.problems)
    assert isinstance(error.value, ValueError)


def test_absurd_sizes_are_reported_not_divided_by():
    assert len(problems(config(num_attention_heads=0, micro_batch_size=0, pipeline_model_parallel_size=0), 1)) == 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_query_groups": 2}, "--num-query-groups 2 has no effect"),
        ({"rotary_base": 500000}, "--rotary-base"),
        ({"add_qkv_bias": True}, "--add-qkv-bias"),
        ({"apply_query_key_layer_scaling": True}, "--apply-query-key-layer-scaling"),
        ({"exit_layer_nums": (4,)}, "exit after layer 4"),
        ({"exit_layer_nums": (1,), "pre_exit": True}, "exit before layer 1"),
        ({"exit_layer_nums": (1,), "exit_layer_weight_warmup_style": "cosine"}, "-warmup-style"),
        ({"loss_scale": 2.0}, "--loss-scale 2.0"),
        ({"keep_last": 2, "async_save": True}, "--keep-last, --async-save: no effect without --save"),
        ({"exit_interval": 5}, "--exit-interval will stop the run without saving"),
        ({"no_load_rng": True}, "--no-load-rng: no effect without --load"),
        ({"rampup_batch_size": (1, 1, 10), "global_batch_size": 2}, "--rampup-batch-size with --train-iters"),
    ],
)
def test_settings_without_effect_are_warned_about(settings, expected):
    cfg = config(**settings)
    assert problems(cfg, 1) == []
    found = warnings(cfg)
    assert len(found) == 1 and expected in found[0], found


def test_ranges_stand_at_the_fields():
    bounds = {field.name: [bound.words for bound in field.bounds] for field in config_fields()}
    assert bounds["num_layers"] == ["at least 1", "at most 10000"]
    assert bounds["kv_channels"] == ["at least 1"]  # may be left open
    assert bounds["lr_warmup_fraction"] == ["at least 0 and less than 1"]
    assert bounds["save"] == bounds["exit_layer_nums"] == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_layers": 20_000}, "--num-layers 20000: must be at most 10000"),
        ({"num_layers": 10**40}, f"--num-layers {10**40}: must be at most 10000"),
        ({"seed": 2**63}, f"--seed {2**63}: must be at most {2**63 - 1}"),
        ({"exit_layer_nums": (2, 2**63)}, f"--exit-layer-nums {2**63}: must be at most {2**63 - 1}"),
        ({"clip_grad": float("nan")}, "--clip-grad nan: must be at least 0"),
        ({"distributed_timeout_minutes": 0.01}, "--distributed-timeout-minutes 0.01: must be at least 1/60 (a second)"),
        ({"kv_channels": 0, "lr": -1.0}, "--kv-channels 0: must be at least 1"),
    ],
)
def test_values_out_of_range(settings, expected):
    assert problems(config(**settings), 1)[0].startswith(expected)
