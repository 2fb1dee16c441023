"""What the benchmarks compute without a model: bytes of tensors, FLOPs, tables, ratios, verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import (
    common,
    deciding_cost,
    flops,
    loading,
    rounds,
    stage_memory,
    tuning_cost,
)
from benchmarks.memory_tracker import TensorMemoryTracker
from benchmarks.token_fraction import compare as token_fraction
from benchmarks.token_fraction import settings as token_fraction_settings
from benchmarks.training_overhead import compare as training_overhead
from benchmarks.training_overhead.__main__ import parse_arguments
from benchmarks.training_overhead.settings import Settings as OverheadSettings
from benchmarks.training_overhead.settings import exit_layer_nums
from megatron.early_exit.config.exits import ExitConfig, ExitHeadKind
from megatron.early_exit.config.model import ModelConfig

KIB = 1024


def kib(size: float) -> torch.Tensor:
    """A new tensor of `size` KiB."""
    return torch.empty(int(size * KIB), dtype=torch.uint8)


def test_live_bytes_follow_tensors_and_the_peak_stays() -> None:
    with TensorMemoryTracker() as tracker:
        first = kib(3)
        second = kib(5)
        assert tracker.live_bytes == 8 * KIB
        del first
        assert tracker.live_bytes == 5 * KIB
        third = kib(1)
        assert (tracker.live_bytes, tracker.peak_bytes) == (6 * KIB, 8 * KIB)
    del second, third
    assert (tracker.live_bytes, tracker.peak_bytes) == (0, 8 * KIB)


def test_views_and_in_place_operators_create_nothing() -> None:
    with TensorMemoryTracker() as tracker:
        tensor = kib(4)
        view = tensor[: 2 * KIB].view(2, KIB).t()
        tensor.add_(1)
        del tensor
        assert tracker.live_bytes == 4 * KIB, "a view keeps the whole storage"
        del view
    assert (tracker.live_bytes, tracker.peak_bytes) == (0, 4 * KIB)


def test_views_of_tensors_from_before_are_not_counted() -> None:
    before = kib(4)
    with TensorMemoryTracker() as tracker:
        views = [before[1:], before.view(2, -1), before.detach(), before.mul_(2)]
        assert tracker.peak_bytes == 0
        copy = before.clone()
        assert tracker.peak_bytes == 4 * KIB
    del views, copy


def test_out_arguments_and_resizes_are_counted_once() -> None:
    ones = torch.ones(KIB)  # 4 KiB
    with TensorMemoryTracker() as tracker:
        out = torch.empty(0)
        torch.add(ones, ones, out=out)
        assert tracker.live_bytes == 4 * KIB
        torch.add(ones, ones, out=out)
        assert tracker.peak_bytes == 4 * KIB


def test_freeing_by_assigning_data_as_the_pipeline_schedule_does() -> None:
    with TensorMemoryTracker() as tracker:
        tensor = kib(4)
        tensor.data = kib(1)
        assert (tracker.live_bytes, tracker.peak_bytes) == (KIB, 5 * KIB)


def test_sees_inside_functions_and_backward() -> None:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            scratch = torch.empty(8 * KIB)  # 32 KiB, gone after forward
            del scratch
            return tensor * 2  # 4 KiB

        @staticmethod
        def backward(ctx, gradient):
            scratch = torch.empty(16 * KIB)  # 64 KiB
            with torch.enable_grad():  # a backward pass inside the backward pass
                inner = torch.ones(KIB, requires_grad=True)
                (inner * 2).sum().backward()
            del scratch, inner
            return gradient * 2

    tensor = torch.ones(KIB, requires_grad=True)
    with TensorMemoryTracker() as forward:
        result = Function.apply(tensor)
    assert (forward.live_bytes, forward.peak_bytes) == (4 * KIB, 32 * KIB)
    with TensorMemoryTracker() as backward:
        result.backward(torch.ones_like(result))
    assert 64 * KIB + 12 * KIB <= backward.peak_bytes <= 64 * KIB + 32 * KIB
    assert backward.live_bytes == 4 * KIB, "the gradient of `tensor`"


def test_matrix_product_by_hand() -> None:
    a, b = torch.ones(64, 32, requires_grad=True), torch.ones(32, 128, requires_grad=True)
    with TensorMemoryTracker() as tracker:
        torch.mm(a, b).backward(torch.ones(64, 128))
    assert tracker.live_bytes == 4 * (64 * 32 + 32 * 128)
    # The product, its gradient and the gradients of both factors.
    assert tracker.peak_bytes == 4 * (2 * 64 * 128 + 64 * 32 + 32 * 128)


def test_flops_by_hand() -> None:
    model = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, swiglu=True)
    layer = 6 * (4 * 8 * 8 + 3 * 8 * 16) + 6 * 10 * 8
    assert flops.layer_flops_per_token(model, 10) == layer
    assert flops.model_flops_per_token(model, 100, 10) == 2 * layer + 6 * 8 * 100
    exits = ExitConfig(exit_layer_nums=(1, 2))
    assert flops.added_flops_share(model, exits, 100, 10) == pytest.approx(2 * 4800 / (2 * layer + 4800))
    branch = 6 * 3 * 8 * 16
    assert flops.exit_flops_per_token(model, ExitHeadKind(block=True), 100, 10) == 4800 + layer
    assert flops.exit_flops_per_token(model, ExitHeadKind(mlp=True), 100, 10) == 4800 + branch
    mixed = ExitConfig(exit_layer_nums=(1, 2), use_exit_block=(True, False), use_exit_mlp=(False, True))
    added = 2 * 4800 + layer + branch
    assert flops.added_flops_share(model, mixed, 100, 10) == pytest.approx(added / (2 * layer + 4800))


def test_loading_is_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    num_bytes = loading.random_llama(tmp_path, num_layers=4, seed=0, hidden_size=64)
    one = loading.load(common.ROOT, tmp_path, "bf16")
    assert one["import_seconds"] > 0 and one["load_seconds"] > 0
    assert one["peak_bytes"] >= one["kept_bytes"] > num_bytes // 2


def test_trees_are_loaded_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round, which reads the files into the page cache, is not counted."""
    loads: list[tuple[Path, str]] = []

    def load(tree: Path, checkpoint: Path, dtype: str) -> dict[str, float]:
        loads.append((tree, dtype))
        return {"load_seconds": float(len(loads))}

    monkeypatch.setattr(loading, "load", load)
    trees = {"this": common.ROOT, "other": tmp_path}
    rows = loading.measure(trees, tmp_path, ["fp32", "bf16"], rounds=2)
    assert loads == [(tree, dtype) for dtype in ("fp32", "bf16") for _ in range(3) for tree in trees.values()]
    numbers = [(row["dtype"], row["tree"], [one["load_seconds"] for one in row["loads"]]) for row in rows]
    assert numbers == [
        ("fp32", "this", [3, 5]), ("fp32", "other", [4, 6]), ("bf16", "this", [9, 11]), ("bf16", "other", [10, 12])
    ]  # fmt: skip


