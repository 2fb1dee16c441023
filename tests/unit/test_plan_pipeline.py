"""Costs from a data sheet, what the planner chooses, the picture, and the program plan_pipeline."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.model import sizes
from megatron.early_exit.schedules.cases import CASES, setup_from_flags, setup_of_case
from megatron.early_exit.schedules.comparison import FREE, Setup, compare, exits_in_backward, plain_gpt, tuning_variant
from megatron.early_exit.schedules.cost_model import (
    GPUS,
    Assumptions,
    model_costs,
    stages_with_early_exits,
)
from megatron.early_exit.schedules.draw import draw_timelines
from megatron.early_exit.schedules.plan import Action, Kind, Plan
from megatron.early_exit.schedules.plan_command import main
from megatron.early_exit.schedules.planner import choose
from megatron.early_exit.schedules.simulate import Timeline
from megatron.early_exit.schedules.stage_costs import StageCosts, read_costs, write_costs
from megatron.early_exit.training.plans import check_plan
from megatron.early_exit.training.summary import flops_per_token

SMALL = (
    "--num-layers 8 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --micro-batch-size 2 --bf16 "
    "--global-batch-size 12 --pipeline-model-parallel-size 4 --exit-layer-nums 3 5 --pre-exit "
    "--untie-exit-output-weights --padded-vocab-size 512"
).split()
CHECKPOINT = str(Path(__file__).parent.parent / "fixtures" / "checkpoints" / "norm_mlp")


def small(*flags: str, **changes: object) -> Setup:
    return setup_from_flags([*SMALL, *flags], **{"world_size": 4, "gpu": "H100-80GB", **changes})


def test_tuning_towards_the_final_head_runs_all_stages() -> None:
    tune = ("--tune-exit", "--pretrained-checkpoint", CHECKPOINT)
    assert tuning_variant(small(*tune, world_size=3)).plan.num_ranks == 3
    plan = tuning_variant(small(*tune, "--tune-exit-distillation", "0.5")).plan
    assert plan.num_ranks == 4 and Action(Kind.RECEIVE_TEACHER, 0) in plan.ranks[1]


# Costs


def test_costs_by_hand() -> None:
    """With bandwidths without end only matrix products take time."""
    gpu = replace(
        GPUS["A100-80GB"], peak_flops_per_sec=1e9, memory_bytes_per_sec=1e30, nvlink_bytes_per_sec=1e30,
        network_bytes_per_sec=1e6,
    )  # fmt: skip
    config = small().config
    costs = model_costs(config, 4, gpu, assumptions=Assumptions(0.5, 1.0, 1.0))
    tokens, h, vocabulary = 2 * 128, 256, 512
    layer = 2 * (4 * h * h + 2 * h * 4 * h) + 2 * h * 128  # forward, for one token: products of weights, attention
    one_forward = 2 * layer * tokens / 0.5e9
    output = 6 * h * vocabulary * tokens / 0.5e9
    assert [cost.exit_sec for cost in costs] == pytest.approx([0, output, output, 0])
    assert [cost.forward_sec for cost in costs] == pytest.approx([one_forward] * 3 + [one_forward + output])
    assert [cost.backward_sec for cost in costs] == pytest.approx([2 * one_forward] * 4)
    assert costs[0].communication_sec < 1e-20  # four GPUs are in one server
    tuning = small("--tune-exit", "--tune-exit-distillation", "0.5", "--pretrained-checkpoint", CHECKPOINT).config
    towards_final = model_costs(tuning, 4, gpu, assumptions=Assumptions(0.5, 1.0, 1.0))
    # Exits make the final head's logits beside their own, and the last stage makes none.
    assert [cost.exit_sec for cost in towards_final] == pytest.approx([0, 4 / 3 * output, 4 / 3 * output, 0])
    assert [cost.forward_sec for cost in towards_final] == pytest.approx([one_forward] * 4)
    fractions = small("--exit-loss-token-fraction", "0.25", "0.5").config
    some = model_costs(fractions, 4, gpu, assumptions=Assumptions(0.5, 1.0, 1.0))
    assert [cost.exit_sec for cost in some] == pytest.approx([0, output / 4, output / 2, 0])
    assert [cost.forward_sec for cost in some] == [cost.forward_sec for cost in costs]
    far = model_costs(config, 16, gpu, assumptions=Assumptions(0.5, 1.0, 0.5))
    assert far[0].communication_sec == pytest.approx(tokens * h * 2 / 0.5e6)


def test_bytes_of_stages() -> None:
    setup = small()
    first, second, third, last = setup.costs
    hidden = 2 * 128 * 256 * 2
    assert first.activation_bytes == 2 * 17 * hidden  # 34 bytes for an element of two
    assert (first.exit_gradient_bytes, second.exit_gradient_bytes) == (0, hidden)
    assert last.final_head_bytes == second.exit_head_bytes > 6 * 512 * 256 and first.exit_head_bytes == 0
    # An untied exit has an output weight: 2 bytes of weight, 4 of gradient, 12 of optimizer.
    plain = setup.plain_costs
    assert second.state_bytes - plain[1].state_bytes == 18 * 512 * 256
    assert plain[0] == first and replace(last, communication_sec=0) == replace(plain[3], communication_sec=0)
    # A chunk has no more tokens than the exit learns from: a quarter of 256; its logits take 6 bytes (fp32 and bf16).
    quarter = small("--exit-loss-token-fraction", "0.25").costs[1]
    assert second.exit_head_bytes - quarter.exit_head_bytes == (256 - 64) * 512 * 6
    # An exit at the end of a stage keeps what core would free.
    ends = small("--exit-layer-nums", "2", "4", "--no-pre-exit")
    assert ends.costs[0].activation_bytes - first.activation_bytes == hidden


def test_recomputation_runs_layers_again_and_keeps_their_inputs() -> None:
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    one = "--recompute-granularity full --recompute-method block --recompute-num-layers 1".split()
    plain, recomputed, half = small().costs, small(*full).costs, small(*one).costs
    forward = plain[1].forward_sec
    assert recomputed[1].backward_sec - plain[1].backward_sec == pytest.approx(forward)
    assert half[1].backward_sec - plain[1].backward_sec == pytest.approx(forward / 2)
    hidden = 2 * 128 * 256 * 2
    assert recomputed[1].activation_bytes == 2 * hidden and half[1].activation_bytes == hidden + 17 * hidden
    assert recomputed[1].recompute_bytes == 17 * hidden


def test_every_exit_has_the_cost_and_the_parameters_of_its_own_kind() -> None:
    """Four stages of two layers, each with an exit: a stage costs what it costs where all exits are of its kind."""
    kinds = {
        "use_exit_block": (True, False, False, False), "use_exit_norm": (False, True, False, False),
        "use_exit_mlp": (False, False, True, False), "untie_exit_output_weights": (False, False, False, True),
    }  # fmt: skip
    config = small("--pipeline-model-parallel-size", "4", "--num-layers", "8").config
    costs = lambda **heads: model_costs(
        replace(config, exits=ExitConfig(exit_layer_nums=(1, 3, 5, 7), **heads)), 4, GPUS["A100-80GB"]
    )
    mixed = costs(**kinds)
    for stage, name in enumerate(kinds):
        assert mixed[stage] == costs(**{name: True})[stage], name
    assert len({cost.exit_sec for cost in mixed}) == 3  # norm and own output cost what the others cost


def test_flops_of_exits_that_learn_from_some_tokens() -> None:
    """A block and a branch see all tokens, the output projection a quarter of them."""
    projection, tokens = 6 * 256 * 512, 128
    layer = 3 * (2 * (4 * 256 * 256 + 2 * 256 * 1024) + 2 * 256 * tokens)
    for head, beyond in (([], 0), (["--use-exit-block"], layer)):
        config = small("--exit-loss-token-fraction", "0.25", *head).config
        assert sizes.exit_flops_per_token(config, 1, 512) == projection / 4 + beyond
        assert flops_per_token(config, 512) == 8 * layer + projection + 2 * (projection / 4 + beyond)


def test_tensor_parallel_ranks_share_the_work_and_talk() -> None:
    one, two = small().costs[1], small("--tensor-model-parallel-size", "2", world_size=8).costs[1]
    assert one.forward_sec / 2 < two.forward_sec and two.state_bytes < one.state_bytes
    shared = small("--tensor-model-parallel-size", "2", "--sequence-parallel", world_size=8)
    assert shared.costs[1].activation_bytes == one.activation_bytes // 2
    assert shared.costs[1].communication_sec == pytest.approx(two.communication_sec / 2)


@pytest.mark.parametrize(("flags", "stages"), [
    ([], [1, 2]),
    (["--exit-layer-nums", "4", "5"], [1, 2]),
    (["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"], [1, 2]),
    (["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1",
      "--exit-layer-nums", "4", "5"], [2]),
    (["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1",
      "--exit-layer-nums", "4", "5"], [1, 2]),
    (["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1",
      "--exit-layer-nums", "3", "4", "--no-pre-exit"], []),
])  # fmt: skip
def test_exits_inside_recomputed_layers_cannot_run_early(flags: list[str], stages: list[int]) -> None:
    setup = small(*flags)
    assert stages_with_early_exits(setup.config) == stages


def test_costs_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    write_costs(small().costs, path)
    assert tuple(read_costs(path)) == small().costs
    for text, message in [
        ("{}", "expected a list"), ("[1", "is no JSON"), ('[{"forward_sec": 1}]', "stage 0: backward_sec missing"),
        ('[{"forward_sec": 1, "backward_sec": 1, "speed": 2}]', "unknown speed"),
        ('[{"forward_sec": 1, "backward_sec": "2"}]', "stage 0: backward_sec = '2'"),
    ]:  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_costs(path)


def test_a_share_is_a_share() -> None:
    with pytest.raises(ValueError, match="matmul_efficiency = 1.5"):
        Assumptions(matmul_efficiency=1.5)


# Cases, variants, choices


@pytest.mark.parametrize("name", CASES)
def test_cases_are_what_they_are_called(name: str) -> None:
    setup = setup_of_case(name)
    config, tp = setup.config, setup.config.parallel.tensor_model_parallel_size
    parameters = tp * sum(
        sizes.stage_parameters(replace(config, exits=ExitConfig()), layers, stage == 0, stage == setup.num_ranks - 1)
        for stage, layers in enumerate(setup.stage_layers)
    )
    assert float(name.removesuffix("B")) * 0.85e9 < parameters < float(name.removesuffix("B")) * 1.1e9
    depth = config.model.num_layers
    assert [round((layer - 1) / depth, 2) for layer in config.exits.exit_layer_nums] == [0.25, 0.5]
    assert max(exits_in_backward(setup).peak_bytes) < setup.gpu.memory_bytes


@pytest.mark.parametrize("name", ["1.3B", "7B", "70B"])
def test_exits_in_idle_time_beat_exits_in_the_backward(name: str) -> None:
    plain, in_backward, in_idle_time, filled = compare(setup_of_case(name))
    assert plain.iteration_sec <= in_idle_time.iteration_sec < in_backward.iteration_sec
    assert filled.iteration_sec <= in_idle_time.iteration_sec * (1 + FREE)
    assert filled.plan.num_fill > 0
    assert max(filled.peak_bytes) == max(plain.peak_bytes)


def test_given_fill_is_used_or_refused() -> None:
    filled = compare(small(), 1, 0)[-1]
    assert (filled.plan.num_fill_warmup, filled.plan.num_fill_cooldown) == (1, 0)
    with pytest.raises(ValueError, match="Use at most"):
        compare(small(), 9, 0)


def test_the_planner_moves_exits_to_the_next_stage_and_explains() -> None:
    setup = setup_of_case("7B", ["--exit-layer-nums", "8", "16", "--no-pre-exit"])
    choice = choose(setup)
    assert choice.setup.config.exits.exit_layer_nums == (9, 17) and choice.setup.config.exits.pre_exit
    text = " ".join(choice.reasons)
    assert "Exits sit before layers 9 and 17 (stages 1 and 2)" in text and "after layers 8 and 16" in text
    assert "Exits run in idle time" in text and "further microbatches" in text
    assert choice.exits_in_idle_time and choice.num_fill_warmup > 0
    assert 0 <= choice.time_overhead < 0.01 and choice.memory_overhead <= 0


def test_the_planner_takes_layers_from_the_slowest_stage() -> None:
    """Four exits on one stage: it gets fewer layers."""
    flags = "--num-layers 16 --exit-layer-nums 5 6 7 8 --no-pre-exit --padded-vocab-size 4096".split()
    setup = small(*flags)
    choice = choose(setup)
    counts = choice.setup.layers_per_stage
    assert sum(counts) == 16 and counts != (4, 4, 4, 4)
    assert choice.variant.iteration_sec < min(one.iteration_sec for one in compare(setup)[1:3])
    assert any(reason.startswith("Layers ") and "shorter" in reason for reason in choice.reasons)
    assert choose(setup, is_uneven_allowed=False).setup.layers_per_stage == (4, 4, 4, 4)


def test_what_the_planner_proposes_can_be_trained(capsys: pytest.CaptureFixture) -> None:
    """The flags that it prints, in place of the given ones, are the chosen setup."""
    words = [word for word in SMALL if word != "--pre-exit"]
    words += "--num-layers 17 --exit-layer-nums 5 6 7 8 --padded-vocab-size 4096".split()
    words += ["--decoder-first-pipeline-num-layers", "5"]
    assert main([*words, "--choose"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("To train it so: "))
    flags = shlex.split(line.removeprefix("To train it so: "))
    choice = choose(setup_from_flags(words, 4, "H100-80GB"))
    assert flags == choice.training_flags and "--exits-in-bubbles" in flags
    without_split = words[: words.index("--decoder-first-pipeline-num-layers")]
    trained = setup_from_flags([*without_split, *flags], 4, "H100-80GB")
    assert trained.config.pipeline.exits_in_bubbles and trained.config.exits == choice.setup.config.exits
    assert trained.layers_per_stage == choice.setup.layers_per_stage != (5, 4, 4, 4)
    check_plan(trained.config, 4)


def test_recomputed_groups_are_not_divided() -> None:
    """Layers move by whole groups; exits in idle time are no proposal where training recomputes all layers."""
    flags = "--num-layers 16 --exit-layer-nums 5 6 7 8 --no-pre-exit --padded-vocab-size 4096".split()
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2".split()
    choice = choose(small(*flags, *recompute))
    assert choice.setup.layers_per_stage != (4, 4, 4, 4)
    assert all(count % 2 == 0 for count in choice.setup.layers_per_stage)
    assert "--exits-in-bubbles" not in choice.training_flags


def test_the_planner_says_what_does_not_fit() -> None:
    setup = setup_of_case("30B", ["--tensor-model-parallel-size", "1", "--no-sequence-parallel"])
    assert choose(setup).reasons[-1].startswith("It does not fit")
    with pytest.raises(ValueError, match="nothing to choose"):
        choose(replace(setup, config=replace(setup.config, exits=ExitConfig())))


def test_uneven_pipelines() -> None:
    setup = small(layers_per_stage=(3, 2, 2, 1))
    assert setup.stage_layers == (range(1, 4), range(4, 6), range(6, 8), range(8, 9))
    assert setup.costs[0].exit_sec > 0 and setup.costs[1].exit_sec > 0 and setup.costs[2].exit_sec == 0
    for layers, message in [
        ((3, 2, 2), "3 stages, no multiple"),
        ((3, 2, 2, 2), "9 layers, not"),
        ((4, 2, 2, 0), "needs a layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(layers_per_stage=layers)


# The picture


def test_predicted_and_measured_timelines_are_drawn(tmp_path: Path) -> None:
    variant = plain_gpt(small())
    measured = [
        tuple(timed)[:2] + (timed.start_sec * 1.1 + 50, timed.end_sec * 1.1 + 50) for timed in variant.timeline.actions
    ]
    timeline = Timeline.of("measured", measured[::-1])
    assert timeline.iteration_sec == pytest.approx(1.1 * variant.iteration_sec)
    outputs = [tmp_path / "folder" / "x.png", tmp_path / "x.svg"]
    draw_timelines([variant.timeline, timeline], outputs, "title")
    assert outputs[0].read_bytes()[1:4] == b"PNG"
    svg = outputs[1].read_text()
    for text in ("plain GPT", "measured", "(+10.0%)", "rank 3", "forward", "backward", "idle", "title"):
        assert text in svg
    assert "fill: forward" not in svg and ">exits<" not in svg
    with pytest.raises(ValueError, match="says its format"):
        draw_timelines([timeline], [tmp_path / "x.jpeg"])
    with pytest.raises(ValueError, match="no timeline"):
        draw_timelines([], outputs)


def test_exits_and_fill_have_colours_of_their_own(tmp_path: Path) -> None:
    draw_timelines([variant.timeline for variant in compare(small())], [tmp_path / "x.svg"])
    svg = (tmp_path / "x.svg").read_text()
    assert ">exits<" in svg and "fill: forward" in svg and "fill: backward" in svg


def test_a_measured_rank_may_miss(tmp_path: Path) -> None:
    timeline = Timeline.of("measured", [(1, Action(Kind.FORWARD, 0), 5.0, 6.0)])
    assert timeline.num_ranks == 2 and timeline.idle_share(0) == 1.0 and timeline.idle_share(1) == 0.0
    draw_timelines([timeline], [tmp_path / "x.png"])


# The program


def test_table_picture_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {name: tmp_path / name for name in ("plan.txt", "costs.json", "x.png", "x.svg")}
    status = main([
        *SMALL, "--plan-output", str(files["plan.txt"]), "--costs-output", str(files["costs.json"]),
        "--output", str(files["x.png"]), str(files["x.svg"]), "--choose",
    ])  # fmt: skip
    text = capsys.readouterr().out
    assert status == 0 and all(path.is_file() for path in files.values())
    for part in ("4 x H100-80GB = TP 1 x PP 4 x DP 1", "6 microbatches of 2 x 128 tokens", "plain GPT",
                 "exits in the backward", "exits in idle time", "bubbles filled", "- Exits"):  # fmt: skip
        assert part in text
    plan = Plan.parse(files["plan.txt"].read_text())
    assert plan.num_ranks == 4 and plan.num_microbatches == 6
    assert main(["--costs", str(files["costs.json"]), "--num-microbatches", "6", "--plan", "backward",
                 "--plan-output", str(tmp_path / "other.txt")]) == 0  # fmt: skip
    assert Plan.parse((tmp_path / "other.txt").read_text()).name == "1F1B"


def test_other_schedules(capsys: pytest.CaptureFixture) -> None:
    assert main([*SMALL, "--num-layers-per-virtual-pipeline-stage", "1", "--global-batch-size", "16"]) == 0
    text = capsys.readouterr().out
    assert "filled" not in text and "1-1 5-5" in text
    assert main(["--case", "7B", *SMALL[:-2], "--global-batch-size", "32", "--num-microbatches", "4"]) == 0


@pytest.mark.parametrize(("words", "message"), [
    (["--case", "8B"], "no case '8B'; there are 1.3B, 7B"),
    (["--case", "7B", "--gpu", "V100"], "no data sheet of a GPU named 'V100'; known are A100-80GB"),
    (["--case", "7B", "--num-layer", "3"], "unknown flag --num-layer; did you mean --num-layers"),
    (["--case", "7B", "--output", "x.jpg"], "x.jpg: the suffix"),
    (["--case", "7B", "--num-fill-warmup-microbatches", "8"], "Use at most"),
    (["--case", "7B", "--num-microbatches", "0"], "--num-microbatches 0"),
    (["--case", "7B", "--world-size", "6"], "6 ranks do not fit"),
    (["--case", "7B", "--layers-per-stage", "8", "8", "8"], "3 stages, no multiple of --pipeline-model"),
    (["--case", "7B", "--memory-efficiency", "2"], "memory_efficiency = 2.0"),
    (["--num-layers", "4"], "no --hidden-size, --num-attention-heads, --seq-length: describe the model"),
    (["--costs", "nowhere.json", "--num-microbatches", "4"], "nowhere.json"),
    (["--costs", "nowhere.json", "--case", "7B"], "--case with --costs"),
    (["--costs", "nowhere.json", "--num-layers", "3"], "of training's flags only"),
])  # fmt: skip
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_stage_costs_without_exits() -> None:
    cost = StageCosts(1.0, 2.0, exit_sec=3.0, exit_head_bytes=4, state_bytes=5)
    assert asdict(cost.without_exits()) == asdict(StageCosts(1.0, 2.0, state_bytes=5))


def test_other_exit_layers_of_a_case_are_as_they_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A case has exits before its layers; `8 16` are after these, and `--pre-exit` can be given again."""
    assert main(["--case", "7B", "--exit-layer-nums", "8", "16"]) == 0
    assert "exits after layers 8, 16" in capsys.readouterr().out
    assert main(["--case", "7B", "--exit-layer-nums", "9", "17", "--pre-exit"]) == 0
    assert "exits before layers 9, 17" in capsys.readouterr().out
