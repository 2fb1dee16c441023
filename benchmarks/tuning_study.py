"""What tuning brings a real model: every kind of exit, copied or random, at three depths, against tokens seen.

    python -m benchmarks.tuning_study --folder runs/study          (SmolLM2-135M, from the root of the repository)

Each variant gets exits after the same layers, is tuned on the same text with the same number of tokens, and is
evaluated on held-out text on the way: loss, and agreement with the final head, of every exit. At the end some decode
with several thresholds, against the full model in the same run. The frozen layers' hidden states are computed once for
all variants (`--cache-hidden-states`). A variant that is done is not run again, so the study can be interrupted.

The last line is one JSON document, also written to benchmarks/results/, and drawn with --picture.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import common


@dataclass(frozen=True)
class Variant:
    """Exits of one kind, and how they are tuned."""

    name: str
    exits: tuple[str, ...]
    """Flags of `add-exits`."""
    init: str
    lr: float
    distillation: float = 0.0
    thresholds: tuple[float, ...] = ()
    """To decode with at the end."""

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "_").replace(",", "")


OUTPUT, NORM, MLP = ("--untie-exit-output-weights",), ("--use-exit-norm",), ("--use-exit-norm", "--use-exit-mlp")
THRESHOLDS = (0.95, 0.9, 0.8, 0.6)

VARIANTS = (
    Variant("MLP, copied, distilled", MLP, "copy", 5e-3, distillation=1.0, thresholds=THRESHOLDS),
    Variant("MLP, copied", MLP, "copy", 5e-3, thresholds=THRESHOLDS),
    Variant("MLP, random", MLP, "random", 5e-3),
    Variant("norm, copied", NORM, "copy", 5e-3, thresholds=THRESHOLDS),
    Variant("norm, random", NORM, "random", 5e-3),
    Variant("output, copied", OUTPUT, "copy", 1e-3),
    Variant("output, random", OUTPUT, "random", 1e-3),
)


@dataclass(frozen=True)
class Settings:
    """What all variants share."""

    layers: tuple[int, ...] = (8, 15, 22)
    iterations: int = 64
    global_batch_size: int = 8
    micro_batch_size: int = 2
    seq_length: int = 128
    evaluations: int = 4
    """Of each variant while it is tuned."""
    evaluation_tokens: int = 1024
    prompts: int = 6
    answer_tokens: int = 48
    rounds: int = 2
    ranks: int = 2
    """Data-parallel, with one thread each on the CPU."""
    seed: int = 1234

    @property
    def tokens_per_iteration(self) -> int:
        return self.global_batch_size * self.seq_length


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run one of the project's programs; its output goes to the terminal. Raises CalledProcessError."""
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=common.ROOT, env={**os.environ, **(env or {})})


def prepare(folder: Path) -> tuple[Path, Path, Path]:
    """(base model, training text, held-out text), made where they are missing."""
    base, data = folder / "base", folder / "data"
    if not (base / "latest_checkpointed_iteration.txt").is_file():
        run("-m", "benchmarks.smollm2", "--output", folder / "gguf")
        run("tools/convert_checkpoint.py", "from-hf", "--input", folder / "gguf", "--save", base)
    if not (data / "held_out_text_document.idx").is_file():
        corpus = folder / "corpus.jsonl"
        run("tools/stdlib_corpus.py", "--output", corpus)
        documents = corpus.read_text().splitlines(keepends=True)
        for part, lines in (("train", documents[:-40]), ("held_out", documents[-40:])):
            (folder / f"{part}.jsonl").write_text("".join(lines))
            run(
                "tools/preprocess_data.py", "--input", folder / f"{part}.jsonl", "--output-prefix", data / part,
                "--tokenizer-model", base / "iter_0000000/tokenizer", "--append-eod", "--workers", "2", "--overwrite",
            )  # fmt: skip
    return base, data / "train_text_document", data / "held_out_text_document"


