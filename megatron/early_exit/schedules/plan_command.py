"""The program behind `tools/plan_pipeline.py`: what a pipeline with exits costs, as a table, a picture and a plan."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.early_exit.config.errors import ConfigError
from megatron.early_exit.platform.columns import aligned
from megatron.early_exit.platform.command_line import run_program
from megatron.early_exit.platform.program_flags import flags_of
from megatron.early_exit.schedules.cases import case_named, given_number, layout_flags, setup_from_flags
from megatron.early_exit.schedules.comparison import (
    FILLED,
    IN_BACKWARD,
    IN_IDLE_TIME,
    PLAIN,
    Setup,
    Variant,
    compare,
    compare_costs,
    tuning_variant,
)
from megatron.early_exit.schedules.cost_model import Assumptions
from megatron.early_exit.schedules.draw import check_outputs, draw_timelines
from megatron.early_exit.schedules.plan_flags import PlanFlags, build_parser
from megatron.early_exit.schedules.planner import Choice, choose
from megatron.early_exit.schedules.stage_costs import StageCosts, exit_stages, read_costs, write_costs

GIB = 2**30
PLANS = {"plain": PLAIN, "backward": IN_BACKWARD, "idle": IN_IDLE_TIME, "filled": FILLED}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for bad settings."""
    known, flags = build_parser().parse_known_args(argv)
    args = flags_of(PlanFlags, known)
    try:
        _run(args, flags)
    except BrokenPipeError:  # the reader of the output has ended: `run_program` deals with it
        raise
    except ConfigError as error:
        print("plan_pipeline.py: " + "\n".join(error.problems), file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"plan_pipeline.py: {error}", file=sys.stderr)
        return 2
    return 0


def run() -> int:
    """The console command `early-exit-plan`."""
    return run_program(main)


