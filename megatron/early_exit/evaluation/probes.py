"""Probes from prompts: answers, the hidden states that exits read along them, and the networks that learn from these
where an exit's token is the final head's.

Most answers are the full model's. Some are of early exit, with the heads' own probabilities: behind a token that the
full model would not have taken, states are others, and a probe that never saw them takes one error for the next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from megatron.early_exit.config.checkpoint_files import CHECKSUMS_FILE, PROBE_ANSWERS_FOLDER
from megatron.early_exit.evaluation.own_answers import AnswersFolder, take_answers
from megatron.early_exit.evaluation.prompts import EvalPrompt, PromptSet, prompt_digest
from megatron.early_exit.evaluation.recording import Progress, ShowProgress, full_params, leaving_layers
from megatron.early_exit.evaluation.statistics.exit_metrics import auroc, expected_calibration_error, leaving_share
from megatron.early_exit.inference.certificates import AnswerSettings
from megatron.early_exit.inference.engine_loading import LoadedEngine
from megatron.early_exit.inference.exit_probes import RMS_EPSILON, AboutProbes, ExitProbes, ProbeNetwork
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.params import GenerationParams, ScoreParams
from megatron.early_exit.inference.results import ScoredHead

_BATCH, _LEARNING_RATE, _WEIGHT_DECAY = 512, 1e-3, 1e-2
_RISKS = (0.01, 0.02, 0.05, 0.1)
"""Shares of wrong decisions for which the document says how many leave."""


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are trained. Impossible values raise ValueError."""

    answer_tokens: int = 64
    ignore_eod: bool = False
    width: int = 64
    """Numbers between the two layers of a probe."""
    max_epochs: int = 60
    patience: int = 6
    """Epochs without a better loss on the held-out prompts, after which training ends."""
    held_out: float = 0.2
    """Share of the prompts that say when to stop."""
    early_exit_share: float = 0.3
    """Share of the prompts that early exit answers."""
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0.0 <= self.early_exit_share < 1.0:
            raise ValueError(f"--early-exit-share is {self.early_exit_share:g}; it must be 0 or more, and less than 1")
        for name in ("answer_tokens", "width", "max_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"--held-out is {self.held_out:g}; it must lie between 0 and 1")


class ExitSamples(NamedTuple):
    """The decisions of one exit along the full model's answers."""

    states: np.ndarray
    """[decisions, h] fp32: what the exit's head reads."""
    agrees: np.ndarray
    """[decisions] bool: whether the exit's token is the final head's."""
    confidences: np.ndarray
    """[decisions]: the largest probability of the exit's head."""


@dataclass(frozen=True)
class ProbeSamples:
    """Those of all exits."""

    exits: dict[int, ExitSamples]
    """By layer."""
    prompts: np.ndarray
    """[decisions]: number of the prompt of each."""


def train_probes(
    llm: LLM, loaded: LoadedEngine, prompts: PromptSet, settings: ProbeSettings, show: ShowProgress
) -> tuple[ExitProbes, dict[str, Any]]:
    """(probes of all exits that tokens may leave at, results of the document). Answers that an earlier run has taken
    are not taken again.

    show: makes a progress function for a kind of work. Raises ValueError for a model without exits, for one whose
    weights cannot be told from others, and for less than two prompts."""
    checkpoint, layers = loaded.checkpoint, leaving_layers(loaded, "train probes for")
    if not (checkpoint.folder / CHECKSUMS_FILE).is_file():
        raise ValueError(
            f"{checkpoint.folder} has no {CHECKSUMS_FILE}, by which probes know weights; let "
            "tools/convert_checkpoint.py reshard write the checkpoint again"
        )
    if len(prompts.prompts) < 2:
        raise ValueError("probes need at least 2 prompts, one to train on and one to hold out")
    fingerprint = checkpoint.exit_fingerprint(loaded.tokenizer)
    start = time.perf_counter()
    end = "-ignore-eod" if settings.ignore_eod else ""
    name = f"{fingerprint.digest[:12]}-{prompts.digest[:12]}-{settings.answer_tokens}{end}"
    samples = _take_all_samples(llm, prompts.prompts, checkpoint.folder / PROBE_ANSWERS_FOLDER / name, settings, show)
    sampled = time.perf_counter()
    held_out = held_out_prompts(len(prompts.prompts), settings)
    is_held_out = np.isin(samples.prompts, held_out)
    networks, figures = {}, []
    for layer in layers:
        progress = show(f"probe of exit {layer}, epochs")
        networks[layer], training = train_probe(samples.exits[layer], is_held_out, settings, progress)
        figures.append({"layer": layer, **training, **_quality(networks[layer], samples.exits[layer], is_held_out)})
    about = AboutProbes(
        fingerprint=fingerprint,
        hidden_size=loaded.engine.description.hidden_size,
        width=settings.width,
        prompts=tuple(sorted(prompt_digest(prompt.ids) for prompt in prompts.prompts)),
        training={"settings": asdict(settings), "exits": figures, "held_out_prompts": held_out.tolist()},
    )
    seconds = {"samples": sampled - start, "training": time.perf_counter() - sampled}
    counts = {"train": int((~is_held_out).sum()), "held_out": int(is_held_out.sum())}
    results = {"exits": figures, "decisions": counts, "held_out_prompts": held_out.tolist(), "seconds": seconds}
    return ExitProbes(about, networks), results


def _take_all_samples(
    llm: LLM, prompts: Sequence[EvalPrompt], folder: Path, settings: ProbeSettings, show: ShowProgress
) -> ProbeSamples:
    """Decisions along the answers of the full model and, of the last prompts, of early exit."""
    num_full = max(len(prompts) - round(settings.early_exit_share * len(prompts)), 1)
    full, others = prompts[:num_full], prompts[num_full:]
    params = full_params(AnswerSettings(settings.answer_tokens, settings.ignore_eod))
    answers = _answers(llm, full, params, folder / "full", show("answers"))
    samples = take_samples(llm, full, answers, show("hidden states"))
    if not others:
        return samples
    layers = llm.exits.leaving_layers
    thresholds = tuple(float(np.median(samples.exits[layer].confidences)) for layer in layers)  # half of them leave
    early = replace(params, mode="early_exit", exit_layers=layers, exit_thresholds=thresholds)
    # Which prompts these are, and their thresholds, depends on how many the full model answers.
    answers = _answers(llm, others, early, folder / f"early_exit_{num_full}", show("answers of early exit"))
    more = take_samples(llm, others, answers, show("hidden states behind them"))
    return ProbeSamples(
        {layer: ExitSamples(*map(np.concatenate, zip(one, more.exits[layer]))) for layer, one in samples.exits.items()},
        np.concatenate([samples.prompts, more.prompts + num_full]),
    )


def held_out_prompts(num_prompts: int, settings: ProbeSettings) -> np.ndarray:
    """Their numbers, ascending: at least one, and not all."""
    count = min(max(round(settings.held_out * num_prompts), 1), num_prompts - 1)
    return np.sort(np.random.default_rng(settings.seed).permutation(num_prompts)[:count])


def _answers(
    llm: LLM, prompts: Sequence[EvalPrompt], params: GenerationParams, folder: Path, progress: Progress
) -> list[tuple[int, ...]]:
    """Ids of the answers in the order of prompts; they are kept in the folder."""
    show = lambda done, total, _: progress(done, total)
    ids = [prompt.ids for prompt in prompts]
    return [one.ids for one in take_answers(llm, AnswersFolder(folder), ids, [params] * len(ids), show)]


def take_samples(
    llm: LLM, prompts: Sequence[EvalPrompt], answers: Sequence[Sequence[int]], progress: Progress
) -> ProbeSamples:
    """Every decision along the answers, the first and the last one included: the rows of prompt and answer run once
    more, all exits and the final head are evaluated."""
    sequences = [[*prompt.ids, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    wanted = [ScoreParams(states=True, score_from=len(prompt.ids) - 1, score_last=False) for prompt in prompts]
    found: dict[int, dict[int, ExitSamples]] = {}
    for number, result in llm.stream_scores(sequences, wanted):
        *exits, final = result.check().heads
        found[number] = {}
        for head in exits:
            layer, states = layer_and_states(head)
            agrees = np.array(head.tokens) == np.array(final.tokens)
            found[number][layer] = ExitSamples(states, agrees, np.array(head.confidences))
        progress(len(found), len(sequences))
    in_order = [found[number] for number in range(len(sequences))]
    join = lambda layer: ExitSamples(*(np.concatenate(parts) for parts in zip(*(one[layer] for one in in_order))))
    return ProbeSamples(
        exits={layer: join(layer) for layer in in_order[0]},
        prompts=np.repeat(np.arange(len(answers)), [len(answer) for answer in answers]),
    )


def layer_and_states(head: ScoredHead) -> tuple[int, np.ndarray]:
    """Of an exit of which both were wanted (`ScoreParams.states`)."""
    assert head.exit_layer is not None and head.states is not None, "an exit has a layer, and its states were wanted"
    return head.exit_layer, head.states


def train_probe(
    samples: ExitSamples, is_held_out: np.ndarray, settings: ProbeSettings, progress: Progress
) -> tuple[ProbeNetwork, dict[str, Any]]:
    """(the probe with the least logistic loss on the held-out decisions, figures of the training). is_held_out:
    [decisions]"""
    generator = torch.Generator().manual_seed(settings.seed)
    features, labels = _normalised(samples.states), torch.from_numpy(samples.agrees).float()
    is_held = torch.from_numpy(is_held_out)
    mean, deviation = features[~is_held].mean(0), features[~is_held].std(0, correction=0).clamp(min=1e-3)
    features = (features - mean) / deviation
    training, held_out = torch.nonzero(~is_held).squeeze(1), torch.nonzero(is_held).squeeze(1)
    parameters = _initial(features.size(1), settings.width, float(labels[training].mean()), generator)
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    held_out_loss = lambda: float(_loss(parameters, features[held_out], labels[held_out]))
    with torch.no_grad():
        best_loss, best_epoch, best = held_out_loss(), 0, [one.clone() for one in parameters]
    for epoch in range(1, settings.max_epochs + 1):
        order = training[torch.randperm(len(training), generator=generator)]
        for rows in order.split(_BATCH):
            optimizer.zero_grad()
            _loss(parameters, features[rows], labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = held_out_loss()
            if loss < best_loss:
                best_loss, best_epoch, best = loss, epoch, [one.clone() for one in parameters]
        is_over = epoch == settings.max_epochs or epoch - best_epoch >= settings.patience
        progress(settings.max_epochs if is_over else epoch, settings.max_epochs)
        if is_over:
            break
    fc1, bias, fc2, fc2_bias = (one.detach() for one in best)
    # fc1 ((x - mean) / deviation) + bias, as one linear layer of x.
    folded = fc1 / deviation
    network = ProbeNetwork(*(one.numpy() for one in (folded, bias - folded @ mean, fc2, fc2_bias)))
    return network, {"held_out_loss": best_loss, "epochs": epoch, "best_epoch": best_epoch}


def _normalised(states: np.ndarray) -> torch.Tensor:
    """[decisions, h], as `ProbeNetwork` has it."""
    values = torch.from_numpy(states)
    return values / (values.pow(2).mean(-1, keepdim=True).sqrt() + RMS_EPSILON)


def _initial(hidden_size: int, width: int, share: float, generator: torch.Generator) -> list[torch.Tensor]:
    """fc1, its bias, fc2, its bias: the last one says that a share of `share` agrees."""
    share = min(max(share, 1e-3), 1 - 1e-3)
    draw = lambda rows, columns: torch.randn(rows, columns, generator=generator) * columns**-0.5
    values = [draw(width, hidden_size), torch.zeros(width), draw(1, width), torch.logit(torch.tensor([share]))]
    return [value.requires_grad_() for value in values]


def _loss(parameters: Sequence[torch.Tensor], features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    fc1, bias, fc2, fc2_bias = parameters
    logits = F.linear(F.linear(features, fc1, bias).relu(), fc2, fc2_bias).squeeze(-1)
    return F.binary_cross_entropy_with_logits(logits, labels)


def probe_scores(network: ProbeNetwork, states: np.ndarray) -> np.ndarray:
    """[decisions] fp64: the probe's output. states: [decisions, h]"""
    fc1, bias, fc2, fc2_bias = map(torch.from_numpy, (network.fc1, network.fc1_bias, network.fc2, network.fc2_bias))
    wide = F.linear(_normalised(states), fc1, bias).relu()
    return F.linear(wide, fc2, fc2_bias).squeeze(-1).double().sigmoid().numpy()


def _quality(network: ProbeNetwork, samples: ExitSamples, is_held_out: np.ndarray) -> dict[str, Any]:
    """How well the probe, and the exit's own probability, tell on the held-out decisions where the exit agrees."""
    agrees = samples.agrees[is_held_out]
    scores = {
        "probe": probe_scores(network, samples.states[is_held_out]),
        "head": samples.confidences[is_held_out],
    }
    return {
        "agreement": float(agrees.mean()),
        **{
            name: {
                "auroc": auroc(values, agrees),
                "ece": expected_calibration_error(values, agrees),
                "leaving": {f"{risk:g}": leaving_share(values, agrees, risk) for risk in _RISKS},
            }
            for name, values in scores.items()
        },
    }