@pytest.mark.slow
def test_memory_of_stages_is_that_of_their_processes(tmp_path: Path) -> None:
    loading.random_llama(tmp_path, num_layers=4, seed=0, hidden_size=64)
    rows = stage_memory.measure(tmp_path, ["bf16"], [2], rounds=1)
    assert [(row["stages"], row["layers"], len(row["rank_bytes"])) for row in rows] == [(2, (2, 2), 2)]
    per_layer = 4 * 1024 * 2 * 4 * 4 * 2  # slots, positions, keys and values, heads, channels, bytes
    assert [row["kv_bytes"] for row in rows] == [[2 * per_layer] * 2]
    for row in rows:
        (found,) = row["rounds"]
        assert all(low <= high for low, high in zip(found["loaded_bytes"], found["peak_bytes"], strict=True))
        assert min(row["rank_bytes"]) > min(row["kv_bytes"])


def test_median_of_pairs_cancels_a_slow_moment() -> None:
    assert common.median_ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == pytest.approx(2.0)
    assert common.ratio(1.0, 0) is None
    assert common.ratio(None, 2.0) is None


def test_rounds_take_turns() -> None:
    order: list[str] = []
    actions = {name: (lambda name=name: order.append(name) or len(order)) for name in "abc"}
    shown: list[tuple[int, int]] = []
    given = rounds.in_turn(actions, 2, show=lambda *round: shown.append(round))
    assert "".join(order) == "abcbcacab"
    assert given == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}  # the first round warms up
    assert shown == [(0, 2), (1, 2), (2, 2)]


