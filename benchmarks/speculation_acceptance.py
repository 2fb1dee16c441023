"""How often a drafted token is what the final head draws: by shared noise, and by rejection sampling.

    python -m benchmarks.speculation_acceptance --load runs/demo/checkpoints

Answers are sampled from all layers of a model at each temperature. For each of their tokens, p is the final head's
distribution and q an exit's, both at that temperature. Rejection sampling accepts a draft with probability
1 - TV(p, q), more than which no method can. Shared noise accepts it where both heads draw the same token, which is
measured with the package's own sampler over several seeds. SmolLM2-135M has exits that nobody trained: layers from
early to late give q from far to near p. A checkpoint (`--load`) has those that it was trained with.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.decode.models import Checkpoint, SmolLM2, make_decoder
from megatron.early_exit.inference.params import SamplingSettings
from megatron.early_exit.inference.worker.attention import Segment
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.head_output import HeadOutput
from megatron.early_exit.inference.worker.sampling import Draw
from megatron.early_exit.platform.device import device

PROMPTS = (
    "The history of the city begins with a small settlement on the bank of the river, where merchants met in",
    "Once upon a time, a young fox lived at the edge of a dark forest, and every night she would",
    "To compute the median of a list in Python, first sort the list. Then, if its length is odd,",
    "The heart pumps blood through the body. It has four chambers, of which the two upper ones are called",
    "Dear Sir or Madam, I am writing to apply for the position of librarian that was advertised in",
    "A good way to save water at home is to repair taps that drip. Another one is to",
)


def sample_answer(decoder: Decoder, prompt: list[int], temperature: float, tokens: int, seed: int) -> list[int]:
    """Prompt and answer, by all layers."""
    ids, settings, num_rows = list(prompt), SamplingSettings(temperature, seed=seed), 0
    for index in range(tokens):
        rows = decoder.attention_metadata([Segment(0, num_rows, len(ids) - num_rows)])
        hidden = decoder.run_layers(decoder.embed(ids[num_rows:], rows), rows, 0, decoder.num_layers)[0]
        num_rows = len(ids)
        ((token, _),) = decoder.final_output(hidden[-1:]).draw([Draw(0, settings, index, ids, len(prompt))])
        ids.append(token)
    return ids


def heads_of(decoder: Decoder, ids: list[int], first: int) -> list[HeadOutput]:
    """What each exit and then the final head predict for the tokens from position `first` on."""
    rows = decoder.attention_metadata([Segment(0, 0, len(ids))])
    hidden, depth, outputs = decoder.embed(ids, rows), 0, []
    for index, one in enumerate(decoder.exits):
        hidden, depth = decoder.run_layers(hidden, rows, depth, one.depth)[0], one.depth
        outputs.append(decoder.exit_output(index, hidden[first - 1 : -1]))
    hidden = decoder.run_layers(hidden, rows, depth, decoder.num_layers)[0]
    return [*outputs, decoder.final_output(hidden[first - 1 : -1])]


def draws(output: HeadOutput, row: int, temperature: float, samples: int, index: int = 0) -> list[int]:
    """One token of a row for each seed from 0 on; another index gives other noise."""
    settings = [SamplingSettings(temperature, seed=seed) for seed in range(samples)]
    return [token for token, _ in output.draw([Draw(row, one, index, (), 0) for one in settings])]


def share_of_equal(ours: list[int], theirs: list[int]) -> float:
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def overlap(p_logits: Tensor, q_logits: Tensor, temperature: float) -> float:
    """1 - TV: the sum of min(p, q). Logits: [vocabulary]"""
    p, q = ((logits.double() / temperature).softmax(-1) for logits in (p_logits, q_logits))
    return torch.minimum(p, q).sum().item()


def bound(accepted: float) -> float:
    """What shared noise accepts at least: (1 - TV) / (1 + TV), of 1 - TV (arXiv:2408.07978)."""
    return accepted / (2.0 - accepted)


@torch.inference_mode()
def measure(
    name: str, decoder: Decoder, prompts: list[list[int]], temperature: float, settings: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each exit."""
    positions: list[list[dict[str, float]]] = [[] for _ in decoder.exits]
    for number, prompt in enumerate(prompts):
        print(f"  {name}, temperature {temperature:g}, answer {number + 1}", file=sys.stderr, flush=True)
        ids = sample_answer(decoder, prompt, temperature, settings.tokens, settings.seed + number)
        *exits, final = heads_of(decoder, ids, len(prompt))
        for row in range(settings.tokens):
            index = number * settings.tokens + row
            expected = draws(final, row, temperature, settings.samples, index)
            for output, here in zip(exits, positions, strict=True):
                drafted = draws(output, row, temperature, settings.samples, index)
                optimum = overlap(final.logits(row), output.logits(row), temperature)
                shared = share_of_equal(drafted, expected)
                here.append({"rejection": optimum, "shared": shared, "bound": bound(optimum)})
    return [
        {"model": name, "exit": one.layer_number, "temperature": temperature, **summary(here)}
        for one, here in zip(decoder.exits, positions, strict=True)
    ]


