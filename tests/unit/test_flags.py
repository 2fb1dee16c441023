"""Flags, YAML and saved configurations: what carries over from Megatron-LM and EE-LLM, and what is refused by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.description import ModelDescription, architecture_differences
from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.config.fields import config_fields, field_docs, flag_of, inverse_flag_of, section_classes
from megatron.early_exit.config.flag_notes import ALIASES, IGNORED, REFUSED
from megatron.early_exit.config.flag_parser import build_parser, known_flags
from megatron.early_exit.config.flags import parse_run_config
from megatron.early_exit.config.overlay import overlay_architecture
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.config.saved_description import checkpoint_description, save_description
from megatron.early_exit.config.serialize import from_dict, load_run_config, save_run_config, to_dict
from megatron.early_exit.config.values import type_name
from megatron.early_exit.data.tokenizer_files import save_tokenizer

ROOT = Path(__file__).resolve().parents[2]

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --lr 1e-3 --train-iters 100"
    " --mock-data --vocab-size 128"
)


def parse(flags: str = "", world_size: int = 1, base: str = BASE) -> RunConfig:
    """Settings of the base run with `flags`; ignored flags and settings without effect fail."""
    return parse_run_config(f"{base} {flags}".split(), world_size=world_size, warn=pytest.fail)


def problems_of(flags: str = "", world_size: int = 1, base: str = BASE) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse_run_config(f"{base} {flags}".split(), world_size=world_size, warn=lambda message: None)
    return error.value.problems


def warnings_of(flags: str, world_size: int = 1) -> list[str]:
    messages: list[str] = []
    parse_run_config(f"{BASE} {flags}".split(), world_size=world_size, warn=messages.append)
    return messages


# Every field has a flag that sets it

# Values that fit the base run, for flags that are not free to take just any value.
EXAMPLE_VALUES = {
    "hidden_size": "128",
    "num_attention_heads": "8",
    "num_query_groups": "2",
    "ffn_hidden_size": "100",
    "max_position_embeddings": "99",
    "padded_vocab_size": "256",
    "vocab_size": "100",
    "rotary_percent": "0.5",
    "hidden_dropout": "0.25",
    "attention_dropout": "0.25",
    "adam_beta1": "0.25",
    "adam_beta2": "0.25",
    "lr_warmup_fraction": "0.25",
    "split": "1,2,3",
    "rampup_batch_size": "2 2 10",
}


def example_of(field) -> str:
    name = type_name(field.annotation)
    if name.startswith("one of"):
        return name.rsplit(", ", 1)[1] if field.default != name.rsplit(", ", 1)[1] else name.split()[2].rstrip(",")
    examples = {"an integer": "7", "a number": "0.125", "text": "word", "true or false": ""}
    if name.startswith("true or false, or a list"):
        return "true false"
    if name.startswith("a list (one of"):
        return "leave draft"
    lists = {"a list (an integer each)": "1 2", "a list (a number each)": "0.5 0.25", "a list (text each)": "1 a 2 b"}
    return EXAMPLE_VALUES.get(field.name) or (examples | lists)[name]


@pytest.mark.parametrize("field", config_fields(), ids=lambda field: field.name)
def test_every_field_is_set_by_its_flag(field):
    """The parser alone: cross-field checks have tests of their own."""
    flag, example = flag_of(field.name), example_of(field)
    texts = vars(build_parser().parse_args([flag, *example.split()]))
    expected = example.split() if "a list" in type_name(field.annotation) else example
    if field.annotation is bool:
        expected = "false" if field.default else "true"
    assert texts == {field.name: expected}


def test_field_names_are_unique_over_sections():
    names = [field.name for field in config_fields()]
    assert len(names) == len(set(names))
    assert len(names) == sum(len(dataclasses.fields(section)) for section in section_classes().values())


def test_every_field_is_documented():
    docs = {name: doc for section in section_classes().values() for name, doc in field_docs(section).items()}
    assert [field.name for field in config_fields() if len(docs.get(field.name, "")) < 10] == []


def test_the_flag_list_of_the_documentation_is_known():
    """Every flag that the project promised, by name."""
    promised = """tensor-model-parallel-size pipeline-model-parallel-size num-layers-per-virtual-pipeline-stage
        sequence-parallel use-distributed-optimizer num-layers hidden-size ffn-hidden-size num-attention-heads
        group-query-attention num-query-groups seq-length max-position-embeddings micro-batch-size global-batch-size
        rampup-batch-size lr min-lr lr-decay-style lr-decay-iters lr-warmup-iters lr-warmup-fraction train-iters
        train-samples weight-decay adam-beta1 adam-beta2 adam-eps init-method-std clip-grad bf16 fp16
        disable-bias-linear normalization position-embedding-type swiglu untie-embeddings-and-output-weights
        make-vocab-size-divisible-by padded-vocab-size query-key-layer-scaling use-checkpoint-args load-iteration
        recompute-granularity recompute-method recompute-num-layers seed data-path train-data-path valid-data-path
        test-data-path split data-cache-path tokenizer-type tokenizer-model save load save-interval finetune
        no-load-optim no-load-rng exit-interval exit-duration-in-mins exit-signal-handler eval-interval eval-iters
        log-interval log-timers-to-tracker tensorboard-dir wandb-project wandb-group wandb-exp-name exit-layer-nums
        exit-layer-weight exit-layer-weight-init exit-layer-weight-warmup-iters exit-layer-weight-warmup-style
        exit-layer-temperature use-exit-norm use-exit-mlp use-exit-block untie-exit-output-weights pre-exit
        use-dynamic-exit-layer-weight rotary-base rotary-percent reset-position-ids reset-attention-mask
        transformer-impl config"""
    assert {f"--{name}" for name in promised.split()} <= set(known_flags())
    assert warnings_of("--use-flash-attn")[0].startswith("--use-flash-attn is ignored: attention always")


# The command line


def test_values_have_their_types():
    cfg = parse(
        "--exit-layer-nums 2 3 --exit-layer-weight 0.25 0.5 --pre-exit --disable-bias-linear --adam-eps=1e-5"
        " --seed 7 --wandb-project p"
    )
    assert cfg.exits.exit_layer_nums == (2, 3)
    assert cfg.exits.exit_layer_weight == (0.25, 0.5)
    assert cfg.exits.pre_exit is True
    assert cfg.model.add_bias_linear is False
    assert cfg.optimizer.adam_eps == 1e-5
    assert cfg.training.seed == 7
    assert cfg.logging.wandb_project == "p"
    assert cfg.parallel == type(cfg.parallel)()


def test_last_flag_wins():
    assert parse("--seed 1 --seed 2").training.seed == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--exit-layer-num 2", "unknown flag --exit-layer-num; did you mean --exit-layer-nums?"),
        ("--num_workers 2", "unknown flag --num_workers; did you mean --num-workers?"),
        ("--qqqqq", "unknown flag --qqqqq"),
        ("--seed x", "--seed: expected an integer, got 'x'"),
        ("--seed 1.5", "--seed: expected an integer, got '1.5'"),
        ("--min-lr nan", "--min-lr: expected a number, got 'nan'"),
        ("--exit-layer-nums 2,3", "--exit-layer-nums: expected an integer, got '2,3'"),
        ("--normalization rms", "--normalization: expected one of LayerNorm, RMSNorm, got 'rms'"),
        ("--save", "--save: a value is missing: is a shell variable not set?"),
        ("--save=", "--save: the text is empty: is a shell variable not set?"),
        ("--bf16 true", "--bf16 true: too many values for this flag"),
        ("--seed 1 2", "--seed 1 2: too many values for this flag"),
        ("--min-lr -1e-5", "--min-lr -1e-05: must be at least 0"),
        ("--tokenizer-type GPT2BPETokenizer", "give HuggingFaceTokenizer and a folder"),
        ("--config /nowhere.yaml", "--config: cannot read /nowhere.yaml"),
    ],
)
def test_bad_words(flags, expected):
    (problem,) = problems_of(flags)
    assert expected in problem


def test_missing_sizes_are_named():
    (problem,) = problems_of(base="--hidden-size 64 --train-iters 5")
    assert problem.startswith("missing: --num-layers, --num-attention-heads, --seq-length, --lr ")


def test_problems_of_all_kinds_are_reported_together():
    problems = problems_of("--num-experts 8 --sead 3 --fp8-format hybrid --exit-layer-nums 9 --global-batch-size 3", 2)
    assert len(problems) == 5
    for expected in (
        "--num-experts 8 is refused",
        "--sead",
        "--fp8-format hybrid",
        "no layer 9",
        "--global-batch-size",
    ):
        assert any(expected in problem for problem in problems)


@pytest.mark.parametrize("note", REFUSED, ids=lambda note: note.flag)
def test_refused_flags_give_their_reason(note):
    flag = note.flag.replace("*", "x")
    (problem,) = problems_of(f"{flag} 77")
    assert flag in problem and "is refused" in problem and note.reason in problem
    for value in note.harmless_values:
        assert parse(f"{flag} {value}") == parse()


@pytest.mark.parametrize("note", IGNORED, ids=lambda note: note.flag)
def test_ignored_flags_change_nothing_and_say_why(note):
    flag = note.flag.replace("*", "x")
    for words in (flag, f"{flag} 1"):
        (message,) = warnings_of(words)
        assert message == f"{flag} is ignored: {note.reason}"


def test_notes_and_aliases_hide_no_flag_of_ours():
    own = {flag_of(field.name) for field in config_fields()} | {inverse_flag_of(f.name) for f in config_fields()}
    assert own.isdisjoint(note.flag for note in (*IGNORED, *REFUSED))
    assert own.isdisjoint(alias.flag for alias in ALIASES)


@pytest.mark.parametrize(
    ("alias", "flags"),
    [
        ("--layernorm-epsilon 1e-6", "--norm-epsilon 1e-6"),
        ("--use-rotary-position-embeddings", "--position-embedding-type rope"),
        ("--recompute-activations", "--recompute-granularity selective"),
        ("--log-timers-to-tensorboard", "--log-timers-to-tracker"),
        ("--override-opt_param-scheduler", "--override-opt-param-scheduler"),
        ("--use-checkpoint-opt_param-scheduler", "--use-checkpoint-opt-param-scheduler"),
        ("--no-query-key-layer-scaling", ""),
    ],
)
def test_aliases(alias, flags):
    assert parse(alias) == parse(flags)


def test_query_key_layer_scaling_is_an_alias():
    cfg = parse_run_config(f"{BASE} --query-key-layer-scaling".split(), world_size=1, warn=lambda message: None)
    assert cfg.model.apply_query_key_layer_scaling


def test_no_position_embedding_is_harmless_with_rope_only():
    (message,) = warnings_of("--no-position-embedding --position-embedding-type rope")
    assert message.startswith("--no-position-embedding is ignored")
    (problem,) = problems_of("--no-position-embedding")
    assert problem.startswith("--no-position-embedding is refused")


def test_sequence_parallel_alone_is_turned_off_with_a_warning():
    (message,) = warnings_of("--sequence-parallel")
    assert "--sequence-parallel is turned off" in message
    assert parse("--sequence-parallel --tensor-model-parallel-size 2", world_size=2).parallel.sequence_parallel


def test_load_iteration_zero_is_the_last_one():
    assert parse("--load-iteration 0").checkpoint.load_iteration is None


def test_help_prints_and_exits(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run_config(["--help"], world_size=1)
    assert stop.value.code == 0
    assert "--exit-layer-nums N [N ...]" in capsys.readouterr().out


EE_LLM_7B = """--tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --num-layers 32 --hidden-size 4096
    --num-attention-heads 32 --seq-length 2048 --max-position-embeddings 2048 --sequence-parallel --micro-batch-size 2
    --global-batch-size 2048 --lr 0.0003 --train-iters 192000 --lr-decay-style cosine --min-lr 3.0e-5
    --weight-decay 1e-1 --lr-warmup-iters 2000 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.01
    --clip-grad 1.0 --bf16 --disable-bias-linear --use-flash-attn --normalization RMSNorm
    --position-embedding-type rope --swiglu --untie-embeddings-and-output-weights --untie-exit-output-weights
    --exit-layer-nums 9 17 --exit-layer-weight 0.1 0.2 --pre-exit --data-path 0.0362 arxiv 0.0657 books
    --tokenizer-type SentencePieceTokenizer --tokenizer-model TOKENIZER --split 990,9,1 --log-interval 2
    --log-timers-to-tracker --save-interval 2400 --eval-interval 1200 --eval-iters 10 --wandb-project EE-LLM
    --wandb-group g --wandb-exp-name r --save run --load run"""


def test_the_launch_script_of_the_7b_model_carries_over(tmp_path):
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.touch()
    messages: list[str] = []
    words = EE_LLM_7B.replace("TOKENIZER", str(tokenizer)).split()
    cfg = parse_run_config(words, world_size=16, warn=messages.append)
    assert [message.split()[0] for message in messages] == ["--use-flash-attn", "--sequence-parallel"]
    assert cfg.exits.exit_layer_nums == (9, 17) and cfg.exits.pre_exit
    assert cfg.model.ffn_size == 10880
    assert cfg.data.data_path == ("0.0362", "arxiv", "0.0657", "books")
    assert cfg.parallel.data_parallel_size(16) == 4


# YAML


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_yaml_flat_nested_and_flag_names(tmp_path):
    path = write(
        tmp_path / "run.yaml",
        """