def test_goals_are_met_if_all_checks_are() -> None:
    good, bad = {"met": True}, {"met": False}
    assert [common.verdict(checks)["met"] for checks in ([good, good], [good, bad], [])] == [True, False, None]
    assert common.goals_table({"some_goal": good, "other": bad}).splitlines()[2].split() == ["some", "goal", "yes"]
    assert common.table_of([{"a": 1, "b": 2}], {"second": "b", "first": "a"}).split()[-2:] == ["2", "1"]


def test_table_aligns_and_shows_unknown_values() -> None:
    lines = common.format_table(["name", "x"], [["a", 0.5], ["long name", None], ["b", True]]).splitlines()
    assert lines[0] == "name           x"
    assert [line.split()[-1] for line in lines[2:]] == ["0.500", "-", "yes"]


def test_document_has_a_place_and_is_json(tmp_path: Path) -> None:
    document = common.result_document("some", common.machine_info(), {"device": "cpu"}, 1, {"unknown": None}, {})
    path = common.default_result_path(document)
    assert path.parent.name == "results" and path.name.startswith("some_") and path.name.endswith(".json")
    assert " " not in path.name
    common.write_document(document, tmp_path / "folder" / "x.json")
    assert json.loads((tmp_path / "folder" / "x.json").read_text())["results"] == {"unknown": None}
    with pytest.raises(ValueError):
        common.write_document({"x": float("nan")}, tmp_path / "y.json")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--exits", "4"], "--exits"),
    (["--num-layers", "6", "--pipeline-model-parallel-size", "4"], "--num-layers"),
    (["--hidden-size", "100"], "--num-attention-heads"),
    (["--use-exit-mlp", "--pre-exit"], "--use-exit-mlp"),
    (["--iterations", "0"], "--iterations"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--device", "auto", *arguments])
    assert message in capsys.readouterr().err


def test_exits_sit_at_quarters_of_the_model() -> None:
    settings = OverheadSettings(num_layers=8)
    assert exit_layer_nums(settings, 3) == (2, 4, 6)
    pre_exit = OverheadSettings(num_layers=8, pre_exit=True)
    assert exit_layer_nums(pre_exit, 3) == (3, 5, 7)


def make_case(num_stages: int, ee_wall: list[float], ee_peak: int, losses: list[float]) -> dict:
    def variant(num_exits: int, wall: list[float], peak: int) -> dict:
        stages = [
            {"peak_bytes": peak, "parameter_bytes": 10, "gradient_bytes": 10, "num_exits": num_exits if i == 0 else 0}
            for i in range(num_stages)
        ]
        return {"num_exits": num_exits, "losses": losses, "grad_norm": 1.0, "wall_sec": wall, "cpu_sec": wall,
                "stages": stages}  # fmt: skip

    plain = [1.0, 1.1, 0.9]
    measured = {
        "plain": variant(0, plain, 1000), "core": variant(0, plain, 1000),
        "ee_1": variant(1, ee_wall, ee_peak), "naive_1": variant(1, [2.0] * 3, 10**9),
    }  # fmt: skip
    return {"vocab_size": 1000, "num_stages": num_stages, "seq_length": 16, "num_microbatches": 8, "chunk_tokens": 32,
            "variants": measured}  # fmt: skip


@pytest.mark.parametrize("num_stages", [1, 2])
def test_verdicts(num_stages: int) -> None:
    settings = OverheadSettings(hidden_size=64, exits=(1,))

    def verdicts(ee_wall: list[float], ee_peak: int) -> dict:
        case = make_case(num_stages, ee_wall, ee_peak, [2.0])
        one = training_overhead.compare(settings, case, 1)
        assert one["added_flops_share"] > 0
        return training_overhead.goals(settings, [one], [], cpu_cores=2)

    time_goal = {1: "time_added_at_pp1_within_added_flops", 2: "time_added_at_pp2_below_half_of_added_flops"}
    good = verdicts([1.001, 1.101, 0.901], 1000)
    assert good[time_goal[num_stages]]["met"] is True
    assert good[time_goal[3 - num_stages]]["met"] is None, "not measured"
    assert good["extra_memory_within_one_chunk_and_one_weight_gradient"]["met"] is True
    assert verdicts([2.0] * 3, 1000)[time_goal[num_stages]]["met"] is False
    vectors = training_overhead.TOKEN_BYTES * settings.micro_batch_size * 16 + training_overhead.SCALARS_BYTES
    bound = 4 * 1000 * (32 + 64) + vectors
    too_much = verdicts([1.0] * 3, 1000 + bound + 1)["extra_memory_within_one_chunk_and_one_weight_gradient"]
    assert too_much["met"] is False
    assert too_much["checks"][0]["limit_bytes"] == bound


def test_what_tuning_costs_is_compared_by_hand() -> None:
    settings = tuning_cost.Settings()
    assert settings.exit_layers(1, 1) == (4,) and settings.exit_layers(8, 1) == tuple(range(1, 9))
    assert settings.exit_layers(1, 2) == (12,) and settings.exit_layers(2, 2) == (4, 12)
    mib = common.MIB
    memory = {
        name: [{"peak_bytes": peak * mib, "trained_parameter_bytes": 1, "gradient_bytes": 1, "optimizer_bytes": 2}]
        for name, peak in {"forward": 10, "tune": 60, "train": 100, "heads": 5, "distil": 90, "distil_kept": 70}.items()
    }
    row = {
        "num_stages": 1, "num_exits": 1, "exit_layers": [4], "built_layers": 4, "memory": memory,
        "seconds": {
            "forward": [1.0, 2.0], "tune": [0.7, 1.4], "train": [3.5, 7.0], "heads": [0.3, 0.6], "distil": [1.4, 2.8],
            "distil_kept": [0.35, 0.7],
        },
    }  # fmt: skip
    one = tuning_cost.compare(settings, row)
    assert one["tune_over_forward"] == pytest.approx(0.7) and one["tune_over_train"] == pytest.approx(0.2)
    assert one["backbone_over_forward"] == pytest.approx(0.4)
    assert one["distil_over_tune"] == pytest.approx(2) and one["distil_kept_over_tune"] == pytest.approx(0.5)
    assert one["distil_peak_mib"] == 90 and one["distil_kept_peak_mib"] == 70
    verdicts = list(tuning_cost.goals([one]).values())
    assert [verdict["met"] for verdict in verdicts] == [True, one["chunk_mib"] >= 50]
    in_time, _ = tuning_cost.goals([one | {"backbone_over_forward": 0.5}]).values()
    assert not in_time["met"]


def test_what_token_fractions_save_is_compared_by_hand() -> None:
    settings = token_fraction_settings.Settings(hidden_size=8, num_attention_heads=1, vocab_size=100, seeds=(1, 2))
    seconds = {
        "plain": [1.0, 2.0, 4.0],
        "norm 1": [2.0, 4.0, 8.0], "norm 0.5": [1.5, 3.2, 6.0], "norm 0.25": [1.2, 2.6, 5.2],
        "MLP 1": [3.0, 6.0, 12.0], "MLP 0.5": [2.0, 4.0, 8.0], "MLP 0.25": [2.0, 4.0, 8.0],
    }  # fmt: skip
    rows = token_fraction.compare_time(settings, seconds)
    assert [row["share_of_added_time"] for row in rows] == pytest.approx([1, 0.5, 0.3, 1, 0.5, 0.5])
    assert [row["added_time_over_plain"] for row in rows] == pytest.approx([1, 0.5, 0.3, 2, 1, 1])
    projection, branch = 8 * 100, 3 * 8 * settings_ffn(settings)
    expected = [(f * projection + branch) / (projection + branch) for f in (1, 0.5, 0.25)]
    assert [row["share_of_added_flops"] for row in rows] == pytest.approx([1, 0.5, 0.25, *expected])

    measured = {"batch_variance": 10.0, "squared_distances": {"0.5": [1.0, 3.0], "0.25": [6.0]}}
    half, quarter = token_fraction.compare_variance(measured)
    assert half["draw_over_batch_variance"] == 0.2 and half["over_1_minus_f_by_f"] == 2.0
    assert quarter["draw_variance"] == 6.0 and quarter["over_1_minus_f_by_f"] == 2.0

    losses = [
        {"fraction": fraction, "seed": seed, "lm_loss": loss * seed}
        for fraction, loss in ((1.0, 2.0), (0.5, 2.01), (0.25, 2.1), (None, 2.0))
        for seed in (1, 2)
    ]
    verdicts = token_fraction.goals(settings, {"time": rows, "losses": losses})
    time, final, over_plain = verdicts.values()
    assert [check["met"] for check in time["checks"]] == [True, False]  # 0.3 is more than 1.15 x 0.25
    assert [check["met"] for check in final["checks"]] == [True, False] and final["met"] is False
    assert over_plain["checks"] == final["checks"]  # plain GPT has the losses of fraction 1 here
    assert [goal["met"] for goal in token_fraction.goals(settings, {}).values()] == [None, None, None]


def settings_ffn(settings: token_fraction_settings.Settings) -> int:
    return ModelConfig(settings.num_layers, settings.hidden_size, settings.num_attention_heads, swiglu=True).ffn_size


def test_speeds_by_what_decides_that_a_row_leaves() -> None:
    """Ten layers, an exit behind two of them: what every row pays, what rows that leave do, and what the others do."""
    costs = {"own head": 4.0, "shortlist": 1.0, "probe": 0.1, "final head": 4.0}
    half = next(one["speed"] for one in deciding_cost.speeds(costs, 2, 10) if one["share"] == 0.5)
    assert half == pytest.approx({
        "own head": 14 / (2 + 4 + 0.5 * (8 + 4)),
        "shortlist": 14 / (2 + 1 + 0.5 * 4 + 0.5 * (8 + 4)),
        "probe, own head": 14 / (2 + 0.1 + 0.5 * 4 + 0.5 * (8 + 4)),
    })  # fmt: skip
    costs |= {"certified head": 2.0, "certified final head": 3.0}
    half = next(one["speed"] for one in deciding_cost.speeds(costs, 2, 10) if one["share"] == 0.5)
    assert half["own head; tokens alone"] == pytest.approx(13 / (2 + 4 + 0.5 * (8 + 3)))
    assert half["shortlist; tokens alone"] == pytest.approx(13 / (2 + 1 + 0.5 * 4 + 0.5 * (8 + 3)))
    with_probe = 2 + 0.1 + 0.5 * 2 + 0.5 * (8 + 3)
    assert half["probe, certified head; tokens alone"] == pytest.approx(13 / with_probe)
    assert half["the same against the exact full model"] == pytest.approx(14 / with_probe)
    slower = costs | {"certified head": 5.0, "certified final head": 6.0}
    half = next(one["speed"] for one in deciding_cost.speeds(slower, 2, 10) if one["share"] == 0.5)
    assert half["probe, certified head; tokens alone"] == half["probe, own head"]


def test_a_slow_moment_of_the_machine_moves_no_cost() -> None:
    """In one turn everything is slow, in another what is timed alone."""
    pairs = [(5.0, 1.0)] * 8 + [(50.0, 10.0), (5.0, 40.0)]
    assert deciding_cost.in_layers(pairs, 10) == {"median": 2.0, "quartiles": [2.0, 2.0]}