def _run(args: PlanFlags, flags: list[str]) -> None:
    check_outputs(args.output)
    for name in ("num_microbatches", "draw_microbatches", "world_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.costs is not None:
        _plan_costs(args, args.costs, flags)
    else:
        _plan_model(args, flags)


# A model


def _plan_model(args: PlanFlags, flags: list[str]) -> None:
    setup = _setup(args, flags)
    headline = _headline(setup)
    is_tuning = setup.config.training.tune_exit
    choice = choose(setup) if args.choose and not is_tuning else None
    setup = setup if choice is None else choice.setup
    fill = (args.num_fill_warmup_microbatches, args.num_fill_cooldown_microbatches)
    variants = [tuning_variant(setup)] if is_tuning else compare(setup, *fill)
    print(headline)
    if choice is not None:
        print("\n" + "\n".join(f"- {reason}" for reason in choice.reasons))
        print(
            f"- All in all {choice.time_overhead:+.2%} time and {choice.memory_overhead:+.2%} memory of the "
            "fullest rank, against plain GPT with the layers that were given; the table is against plain GPT with the "
            "chosen ones."
        )
        print(f"\nTo train it so: {shlex.join(choice.training_flags)}{_not_in_training(choice)}")
    print("\n" + rank_table(variants[-1], setup))
    print("\n" + variant_table(variants))
    full = max(variants[-1].peak_bytes)
    if full > setup.gpu.memory_bytes:
        print(
            f"\nIt does not fit: the fullest rank needs {full / GIB:.1f} GiB, a {setup.gpu.name} has "
            f"{setup.gpu.memory_bytes / GIB:.1f} GiB."
        )
    _write(
        args, variants, lambda count: _drawn(setup.with_num_microbatches(count)), setup.num_microbatches, setup.costs
    )


def _not_in_training(choice: Choice) -> str:
    """What of a choice training cannot do yet."""
    if not choice.exits_in_idle_time or choice.trains_exits_in_idle_time:
        return ""
    return "\n(Training runs exits in the backward, not in idle time, with --recompute-granularity full.)"


def _drawn(setup: Setup) -> list[Variant]:
    return [tuning_variant(setup)] if setup.config.training.tune_exit else compare(setup)


def _setup(args: PlanFlags, flags: list[str]) -> Setup:
    case = case_named(args.case) if args.case else None
    if args.layers_per_stage:
        flags = [*flags, *layout_flags(args.layers_per_stage)]
    words = case.flags_with(flags) if case else flags
    needed = {"--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length"}
    missing = sorted(needed - {word.partition("=")[0] for word in words})
    if missing and not any(word.startswith("--config") for word in words):
        raise ValueError(f"no {', '.join(missing)}: describe the model with flags of training, or name a --case")
    world_size = args.world_size or (case.world_size if case else _one_replica(words))
    assumptions = Assumptions(**{name: getattr(args, name) for name in vars(Assumptions())})
    gpu = args.gpu or (case.gpu if case else "H100-80GB")
    setup = setup_from_flags(words, world_size, gpu, assumptions=assumptions)
    return setup.with_num_microbatches(args.num_microbatches) if args.num_microbatches else setup


def _one_replica(words: Sequence[str]) -> int:
    """GPUs of one replica of the model."""
    sizes = (given_number(words, f"--{name}-model-parallel-size") for name in ("tensor", "pipeline"))
    return math.prod(size or 1 for size in sizes)


def _headline(setup: Setup) -> str:
    config = setup.config
    parallel, model, training = config.parallel, config.model, config.training
    exits = config.exits
    side = "before" if exits.pre_exit else "after"
    layers = ", ".join(map(str, exits.exit_layer_nums))
    return (
        f"{model.num_layers} layers of width {model.hidden_size}, vocabulary {model.padded_vocab_size:,}; "
        f"{f'exits {side} layers {layers}' if exits.num_exits else 'no exits'}\n"
        f"{setup.world_size} x {setup.gpu.name} = TP {parallel.tensor_model_parallel_size} x PP {parallel.num_stages} "
        f"x DP {parallel.data_parallel_size(setup.world_size)}; {setup.num_microbatches} microbatches of "
        f"{training.micro_batch_size} x {training.seq_length:,} tokens on each replica"
    )


# Measured costs


def _plan_costs(args: PlanFlags, path: Path, flags: list[str]) -> None:
    num_ranks = _only_flag(flags, "--pipeline-model-parallel-size", path)
    for name in ("case", "layers_per_stage", "gpu", "world_size"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} with --costs {path}: costs are given; drop one")
    if args.choose:
        raise ValueError(f"--choose with --costs {path}: to move layers a model is needed; drop one")
    if not args.num_microbatches:
        raise ValueError(f"--costs {path} needs --num-microbatches")
    costs = read_costs(path)
    num_ranks = num_ranks or len(costs)
    if len(costs) % num_ranks:
        raise ValueError(f"{path}: {len(costs)} stages, no multiple of --pipeline-model-parallel-size {num_ranks}")
    fill = (args.num_fill_warmup_microbatches, args.num_fill_cooldown_microbatches)

    def variants_of(num_microbatches: int, fill: tuple[int | None, int | None] = (None, None)) -> list[Variant]:
        plain = [cost.without_exits() for cost in costs]
        return compare_costs(costs, plain, num_ranks, num_microbatches, exit_stages(costs), *fill)

    variants = variants_of(args.num_microbatches, fill)
    print(f"costs of {path}: {num_ranks} ranks, {len(costs)} stages, {args.num_microbatches} microbatches")
    print("\n" + rank_table(variants[-1]))
    print("\n" + variant_table(variants))
    _write(args, variants, variants_of, args.num_microbatches, costs)


def _only_flag(flags: list[str], flag: str, path: Path) -> int | None:
    """The value of the one flag of training that goes with --costs."""
    words = [part for word in flags for part in word.split("=", 1)]
    if not words:
        return None
    if len(words) != 2 or words[0] != flag or not words[1].isdigit() or int(words[1]) < 1:
        raise ValueError(f"{' '.join(flags)}: with --costs {path}, of training's flags only {flag} N is used")
    return int(words[1])


# Tables


def rank_table(variant: Variant, setup: Setup | None = None) -> str:
    """Layers, exits, times (of one microbatch), idle share and peak memory of every rank under one plan."""
    num_ranks = variant.plan.num_ranks
    header = ["rank", "layers", "exits", "forward ms", "backward ms", "exits ms", "idle", "peak GiB"]
    rows = []
    for rank in range(num_ranks):
        own = variant.costs[rank::num_ranks]
        milliseconds = [
            f"{1e3 * sum(getattr(cost, name) for cost in own):.1f}"
            for name in ("forward_sec", "backward_sec", "exit_sec")
        ]
        layers, exits = ["-", "-"]
        if setup is not None:
            chunks = setup.stage_layers[rank :: setup.num_ranks]
            layers = " ".join(f"{chunk[0]}-{chunk[-1]}" for chunk in chunks if chunk)
            exits = " ".join(
                str(layer) for chunk in chunks for layer in chunk if layer in setup.config.exits.exit_layer_nums
            )
        rows.append([
            str(rank), layers, exits or "-", *milliseconds,
            f"{variant.timeline.idle_share(rank):.1%}", f"{variant.peak_bytes[rank] / GIB:.2f}",
        ])  # fmt: skip
    return f"ranks under '{variant.name}'\n" + aligned([header, *rows], to_the_right=True)


def variant_table(variants: Sequence[Variant]) -> str:
    """Iteration time, idle share and memory of every plan, and how they compare with the first one's."""
    base = variants[0]
    base_peak = max(base.peak_bytes)
    rows = [["plan", "iteration s", "time", "idle", "peak GiB", "memory", "fill"]]
    for variant in variants:
        plan, peak = variant.plan, max(variant.peak_bytes)
        idle = sum(map(variant.timeline.idle_share, range(plan.num_ranks))) / plan.num_ranks
        rows.append([
            variant.name, f"{variant.iteration_sec:.4g}", f"{variant.iteration_sec / base.iteration_sec - 1:+.2%}",
            f"{idle:.1%}", f"{peak / GIB:.2f}", f"{peak / base_peak - 1:+.2%}" if base_peak else "-",
            f"{plan.num_fill_warmup} + {plan.num_fill_cooldown}",
        ])  # fmt: skip
    return aligned(rows, to_the_right=True)


# Files


def _write(
    args: PlanFlags,
    variants: Sequence[Variant],
    again: Callable[[int], list[Variant]],
    num_microbatches: int,
    costs: Sequence[StageCosts],
) -> None:
    """again: variants with another number of microbatches, for the picture."""
    if args.plan_output is not None:
        wanted = PLANS[args.plan] if args.plan else variants[-1].name
        found = [variant for variant in variants if variant.name == wanted]
        if not found:
            raise ValueError(f"--plan {args.plan}: there are only {', '.join(variant.name for variant in variants)}")
        args.plan_output.parent.mkdir(parents=True, exist_ok=True)
        args.plan_output.write_text(str(found[0].plan), encoding="utf-8")
        print(f"wrote {args.plan_output}: {found[0].name}")
    if args.costs_output is not None:
        args.costs_output.parent.mkdir(parents=True, exist_ok=True)
        write_costs(costs, args.costs_output)
        print(f"wrote {args.costs_output}")
    if args.output:
        shown = min(args.draw_microbatches, num_microbatches)
        drawn = variants if shown == num_microbatches else again(shown)
        title = f"{num_microbatches} microbatches"
        if shown < num_microbatches:
            title = f"An iteration of {shown} microbatches instead of {num_microbatches}"
        draw_timelines([variant.timeline for variant in drawn], args.output, title)
        print("wrote " + ", ".join(map(str, args.output)))
