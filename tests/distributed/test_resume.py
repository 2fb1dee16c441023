"""A run that is saved and resumed is the run that was never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron.early_exit.data.tokenizer import load_tokenizer
from tests.configs import MIXED_HEADS, make_training_config
from tests.data_files import write_token_files
from tests.distributed.training_runs import training_run
from tests.distributed.workers import run_distributed

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VP2 = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
FIRST = {**PP2, "decoder_first_pipeline_num_layers": 1}
LAST = {**PP2, "decoder_last_pipeline_num_layers": 1}
DISTRIBUTED = {"use_distributed_optimizer": True}
BF16 = {"bf16": True}
UNTIED = {"untie_embeddings_and_output_weights": True}


def records(folder: Path, kind: str = "train") -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def comparable(record: dict) -> dict:
    """What must not depend on the moment or the machine."""
    timing = ("time", "iteration_ms", "tokens_per_second", "tokens", "kind")
    return {key: value for key, value in record.items() if key not in timing}


@pytest.mark.parametrize("settings", [
    {**PP2, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    {**TP2, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    {**VP2},
    {"hidden_dropout": 0.1, "attention_dropout": 0.1, "eval_interval": 3, "eval_iters": 2},
    {**VP2, **UNTIED, "exit_layer_nums": (1, 2, 3), "exit_layer_weight": (0.25, 0.5, 0.5)},
    {**DISTRIBUTED, **BF16},
    {**PP2, **BF16, "use_exit_norm": True, "exit_loss_token_fraction": (0.25, 0.5)},
    {"fp16": True, "initial_loss_scale": 256.0, "loss_scale_window": 2},
], ids=str)  # fmt: skip
def test_same_layout_is_bit_equal(data: str, tmp_path: Path, settings: dict) -> None:
    whole = make_training_config(data, tmp_path / "whole", save=str(tmp_path / "ck"), save_interval=3, **settings)
    digests = run_distributed(2, training_run, cfg=whole)
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = make_training_config(data, tmp_path / "resumed", load=str(tmp_path / "ck"), **settings)
    assert run_distributed(2, training_run, cfg=resumed) == digests
    expected = [comparable(r) for r in records(tmp_path / "whole")][3:]
    assert [comparable(r) for r in records(tmp_path / "resumed")] == expected
    assert [r["iteration"] for r in expected] == [4, 5, 6]


@pytest.mark.parametrize(("settings", "same"), [
    ({**PP2, "decoder_first_pipeline_num_layers": 2}, PP2),
    ({**PP2, "pipeline_model_parallel_layout": "Ett|ttL"}, PP2),
    ({**PP2, "pipeline_model_parallel_layout": "Et|t|t|tL"}, VP2),
], ids=str)  # fmt: skip
def test_as_many_layers_on_every_stage_are_the_default(data: str, tmp_path: Path, settings: dict, same: dict) -> None:
    digests = [
        run_distributed(2, training_run, cfg=make_training_config(data, tmp_path / name, hidden_dropout=0.1, **layout))
        for name, layout in (("given", settings), ("default", same))
    ]
    assert digests[0] == digests[1]
    given, default = ([comparable(one) for one in records(tmp_path / name)] for name in ("given", "default"))
    assert given == default


@pytest.mark.parametrize(("common", "saved", "loaded"), [
    ({}, (2, PP2), (1, {})),
    ({}, (2, PP2), (2, TP2)),
    ({}, (2, TP2), (2, VP2)),
    ({}, (2, VP2), (2, {})),
    ({"use_exit_mlp": True, "untie_exit_output_weights": True}, (2, TP2), (2, PP2)),
    ({**UNTIED, "use_exit_norm": True}, (2, PP2), (2, TP2)),
    (MIXED_HEADS, (2, TP2), (2, PP2)),
    (UNTIED, (2, TP2), (2, VP2)),
    (DISTRIBUTED, (2, {}), (2, PP2)),
    ({"use_exit_norm": True}, (2, FIRST), (2, PP2)),
    (MIXED_HEADS, (2, FIRST), (1, {})),
    ({**UNTIED, "use_exit_norm": True}, (1, {}), (2, LAST)),
    (DISTRIBUTED, (4, LAST), (2, FIRST)),
    (DISTRIBUTED, (4, PP2), (2, TP2)),
    (DISTRIBUTED, (2, VP2), (4, {**PP2})),
], ids=str)  # fmt: skip
def test_other_layouts_go_on_alike(
    data: str, tmp_path: Path, common: dict, saved: tuple[int, dict], loaded: tuple[int, dict]
) -> None:
    """Weights, optimizer, schedule and data position are read under another layout."""
    odd = {"ffn_hidden_size": 36, "make_vocab_size_divisible_by": 2, **common}
    (saved_size, saved_layout), (loaded_size, loaded_layout) = saved, loaded
    folder = str(tmp_path / "ck")
    whole = make_training_config(data, tmp_path / "whole", save=folder, save_interval=3, **odd, **saved_layout)
    run_distributed(saved_size, training_run, cfg=whole)
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = make_training_config(data, tmp_path / "resumed", load=folder, **odd, **loaded_layout)
    run_distributed(loaded_size, training_run, cfg=resumed)
    pairs = zip(records(tmp_path / "resumed"), records(tmp_path / "whole")[3:], strict=True)
    for actual, expected in pairs:
        for key in ("lm_loss", "exit_loss/layer_2", "exit_loss/layer_3", "grad_norm", "learning_rate"):
            assert actual[key] == pytest.approx(expected[key], rel=1e-4), (actual["iteration"], key)
        assert actual["consumed_samples"] == expected["consumed_samples"]


def test_asynchronous_saving_gives_the_same_checkpoint(data: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "ck")
    whole = make_training_config(data, tmp_path / "whole", save=folder, save_interval=3, async_save=True, **PP2)
    digests = run_distributed(2, training_run, cfg=whole)
    assert (tmp_path / "ck" / "latest_checkpointed_iteration.txt").read_text() == "6"
    resumed = make_training_config(data, tmp_path / "resumed", load=folder, load_iteration=3, **PP2)
    assert run_distributed(2, training_run, cfg=resumed) == digests


def test_keep_last_removes_older_checkpoints(data: str, tmp_path: Path) -> None:
    cfg = make_training_config(data, tmp_path, save=str(tmp_path / "ck"), save_interval=1, keep_last=2)
    run_distributed(1, training_run, cfg=cfg)
    assert sorted(path.name for path in (tmp_path / "ck").glob("iter_*")) == ["iter_0000005", "iter_0000006"]


def test_exit_interval_stops_and_saves(data: str, tmp_path: Path) -> None:
    cfg = make_training_config(data, tmp_path, save=str(tmp_path / "ck"), exit_interval=2)
    run_distributed(1, training_run, cfg=cfg)
    assert [r["iteration"] for r in records(tmp_path)] == [1, 2]
    assert (tmp_path / "ck" / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_finetune_takes_weights_only(data: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "ck")
    run_distributed(1, training_run, cfg=make_training_config(data, tmp_path / "a", save=folder, train_iters=3))
    tuned = make_training_config(data, tmp_path / "b", load=folder, finetune=True, train_iters=1)
    run_distributed(1, training_run, cfg=tuned)
    before, after = records(tmp_path / "a"), records(tmp_path / "b")
    assert after[0]["iteration"] == 1 and after[0]["consumed_samples"] == 8
    assert after[0]["lm_loss"] < before[0]["lm_loss"] - 0.05


def test_no_load_optim_keeps_counting_but_starts_the_optimizer_anew(data: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "ck")
    whole = make_training_config(data, tmp_path / "a", save=folder, save_interval=3)
    run_distributed(1, training_run, cfg=whole)
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = make_training_config(data, tmp_path / "b", load=folder, no_load_optim=True)
    run_distributed(1, training_run, cfg=resumed)
    expected, actual = records(tmp_path / "a")[3:], records(tmp_path / "b")
    assert [r["iteration"] for r in actual] == [4, 5, 6]
    assert actual[0]["lm_loss"] == pytest.approx(expected[0]["lm_loss"], rel=1e-6)
    assert actual[2]["lm_loss"] != pytest.approx(expected[2]["lm_loss"], rel=1e-6)


def test_another_tokenizer_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    small = write_token_files(tmp_path, 60)
    folder = str(tmp_path / "ck")
    run_distributed(1, training_run, cfg=make_training_config(small, tmp_path / "a", save=folder, train_iters=1))
    for start in ({"load": folder}, {"load": folder, "finetune": True}, {"pretrained_checkpoint": folder}):
        other = make_training_config(small, tmp_path / "b", vocab_size=80, **start)
        message = (
            r"is not that of the checkpoint, .*: it has 81 ids, not 96; its end of document .* --override-tokenizer"
        )
        with pytest.raises(AssertionError, match=message):
            run_distributed(1, training_run, cfg=other)
    meant = make_training_config(
        small, tmp_path / "c", vocab_size=80, load=folder, save=str(tmp_path / "new"), override_tokenizer=True
    )
    run_distributed(1, training_run, cfg=meant)
    assert load_tokenizer(tmp_path / "new" / "iter_0000006" / "tokenizer").vocab_size == 81


def test_another_architecture_is_refused_with_its_differences(data: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "ck")
    run_distributed(1, training_run, cfg=make_training_config(data, tmp_path / "a", save=folder, train_iters=1))
    other = make_training_config(data, tmp_path / "b", load=folder, num_layers=3, exit_layer_nums=(2,),
                                 exit_layer_weight=(1.0,))  # fmt: skip
    with pytest.raises(AssertionError) as error:
        run_distributed(1, training_run, cfg=other)
    message = str(error.value)
    assert "num_layers: checkpoint 4, flags 3" in message
    assert "exit_layer_nums" in message and "--use-checkpoint-args" in message


def test_optimizer_state_of_the_other_kind_is_refused(data: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "ck")
    run_distributed(1, training_run, cfg=make_training_config(data, tmp_path / "a", save=folder, train_iters=1))
    with pytest.raises(AssertionError, match="without --use-distributed-optimizer"):
        run_distributed(1, training_run, cfg=make_training_config(data, tmp_path / "b", load=folder, **DISTRIBUTED))


def test_a_partial_folder_is_ignored_and_replaced(data: str, tmp_path: Path) -> None:
    """What a killed save leaves behind."""
    folder = tmp_path / "ck"
    first = make_training_config(data, tmp_path / "a", save=str(folder), train_iters=2, save_interval=1)
    run_distributed(1, training_run, cfg=first)
    shutil.move(folder / "iter_0000002", folder / "iter_0000002.partial")
    (folder / "iter_0000002.partial" / "metadata.json").unlink()
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    again = make_training_config(data, tmp_path / "b", save=str(folder), load=str(folder), train_iters=2)
    run_distributed(1, training_run, cfg=again)
    assert [r["iteration"] for r in records(tmp_path / "b")] == [2]
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