def tune(folder: Path, base: Path, text: Path, variant: Variant, settings: Settings) -> float:
    """Add the variant's exits and tune them; returns the seconds that tuning took."""
    own = folder / variant.folder
    exits, tuned = own / "exits", own / "tuned"
    shutil.rmtree(own, ignore_errors=True)
    run(
        "tools/convert_checkpoint.py", "add-exits", "--load", base, "--save", exits, "--init", variant.init,
        "--exit-layer-nums", *map(str, settings.layers), *variant.exits,
    )  # fmt: skip
    start = time.perf_counter()
    run(
        "-m", "torch.distributed.run", "--nproc_per_node", str(settings.ranks), "--master_port", "29547",
        "pretrain_early_exit_gpt.py", "--tune-exit", "--pretrained-checkpoint", exits, "--use-checkpoint-args",
        "--load", tuned, "--save", tuned, "--save-interval", str(settings.iterations // settings.evaluations),
        "--no-save-optim", "--no-save-rng", "--seq-length", str(settings.seq_length),
        "--micro-batch-size", str(settings.micro_batch_size), "--global-batch-size", str(settings.global_batch_size),
        "--train-iters", str(settings.iterations), "--lr", str(variant.lr), "--min-lr", str(variant.lr / 10),
        "--lr-decay-style", "cosine", "--lr-warmup-iters", str(max(settings.iterations // 20, 1)),
        "--adam-beta2", "0.95", "--tune-exit-distillation", str(variant.distillation), "--data-path", text,
        "--data-cache-path", folder / "data/cache", "--split", "1,0,0", "--num-workers", "0", "--eval-iters", "0",
        "--log-interval", "1", "--seed", str(settings.seed), "--cache-hidden-states", folder / "cache",
        env={"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    return time.perf_counter() - start


def evaluate(folder: Path, held_out: Path, variant: Variant, settings: Settings) -> dict[str, Any]:
    """Exits on the way and at the end, on held-out text."""
    from megatron.early_exit.data.text_samples import sample_sequences
    from megatron.early_exit.evaluation.comparison import ComparisonSettings, compare
    from megatron.early_exit.evaluation.exit_quality import head_row, head_scores
    from megatron.early_exit.evaluation.prompts import EvalPrompt
    from megatron.early_exit.evaluation.variants import Grid, variants_of
    from megatron.early_exit.inference.params import GenerationParams

    own, step = folder / variant.folder, settings.iterations // settings.evaluations
    curve = []
    for iteration in range(0, settings.iterations + 1, step):
        llm = load(own / ("tuned" if iteration else "exits"), iteration)
        vocab_size = llm.engine.description.vocab_size
        sequences = sample_sequences(str(held_out), vocab_size, settings.evaluation_tokens, 256)
        costs = llm.engine.measure_costs()
        heads = [head_row(head, costs, settings.seed) for head in head_scores(llm, sequences)]
        curve.append({"tokens": iteration * settings.tokens_per_iteration, "heads": heads})
        report = ", ".join(f"{head['layer']}: {head['loss']:.2f} / {head['agreement']:.1%}" for head in heads[:-1])
        print(f"{variant.name}, {curve[-1]['tokens']:,} tokens: loss / agreement of exit {report}", flush=True)
    result: dict[str, Any] = {"variant": asdict(variant), "curve": curve}
    if variant.thresholds:
        answers = GenerationParams(max_tokens=settings.answer_tokens, ignore_eod=True)
        variants = variants_of(Grid(thresholds=variant.thresholds), answers, llm.engine.checks)
        beginnings = [tuple(sequence[:32]) for sequence in sequences if len(sequence) >= 32][: settings.prompts]
        prompts = [EvalPrompt(ids, None, str(number)) for number, ids in enumerate(beginnings)]
        how = ComparisonSettings((1,), settings.rounds, len(prompts), settings.seed)
        result["decoding"] = compare(llm, prompts, variants, how, lambda words: lambda done, total: None).rows
        for row in result["decoding"]:
            print(f"{variant.name}, {row['name']}: {row['speedup']:.2f}x, saved {row['runs_saved']:.1%}, agreement "
                  f"{row['agreement']:.1%}", flush=True)  # fmt: skip
    return result


def load(folder: Path, iteration: int) -> Any:
    """A model for one request."""
    from megatron.early_exit.inference.llm import LLM

    return LLM.load(str(folder), iteration=iteration, max_requests=1)


def draw(results: Sequence[dict[str, Any]], layers: Sequence[int], path: Path) -> None:
    """Loss and agreement of every exit against tokens seen, one column a depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(layers), figsize=(4 * len(layers), 6.4), sharex=True, sharey="row",
                                   layout="constrained", squeeze=False)  # fmt: skip
    colours = {"output": "#D55E00", "norm": "#E69F00", "MLP": "#0072B2"}
    for column, layer in enumerate(layers):
        for result in results:
            name = result["variant"]["name"]
            curve = result["curve"]
            tokens = [point["tokens"] / 1000 for point in curve]
            style = {"color": colours[name.split(",")[0]], "linestyle": "--" if "random" in name else "-",
                     "marker": "o", "markersize": 3, "label": name}  # fmt: skip
            if "distilled" in name:
                style |= {"color": "#009E73"}
            for row, key, scale in ((0, "loss", 1), (1, "agreement", 100)):
                axes[row][column].plot(tokens, [scale * point["heads"][column][key] for point in curve], **style)
        axes[0][column].set_title(f"exit after layer {layer}")
        axes[0][column].set_yscale("log")
        axes[1][column].set_xlabel("thousand tokens seen")
        for row in (0, 1):
            axes[row][column].grid(alpha=0.3)
            axes[row][column].spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("loss (nats per token)")
    axes[1][0].set_ylabel("agreement with the final head (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tuning_study", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="for everything that is made")
    parser.add_argument("--iterations", type=int, default=Settings.iterations, help="of each variant")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants to run; default: all")
    parser.add_argument("--output", type=Path, help="of the JSON document; default: benchmarks/results/")
    parser.add_argument("--picture", type=Path, help="draw loss and agreement there")
    args = parser.parse_args(argv)
    settings, machine = Settings(iterations=args.iterations), common.machine_info()
    if args.iterations % settings.evaluations:
        parser.error(f"--iterations {args.iterations}: must be a multiple of {settings.evaluations} evaluations")
    unknown = set(args.only or ()) - {variant.name for variant in VARIANTS}
    if unknown:
        parser.error(f"--only {sorted(unknown)}: there are {[variant.name for variant in VARIANTS]}")
    base, text, held_out = prepare(args.folder)
    results = []
    for variant in VARIANTS:
        if args.only and variant.name not in args.only:
            continue
        file = args.folder / f"{variant.folder}_{settings.iterations}.json"
        if not file.is_file():
            seconds = tune(args.folder, base, text, variant, settings)
            result = evaluate(args.folder, held_out, variant, settings)
            common.write_document({**result, "seconds": seconds}, file)
        results.append(json.loads(file.read_text()))
    if args.picture is not None:
        draw(results, settings.layers, args.picture)
    document = common.result_document(
        "tuning_study", machine, asdict(settings), settings.seed, {"variants": results}, goals={}
    )
    common.finish(document, args.output)


if __name__ == "__main__":
    main()
