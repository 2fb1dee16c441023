"""What it costs to decide whether rows leave at an exit, in layers: the exit's own head, a shortlist, an approximate
head in int8, a probe, and a probe with the own head of the rows that leave.

    python -m benchmarks.deciding_cost --load runs/demo/checkpoints --name demo

Everything is timed in turn with the layers of the model, several times, and compared with the layers of the same turn.
Probes need no training to be timed: random ones of `--width` are taken. A step with a decision is the time of all
layers and the final head, and so is what is printed as the speed at which a share of rows leaves (one row, from the
first exit, by the formula of planned exits)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from megatron.early_exit.checkpoint.read_model import read_model
from megatron.early_exit.config.serialize import checkpoint_folder
from megatron.early_exit.inference.costs import ROW_COUNTS, StepCosts
from megatron.early_exit.inference.engine.exit_selection import step_seconds
from megatron.early_exit.inference.exit_probes import AboutProbes, ExitProbes, ProbeNetwork
from megatron.early_exit.inference.fingerprint import ExitFingerprint
from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.weights import ApproximateHeads, decoder_weights
from megatron.early_exit.platform.device import device

SHARES = (0.1, 0.3, 0.5, 0.7, 0.85)
"""Of rows that leave at the first exit, for the table of speeds."""


def random_probes(layers: tuple[int, ...], hidden_size: int, width: int) -> ExitProbes:
    """As large as trained ones."""
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    about = AboutProbes(ExitFingerprint("", layers, "fp32", None, None, "", ()), hidden_size, width, (), {})
    network = lambda: ProbeNetwork(normal(width, hidden_size), normal(width), normal(1, width), normal(1))
    return ExitProbes(about, {layer: network() for layer in layers})


class Model:
    """One checkpoint, with each kind of approximate head."""

    def __init__(self, path: str, width: int, shortlist_size: int) -> None:
        self.description, tensors = read_model(checkpoint_folder(path))
        layers = tuple(self.description.exits.exit_layer_nums)
        if not layers:
            raise ValueError(f"the model in {path} has no exits")
        probes = random_probes(layers, self.description.model.hidden_size, width)
        frequent = tuple(range(min(shortlist_size, self.description.padded_vocab_size)))
        kinds = {"own": None, "shortlist": ApproximateHeads(frequent), "int8": ApproximateHeads(int8=True)}
        if device().type != "cpu":
            del kinds["int8"]
        make = lambda kind: decoder_weights(
            tensors, self.description, device=device(), approximate_heads=kind, probes=probes
        )
        self.decoders = {name: Decoder(make(kind), num_slots=1, num_positions=64) for name, kind in kinds.items()}

    def actions(self, rows: int) -> dict[str, Callable[[], object]]:
        """What is timed for so many rows, by name; all of them leave."""
        own = self.decoders["own"]
        exit_index = own.exits[0].index
        attention = own.attention_metadata([Segment(0, 0, rows)])
        hidden = own.embed([5] * rows, attention)

        def probe_and_head() -> None:
            own.probe_scores(exit_index, hidden)
            own.exit_output(exit_index, hidden)

        return {
            "layers": lambda: own.run_layers(hidden, attention, 0, own.num_layers),
            "own head": lambda: own.exit_output(exit_index, hidden),
            "final head": lambda: own.final_output(hidden),
            **{
                name: lambda one=decoder: one.approximate_output(exit_index, hidden)
                for name, decoder in self.decoders.items() if name != "own"
            },
            "probe": lambda: own.probe_scores(exit_index, hidden),
            "probe and own head": probe_and_head,
        }  # fmt: skip


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def measure(model: Model, row_counts: list[int], rounds: int) -> list[dict[str, Any]]:
    """A row of the table for each number of rows. Layers run in between, so that weights come from memory."""
    found = []
    for rows in row_counts:
        actions = model.actions(rows)
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for number in range(rounds + 1):  # the first one warms up
            for name, action in actions.items():
                if name != "layers":
                    actions["layers"]()
                taken = _seconds(action)
                if number:
                    seconds[name].append(taken)
        num_layers = model.decoders["own"].num_layers
        of_layer = [value / num_layers for value in seconds.pop("layers")]
        found.append({
            "rows": rows,
            "layer_ms": 1e3 * common.median(of_layer),
            "in_layers": {name: common.median_ratio(values, of_layer) for name, values in seconds.items()},
            "raw_seconds": {"layer": of_layer, **seconds},
        })  # fmt: skip
    return found


def speeds(model: Model, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Expected speed against the full model, for one row, by the way to decide and the share that leaves at the first
    exit."""
    in_layers, decoder = row["in_layers"], model.decoders["own"]
    flat = lambda value: (float(value),) * len(ROW_COUNTS)
    own, final = flat(in_layers["own head"]), flat(in_layers["final head"])
    depth, found = decoder.exits[0].depth, []
    for share in SHARES:
        leaves = (np.arange(1000) < share * 1000)[:, None]
        times = {}
        for name in ("own head", "shortlist", "int8", "probe"):
            if name not in in_layers:
                continue
            costs = StepCosts(
                flat(1), flat(in_layers[name]), own, final, has_approximate_heads=name in ("shortlist", "int8"),
                probe_seconds=flat(in_layers["probe"]),
            )  # fmt: skip
            score = "probe" if name == "probe" else "head"
            seconds = lambda enabled, costs=costs, score=score: step_seconds(
                enabled, leaves, (depth,), decoder.num_layers, costs, score=score
            )
            times[name] = seconds(()) / seconds((0,))
        found.append({"share": share, "speed": times})
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--name", required=True, help="of the model, in the result's name")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], metavar="N", help="default 1 and 8")
    parser.add_argument("--rounds", type=int, default=30, help="default 30")
    parser.add_argument("--width", type=int, default=64, help="of probes; default 64")
    parser.add_argument("--shortlist-size", type=int, default=8192, help="default 8192, or the vocabulary")
    parser.add_argument("--output", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    machine = common.machine_info()
    model = Model(args.load, args.width, args.shortlist_size)
    rows = measure(model, args.rows, args.rounds)
    names = list(rows[0]["in_layers"])
    print(f"{args.name}: cost in layers\n")
    print(common.format_table(
        ["", *(f"{row['rows']} rows" for row in rows)],
        [[name, *(row["in_layers"][name] for row in rows)] for name in names],
    ))  # fmt: skip
    of_shares = speeds(model, rows[0])
    print("\nexpected speed, one row, by the share that leaves at the first exit\n")
    print(common.format_table(
        ["decided by", *(f"{one['share']:.0%}" for one in of_shares)],
        [[name, *(one["speed"][name] for one in of_shares)] for name in of_shares[0]["speed"]],
    ))  # fmt: skip
    probe = max(row["in_layers"]["probe"] for row in rows)
    settings = {
        "model": args.name, "load": args.load, "rows": args.rows, "rounds": args.rounds, "width": args.width,
        "shortlist_size": args.shortlist_size, "device": device().type, "threads": torch.get_num_threads(),
    }  # fmt: skip
    goals = {"probe_at_most_a_tenth_of_a_layer": {"met": probe <= 0.1, "most": probe}}
    document = common.result_document(
        f"deciding_cost_{args.name}", machine, settings, 0, {"costs": rows, "speeds": of_shares}, goals
    )
    common.finish(document, args.output)


if __name__ == "__main__":
    main()