def summary(positions: list[dict[str, float]]) -> dict[str, Any]:
    """Means over positions; the standard error is of shared - rejection, which are paired."""
    mean = {name: statistics.mean(one[name] for one in positions) for name in positions[0]}
    differences = [one["shared"] - one["rejection"] for one in positions]
    return {
        "shared noise": mean["shared"],
        "rejection": mean["rejection"],
        "shared / rejection": common.ratio(mean["shared"], mean["rejection"]),
        "lower bound": mean["bound"],
        "difference": statistics.mean(differences),
        "standard error": statistics.stdev(differences) / len(differences) ** 0.5,
        "positions": len(positions),
    }


def goals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    above = [row["shared noise"] - row["lower bound"] + 3 * row["standard error"] for row in rows]
    below = [row["difference"] - 3 * row["standard error"] for row in rows]
    return {
        "shared noise accepts at least (1 - TV) / (1 + TV)": {"met": min(above) >= 0, "margins": above},
        "shared noise accepts at most 1 - TV": {"met": max(below) <= 0, "margins": [-one for one in below]},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, default=Path("runs/smollm2"), metavar="DIR")
    parser.add_argument("--exit-layers", type=int, nargs="+", default=[10, 20, 25, 28, 29], help="of SmolLM2")
    parser.add_argument("--load", metavar="DIR", help="checkpoint with trained exits, measured as well")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.6, 1.0])
    parser.add_argument("--tokens", type=int, default=24, help="of each of the six answers")
    parser.add_argument("--samples", type=int, default=32, help="seeds for each token")
    parser.add_argument("--seed", type=int, default=0, help="of the answers")
    parser.add_argument("--output", type=Path)
    settings = parser.parse_args()
    machine = common.machine_info()
    smol = SmolLM2(settings.smollm2, tuple(settings.exit_layers))
    models: dict[str, tuple[Any, Callable[[str], list[int]]]] = {"SmolLM2": (smol, smol.tokenizer.encode)}
    if settings.load:
        trained = Checkpoint(settings.load)
        models["checkpoint"] = trained, trained.tokenizer.tokenize
    rows = []
    for name, (model, tokenize) in models.items():
        length = 64 + settings.tokens
        decoder = make_decoder(model.tensors, model.config, model.vocab_size, num_slots=1, length=length)
        for temperature in settings.temperatures:
            rows += measure(name, decoder, [tokenize(prompt) for prompt in PROMPTS], temperature, settings)
    print(common.format_table(list(rows[0]), [list(row.values()) for row in rows]))
    verdicts = goals(rows)
    print("\n" + common.goals_table(verdicts))
    described = {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}
    described["device"] = device().type
    document = common.result_document(
        "speculation_acceptance", machine, described, settings.seed, {"acceptance": rows}, verdicts
    )
    common.finish(document, settings.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