num-layers: 4
hidden_size: 64
disable-bias-linear: true
layernorm-epsilon: 1e-6
use-rotary-position-embeddings: true
optimizer: sgd
lr: 3e-4
exits: {exit_layer_nums: [2], exit-layer-weight: 1}
training:
  seq_length: 32
  train_iters: 100
mock-data: true
vocab-size: 128
data_path: null
loss-scale:
train-data-path: []
""".replace("data_path: null\n", ""),
    )
    cfg = parse(f"--config {path} --num-attention-heads 4", base="")
    assert cfg.model.add_bias_linear is False
    assert cfg.model.norm_epsilon == 1e-6
    assert cfg.model.position_embedding_type == "rope"
    assert cfg.optimizer.optimizer == "sgd" and cfg.optimizer.lr == 3e-4
    assert cfg.exits.exit_layer_nums == (2,) and cfg.exits.exit_layer_weight == (1.0,)
    assert cfg.training.loss_scale is None


def test_flags_win_over_yaml_wherever_they_stand(tmp_path):
    path = write(tmp_path / "run.yaml", "seed: 1\nbf16: true\ndisable-bias-linear: true\nno_load_optim: false\n")
    assert parse(f"--config {path}").training.seed == 1
    cfg = parse(f"--seed 2 --config {path} --no-bf16 --add-bias-linear")
    assert (cfg.training.seed, cfg.training.bf16, cfg.model.add_bias_linear) == (2, False, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sede: 1", "sede: unknown key; did you mean seed?"),
        ("exits: {exit_layer_num: [2]}", "exits.exit_layer_num: unknown key; did you mean exit_layer_nums?"),
        ("training: {exit_layer_nums: [2]}", "training.exit_layer_nums: belongs below exits, not training"),
        ("training: 3", "training: expected names and values below it, got 3"),
        ("seed: abc", "seed: expected an integer, got 'abc' (str)"),
        ("seed: 1.0", "seed: expected an integer, got 1.0 (float)"),
        ("seed: true", "seed: expected an integer, got True (bool)"),
        ("seed:", "seed: expected an integer, got nothing"),
        ("min-lr: '1e-5'", "min-lr: expected a number, got '1e-5' (str)"),
        ("min-lr: .inf", "min-lr: expected a finite number"),
        ("save: 7", "save: expected text, got 7 (int)"),
        ("bf16: 1", "bf16: expected true or false, got 1 (int)"),
        ("disable-bias-linear: 1", "disable-bias-linear: expected true or false, got 1"),
        ("normalization: rms", "normalization: expected one of LayerNorm, RMSNorm"),
        ("exit_layer_nums: [2, x]", "exit_layer_nums: expected an integer, got 'x'"),
        ("seed: 1\nseed: 2", "the key 'seed' stands twice"),
        ("seed: 1\ntraining: {seed: 2}", "training.seed: seed stands twice in the file"),
        ("[1, 2]", "expected names and values at the top level"),
        ("a: [", "is not valid YAML"),
        ("num-experts: 8", "--num-experts 8 is refused"),
        ("multi-latent-attention: true", "--multi-latent-attention is refused"),
    ],
)
def test_bad_yaml(tmp_path, text, expected):
    path = write(tmp_path / "run.yaml", text)
    (problem,) = problems_of(f"--config {path}")
    assert expected in problem
    assert path in problem or "is refused" in problem


def test_yaml_values_of_foreign_flags_that_change_nothing(tmp_path):
    path = write(
        tmp_path / "run.yaml", "multi-latent-attention: false\ncontext-parallel-size: 1\nuse-flash-attn: true\n"
    )
    (message,) = warnings_of(f"--config {path}")
    assert message.startswith("--use-flash-attn is ignored")


# Saved configurations


def full_config() -> RunConfig:
    return parse(
        "--exit-layer-nums 2 3 --exit-layer-weight 0.1 0.30000000000000004 --exit-layer-temperature 1.5"
        " --adam-eps 1e-08 --min-lr 3e-5 --lr-warmup-fraction .01 --rampup-batch-size 1 1 10 --train-samples 1000"
        " --global-batch-size 4 --wandb-project yes --wandb-exp-name 0123 --split 1,1,1",
        base=BASE.replace("--train-iters 100", ""),
    )


def test_round_trip_is_exact(tmp_path):
    for cfg in (parse(), full_config()):
        assert RunConfig(**vars(from_dict(to_dict(cfg)))) == cfg
        save_run_config(cfg, tmp_path / "run_config.yaml")
        assert RunConfig(**vars(load_run_config(tmp_path / "run_config.yaml"))) == cfg
        assert parse(f"--config {tmp_path / 'run_config.yaml'}", base="") == cfg


def test_broken_saved_configuration_names_file_and_all_problems(tmp_path):
    data = to_dict(parse())
    data["model"]["num_layer"] = data["model"].pop("num_layers")
    data["optimizer"]["lr"] = "fast"
    data["exit"] = data.pop("exits")
    data["data"] = 3
    with pytest.raises(ConfigError) as error:
        from_dict(data)
    assert error.value.problems == [
        "model.num_layer: unknown name; did you mean num_layers?",
        "optimizer.lr: expected a number, got 'fast' (str)",
        "section data: expected names and values, got 3",
        "unknown section exit; did you mean exits?",
        "model.num_layers is missing",
    ]
    path = write(tmp_path / "broken.yaml", "model: {num_layers: 2}\n")
    with pytest.raises(ConfigError, match="broken.yaml: model.hidden_size is missing"):
        load_run_config(path)


def save_checkpoint(folder: Path, cfg: RunConfig, iteration: int, latest: bool = True) -> None:
    checkpoint = folder / f"iter_{iteration:07d}"
    save_tokenizer(cfg.data.tokenizer, checkpoint / "tokenizer")
    save_description(described(cfg), checkpoint)
    if latest:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def described(cfg: RunConfig) -> ModelDescription:
    return cfg.describe(vocab_size=129)


WITHOUT_SIZES = "--seq-length 16 --lr 1e-4 --train-iters 5 --mock-data --use-checkpoint-args"


def test_use_checkpoint_args_takes_model_exits_and_tokenizer(tmp_path):
    saved = parse("--exit-layer-nums 2 3 --exit-layer-weight 0.1 0.2 --exit-layer-temperature 2 --use-exit-norm")
    save_checkpoint(tmp_path, saved, 20)
    save_checkpoint(tmp_path, parse("--exit-layer-nums 1"), 10, latest=False)

    cfg = parse(f"{WITHOUT_SIZES} --load {tmp_path}", base="")
    assert cfg.model == described(saved).model
    assert cfg.exits == saved.exits
    assert cfg.data.vocab_size == 128
    assert (cfg.training.seq_length, cfg.optimizer.lr) == (16, 1e-4)

    cfg = parse(
        f"{WITHOUT_SIZES} --load {tmp_path} --exit-layer-weight 0.3 0.4 --hidden-dropout 0 --vocab-size 100", base=""
    )
    assert cfg.exits == dataclasses.replace(saved.exits, exit_layer_weight=(0.3, 0.4))
    assert cfg.model.hidden_dropout == 0.0
    assert cfg.data.vocab_size == 100

    earlier = parse(f"{WITHOUT_SIZES} --load {tmp_path} --load-iteration 10", base="")
    assert earlier.exits.exit_layer_nums == (1,)


def test_use_checkpoint_args_says_which_flags_lose(tmp_path):
    save_checkpoint(tmp_path, parse(), 20)
    messages: list[str] = []
    words = f"{WITHOUT_SIZES} --load {tmp_path} --hidden-size 128 --num-layers 4".split()
    cfg = parse_run_config(words, world_size=1, warn=messages.append)
    assert cfg.model.hidden_size == 64
    assert messages == ["--hidden-size 128 is replaced by the checkpoint's 64 (--use-checkpoint-args)"]


def test_use_checkpoint_args_names_what_is_missing(tmp_path):
    folder = tmp_path / "run"
    assert "--use-checkpoint-args without --load" in problems_of(WITHOUT_SIZES, base="")[0]
    (problem,) = problems_of(f"{WITHOUT_SIZES} --load {folder}", base="")
    assert f"--load {folder}: no such folder" in problem
    folder.mkdir()
    latest = folder / "latest_checkpointed_iteration.txt"
    assert f"{latest} is missing" in problems_of(f"{WITHOUT_SIZES} --load {folder}", base="")[0]
    latest.write_text("release")
    assert "it holds 'release'" in problems_of(f"{WITHOUT_SIZES} --load {folder}", base="")[0]
    latest.write_text("3\n")
    checkpoint = folder / "iter_0000003"
    assert f"{checkpoint} does not exist" in problems_of(f"{WITHOUT_SIZES} --load {folder}", base="")[0]
    checkpoint.mkdir()
    assert f"{checkpoint / 'model.yaml'} is missing" in problems_of(f"{WITHOUT_SIZES} --load {folder}", base="")[0]
    assert (
        "iter_0000007 does not exist" in problems_of(f"{WITHOUT_SIZES} --load {folder} --load-iteration 7", base="")[0]
    )
    save_checkpoint(folder, parse(), 3)
    assert checkpoint_description(folder) == described(parse())
    (checkpoint / "tokenizer/tokenizer_settings.json").unlink()
    assert "tokenizer_settings.json is missing" in problems_of(f"{WITHOUT_SIZES} --load {folder}", base="")[0]


def test_broken_description_names_file_and_problems(tmp_path):
    save_checkpoint(tmp_path, parse(), 3)
    path = tmp_path / "iter_0000003/model.yaml"
    whole = path.read_text()
    for old, new, problem in (
        ("dtype: fp32", "dtype: int3", "dtype: expected one of fp32, bf16, fp16, got 'int3'"),
        ("dtype: fp32\n", "", "dtype: expected one of fp32, bf16, fp16, got nothing"),
        ("padded_vocab_size: 256", "padded_vocab_size: null", "model.padded_vocab_size is missing"),
        ("num_layers: 4", "num_layers: four", "model.num_layers: expected an integer"),
        ("exits:", "exit:", "unknown section exit; did you mean exits?"),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(ConfigError) as error:
            checkpoint_description(tmp_path)
        assert error.value.problems[0].startswith(f"{path}: {problem}")


def test_settings_of_earlier_checkpoints_are_read():
    """Version 0.1 wrote run_config.yaml, of converted checkpoints too, and no model.yaml."""
    folder = ROOT / "tests/fixtures/settings_of_0.1"
    words = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --lr 1e-3 --train-iters 1 --bf16 \
        --mock-data --tokenizer-type NullTokenizer --vocab-size 128 --exit-layer-nums 2 3 --exit-layer-weight 0.1 0.2 \
        --use-exit-norm"
    assert checkpoint_description(folder) == described(parse(words, base=""))
    cfg = parse(f"{WITHOUT_SIZES} --load {folder}", base="")
    assert cfg.exits.exit_layer_nums == (2, 3) and cfg.model.padded_vocab_size == 256
    assert cfg.data.tokenizer == TokenizerConfig("NullTokenizer", vocab_size=128)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", []),
        ("--hidden-dropout 0 --init-method-std 1 --make-vocab-size-divisible-by 8", []),
        ("--ffn-hidden-size 256 --kv-channels 16 --max-position-embeddings 32", []),  # the defaults, spelled out
        ("--padded-vocab-size 256", []),
        ("--exit-layer-temperature 2 --exit-layer-nums 2", ["exit_layer_nums: checkpoint none, flags 2"]),
        (
            "--ffn-hidden-size 128 --kv-channels 8",
            ["ffn_hidden_size: checkpoint 256, flags 128", "kv_channels: checkpoint 16, flags 8"],
        ),
        (
            "--group-query-attention --num-query-groups 2 --disable-bias-linear",
            [
                "num_query_groups: checkpoint 4, flags 2",
                "add_bias_linear: checkpoint True, flags False",
                "add_qkv_bias: checkpoint True, flags False",
            ],
        ),
        ("--max-position-embeddings 64", ["max_position_embeddings: checkpoint 32, flags 64"]),
        ("--position-embedding-type rope", ["position_embedding_type: checkpoint learned_absolute, flags rope"]),
    ],
)
def test_architecture_differences(flags, expected):
    present = parse().describe(vocab_size=129)
    assert architecture_differences(parse(flags).describe(129, present), present) == expected


def test_rope_models_may_differ_in_length_but_not_in_base():
    rope = "--position-embedding-type rope"
    longer = parse(f"{rope} --max-position-embeddings 4096 --rotary-base 500000")
    assert architecture_differences(described(longer), described(parse(rope))) == [
        "rotary_base: checkpoint 10000, flags 500000"
    ]


def test_overlay_lets_a_rope_model_grow_longer():
    saved = described(parse("--position-embedding-type rope"))
    longer = parse("--max-position-embeddings 4096")
    assert overlay_architecture(longer, saved).model.max_position_embeddings == 32
    grown = overlay_architecture(longer, saved, given={"max_position_embeddings"})
    assert grown.model.max_position_embeddings == 4096


# The documentation page and the imports


def test_flags_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_flags_doc", ROOT / "tools" / "make_flags_doc.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text() == tool.flags_markdown(), "run: python tools/make_flags_doc.py"


def test_configuration_imports_neither_torch_nor_core():
    code = (
        "import sys, megatron.early_exit.config.flags\n"
        "assert 'torch' not in sys.modules and 'megatron.core' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
