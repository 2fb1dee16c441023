"""What it costs to decide whether rows leave at an exit, in layers, and how fast one row decodes with that.

    python -m benchmarks.deciding_cost --load runs/demo/checkpoints --name demo

Everything is timed by turns, each time right after all layers of the model, so that weights come from memory and what a
busy machine does to one it does to both; medians of these ratios count, by the clock and by CPU time. Probes need no
training to be timed: random ones of `--width` are taken, of the first exit that tokens may leave at. The block of an
exit that has one runs whatever decides, and is not counted.

The speed at which a share of rows leaves is the formula of planned exits (one row, no time to set up a batch). Where
nothing but greedy tokens is wanted, certified heads give those of rows that leave behind a probe and of the final head,
with exits and without; a confidence needs the exact head."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import common
from benchmarks.rounds import in_turn
from benchmarks.timing import seconds_of
from megatron.early_exit.checkpoint.read_model import read_model
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts
from megatron.early_exit.inference.engine.exit_selection import step_seconds
from megatron.early_exit.inference.exit_probes import AboutProbes, ExitProbes, ProbeNetwork
from megatron.early_exit.inference.fingerprint import ExitFingerprint
from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.weight_reading import decoder_weights
from megatron.early_exit.platform.command_line import show_progress
from megatron.early_exit.platform.device import device

SHARES = (0.1, 0.3, 0.5, 0.7, 0.85)
"""Of rows that leave at the exit, for the table of speeds."""


class Way(NamedTuple):
    """How it is decided that a row leaves, by the names of what is timed."""

    decides: str
    """Evaluated for every row."""
    leaves: str | None
    """Evaluated besides for a row that leaves; None: what decides gives its token."""
    final: str
    """Evaluated for a row that stays."""
    full: str
    """The final head of the full model that it is compared with."""


WAYS = {
    "own head": Way("own head", None, "final head", "final head"),
    "shortlist": Way("shortlist", "own head", "final head", "final head"),
    "probe, own head": Way("probe", "own head", "final head", "final head"),
    "own head; tokens alone": Way("own head", None, "certified final head", "certified final head"),
    "shortlist; tokens alone": Way("shortlist", "own head", "certified final head", "certified final head"),
    "probe, certified head; tokens alone": Way(
        "probe", "certified head", "certified final head", "certified final head"
    ),
    "the same against the exact full model": Way("probe", "certified head", "certified final head", "final head"),
}


def random_probes(layers: tuple[int, ...], hidden_size: int, width: int) -> ExitProbes:
    """As large as trained ones."""
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    about = AboutProbes(ExitFingerprint("", layers, "fp32", None, None, "", ()), hidden_size, width, (), {})
    network = lambda: ProbeNetwork(normal(width, hidden_size), normal(width), normal(1, width), normal(1))
    return ExitProbes(about, {layer: network() for layer in layers})


class Model:
    """One checkpoint with a shortlist, probes, and certified heads where they can be had."""

    def __init__(self, path: str, width: int, shortlist_size: int | None) -> None:
        """shortlist_size: default a sixth of the vocabulary. Raises ValueError if tokens leave nowhere."""
        description, tensors = read_model(checkpoint_folder(path))
        layers = description.exits.leaving_layers
        if not layers:
            raise ValueError(f"the model in {path} has no exits that tokens may leave at")
        self.shortlist_size = min(shortlist_size or description.padded_vocab_size // 6, description.padded_vocab_size)
        weights = decoder_weights(
            tensors, description, device=device(), shortlist=tuple(range(self.shortlist_size)),
            probes=random_probes(layers, description.model.hidden_size, width), certified_heads="on",
        )  # fmt: skip
        self.decoder = Decoder(weights, num_slots=1, num_positions=64)
        self.exit = next(one for one in self.decoder.exits if one.probe is not None)

    def states(self, rows: int) -> tuple[Callable[[], object], torch.Tensor, torch.Tensor]:
        """(what runs all layers, what the exit reads, what the final head reads) for tokens of one sequence."""
        decoder, head = self.decoder, self.exit
        attention = decoder.attention_metadata([Segment(0, 0, rows)])
        embedded = decoder.embed([(5 + 211 * number) % decoder.vocab_size for number in range(rows)], attention)
        hidden, residual = decoder.run_layers(embedded, attention, 0, head.depth)
        read = residual if head.mlp is not None else hidden
        if head.block is not None:
            read = decoder.run_exit_block(head.index, hidden, attention)
        last = decoder.run_layers(hidden, attention, head.depth, decoder.num_layers)[0]
        return lambda: decoder.run_layers(embedded, attention, 0, decoder.num_layers), read.clone(), last.clone()

    def actions(self, read: torch.Tensor, last: torch.Tensor) -> dict[str, Callable[[], object]]:
        """What is timed, by name. read, last: [rows, h], as of `states`"""
        decoder, index = self.decoder, self.exit.index

        def behind_probe(tokens_only: bool) -> None:
            decoder.probe_scores(index, read)
            decoder.exit_output(index, read, tokens_only=tokens_only)

        actions = {
            "own head": lambda: decoder.exit_output(index, read),
            "shortlist": lambda: decoder.approximate_output(index, read),
            "probe": lambda: decoder.probe_scores(index, read),
            "probe and own head": lambda: behind_probe(tokens_only=False),
            "final head": lambda: decoder.final_output(last),
        }
        if self.exit.certified is not None:
            actions["certified head"] = lambda: decoder.exit_output(index, read, tokens_only=True)
            actions["probe and certified head"] = lambda: behind_probe(tokens_only=True)
        if decoder.weights.final.certified is not None:
            actions["certified final head"] = lambda: decoder.final_output(last, tokens_only=True)
        return actions


def in_layers(pairs: list[tuple[float, float]], num_layers: int) -> dict[str, Any]:
    """The median of what something cost, and half of the turns around it. pairs: (seconds of all layers, of what ran
    behind them) of each turn"""
    ratios = [num_layers * seconds / of_layers for of_layers, seconds in pairs]
    low, median, high = np.percentile(ratios, (25, 50, 75)).tolist()
    return {"median": median, "quartiles": [low, high]}


@torch.inference_mode()
def measure(model: Model, rows: int, rounds: int) -> dict[str, Any]:
    """What everything costs for so many rows."""
    run_layers, read, last = model.states(rows)
    actions, num_layers = model.actions(read, last), model.decoder.num_layers
    turns = in_turn(
        {name: (lambda a=action: (seconds_of(run_layers), seconds_of(a))) for name, action in actions.items()},
        rounds,
        show=show_progress(f"{rows} rows, turns"),
    )
    by_clock, by_cpu = (
        {name: [(layers[kind], own[kind]) for layers, own in pairs] for name, pairs in turns.items()}
        for kind in range(2)
    )
    costs = lambda of_all: {name: in_layers(pairs, num_layers) for name, pairs in of_all.items()}
    layers = [of_layers / num_layers for pairs in by_clock.values() for of_layers, _ in pairs]
    return {
        "rows": rows,
        "layer_ms": 1e3 * common.median(layers),
        "in_layers": costs(by_clock),
        # A GPU's work is not the CPU's.
        "in_layers_by_cpu": costs(by_cpu) if device().type == "cpu" else None,
        # What certified heads left to the exact ones, whose time is in theirs.
        "refused": {name: _refused(model, actions[name]) for name in actions if name.startswith("certified")},
        "raw_seconds": by_clock,
        "raw_cpu_seconds": by_cpu,
    }


def _refused(model: Model, action: Callable[[], object]) -> bool:
    """Whether a certified head has no answer for these rows."""
    count = lambda: sum(head.counts.refused for head in model.decoder.weights.certified_heads)
    before = count()
    action()
    return count() > before


def speeds(costs: Mapping[str, float], depth: int, num_layers: int) -> list[dict[str, Any]]:
    """Expected speed of one row against the full model, by the way to decide and the share that leaves at the exit.

    costs: in layers, by the names of what was timed; ways with others are left out. depth: of the exit. A certified
    head that is slower than the exact one is not used, as where a model is loaded."""
    found = []
    for exact, certified in (("own head", "certified head"), ("final head", "certified final head")):
        if certified in costs:
            costs = {**costs, certified: min(costs[exact], costs[certified])}
    flat = lambda value: (float(value),) * len(ROW_COUNTS)
    for share in SHARES:
        leaves = (np.arange(1000) < share * 1000)[:, None]
        speed = {}
        for name, way in WAYS.items():
            if not {*way} - {None} <= {*costs}:
                continue
            step = StepCosts(
                flat(1), flat(costs[way.decides]), flat(costs.get(way.leaves, 0)), flat(costs[way.final]),
                has_approximate_heads=way.leaves is not None,
            )  # fmt: skip
            full = num_layers + costs[way.full]
            speed[name] = full / step_seconds((0,), leaves, (depth,), num_layers, step)
        found.append({"share": share, "speed": speed})
    return found


def _print_tables(name: str, rows: list[dict[str, Any]], of_shares: list[dict[str, Any]]) -> None:
    timed = {"by the clock": "in_layers", "by CPU time": "in_layers_by_cpu"}
    columns = [
        (f"rows: {row['rows']}, {words}", row[key])
        for row in rows for words, key in timed.items() if row[key] is not None
    ]  # fmt: skip
    print(f"{name}: cost in layers\n")
    print(common.format_table(
        ["", *(words for words, _ in columns)],
        [[one, *(costs[one]["median"] for _, costs in columns)] for one in rows[0]["in_layers"]],
    ))  # fmt: skip
    print("\nexpected speed of one row, by the share that leaves at the exit\n")
    print(common.format_table(
        ["decided by", *(f"{one['share']:.0%}" for one in of_shares)],
        [[way, *(one["speed"][way] for one in of_shares)] for way in of_shares[0]["speed"]],
    ))  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--name", required=True, help="of the model, in the result's name")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], metavar="N", help="default 1 and 8")
    parser.add_argument("--rounds", type=int, default=40, help="turns that count; default 40")
    parser.add_argument("--width", type=int, default=64, help="of probes; default 64")
    parser.add_argument("--shortlist-size", type=int, metavar="N", help="default: a sixth of the vocabulary")
    parser.add_argument("--output", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    machine = common.machine_info()
    model = Model(args.load, args.width, args.shortlist_size)
    rows = [measure(model, count, args.rounds) for count in args.rows]
    costs = {name: one["median"] for name, one in rows[0]["in_layers"].items()}
    of_shares = speeds(costs, model.exit.depth, model.decoder.num_layers)
    _print_tables(args.name, rows, of_shares)
    settings = {
        "model": args.name, "load": args.load, "rows": args.rows, "rounds": args.rounds, "width": args.width,
        "shortlist_size": model.shortlist_size, "exit_layer": model.exit.layer_number,
        "num_layers": model.decoder.num_layers, "device": device().type, "threads": torch.get_num_threads(),
    }  # fmt: skip
    probe = max(row["in_layers"]["probe"]["median"] for row in rows)
    goals = {"probe_at_most_a_tenth_of_a_layer": {"met": probe <= 0.1, "most": probe}}
    document = common.result_document(
        f"deciding_cost_{args.name}", machine, settings, 0, {"costs": rows, "speeds": of_shares}, goals
    )
    common.finish(document, args.output)


if __name__ == "__main__":
    main()
