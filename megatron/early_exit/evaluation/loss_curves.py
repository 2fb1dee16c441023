"""Pictures of training: the loss of every exit and of the final head over iterations, from metrics.jsonl."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from megatron.early_exit.data.metrics_file import read_metrics

Curves = dict[str, list[tuple[int, float]]]


def read_losses(path: str | Path, kind: str = "train") -> Curves:
    """(iteration, loss) of every head, by the head's name in the file. A resumed run overwrites what it repeats.

    kind: "train" or "valid". Raises ValueError if the file is damaged or has no losses of this kind."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for record in read_metrics(path):
        if record["kind"] != kind:
            continue
        for key, value in record.items():
            if value is not None and (key == "lm_loss" or key.startswith("exit_loss/")):
                curves[key][record["iteration"]] = value
    if not curves:
        raise ValueError(f"{path} has no losses of kind {kind!r}.")
    return {key: sorted(values.items()) for key, values in curves.items()}


def head_label(key: str) -> str:
    """Words for a legend."""
    return "final exit" if key == "lm_loss" else f"exit at layer {key.rsplit('_', 1)[1]}"


def draw_loss_curves(runs: Sequence[tuple[str, str | Path]], output: str | Path, kind: str = "train") -> None:
    """Draw the curves of all runs into one picture (format by the suffix of `output`).

    runs: (name for the legend, metrics.jsonl); with one run the name is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for run_index, (name, path) in enumerate(runs):
        curves = read_losses(path, kind)
        for key in sorted(curves, key=lambda key: (key == "lm_loss", key)):
            iterations, losses = zip(*curves[key], strict=True)
            label = head_label(key) if len(runs) == 1 else f"{name}: {head_label(key)}"
            axes.plot(iterations, losses, label=label, linestyle=("-", "--", ":", "-.")[run_index % 4],
                      linewidth=2.2 if key == "lm_loss" else 1.4)  # fmt: skip
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    pyplot.close(figure)
