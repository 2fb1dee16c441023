"""Probes in the engine: tokens and exits are those of a plain reference that applies the networks by hand."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.early_exit.checkpoint.writing import write_checkpoint
from megatron.early_exit.config.checkpoint_files import PROBES_FILE
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.data.tokenizer import build_tokenizer
from megatron.early_exit.evaluation.commands.exits import evaluated_heads
from megatron.early_exit.evaluation.exit_quality import head_scores
from megatron.early_exit.evaluation.prompts import EvalPrompt
from megatron.early_exit.inference.certificates import AnswerSettings, Certificate, add_certificates
from megatron.early_exit.inference.exit_probes import AboutProbes, ExitProbes, ProbeNetwork
from megatron.early_exit.inference.llm import LLM
from megatron.early_exit.inference.loading import InferenceCheckpoint, LoadConfig
from megatron.early_exit.inference.params import GenerationParams, SamplingSettings, ScoreParams
from tests.configs import VOCAB_SIZE
from tests.reference import ReferenceBatch, ReferenceModel
from tests.reference_checkpoint import HEADS, decoding_config, reference_description, reference_tensors

NUM_IDS, WIDTH = 94, 6
TOKENIZER = TokenizerConfig("NullTokenizer", None, NUM_IDS - 1)
PROMPTS = [[5, 17, 80, 3, 41], [9] * 3, [60, 2], list(range(10, 30))]
GREEDY = GenerationParams(max_tokens=12, ignore_eod=True, mode="early_exit", exit_score="probe")
EXITS = replace(GREEDY, exit_thresholds=(0.6, 0.55, 0.5))
PARAMS = [
    EXITS,
    replace(EXITS, max_deferred=2),
    replace(EXITS, exit_layers=(1, 3), exit_thresholds=(0.6, 0.5), sampling=SamplingSettings(temperature=1.0)),
    replace(GREEDY, exit_thresholds=(1.0,)),
]


def save(folder: Path, cfg: RunConfig, seed: int = 0) -> ExitProbes:
    """Write a checkpoint and random probes, whose outputs lie on both sides of 1/2."""
    description = replace(reference_description(cfg), dtype="fp32", tokenizer=TOKENIZER)
    write_checkpoint(folder, description, reference_tensors(cfg))
    return save_probes(folder, cfg, seed)


def save_probes(folder: Path, cfg: RunConfig, seed: int) -> ExitProbes:
    draw, size = np.random.default_rng(seed), cfg.model.hidden_size
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    networks = {
        layer: ProbeNetwork(normal(WIDTH, size), normal(WIDTH), normal(1, WIDTH), normal(1))
        for layer in cfg.exits.leaving_layers
    }
    checkpoint = InferenceCheckpoint(LoadConfig(path=str(folder)))
    fingerprint = checkpoint.exit_fingerprint(build_tokenizer(TOKENIZER))
    probes = ExitProbes(AboutProbes(fingerprint, size, WIDTH, (), {}), networks)
    _, scores, _ = by_hand(cfg, probes, [(7 * i * i + seed) % NUM_IDS for i in range(40)])
    for layer, network in networks.items():
        network.fc2_bias[:] -= torch.logit(scores[layer]).median().item()
    probes.save(checkpoint.folder)
    return probes


def iteration(folder: Path) -> Path:
    (only,) = folder.glob("iter_*")
    return only


class StatesReference(ReferenceModel):
    """Keeps what layers and blocks make of their inputs, by name: (residual after attention, output)."""

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__(cfg, VOCAB_SIZE)
        self.made: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def layer(self, name: str, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        residual, out = super().layer(name, x, mask)
        self.made[name] = (x, residual, out)
        return residual, out

    def states(self, layer_number: int) -> Tensor:
        """[s, h]: what the exit's head reads."""
        exits, name = self.cfg.exits, f"decoder.layers.{layer_number - 1}"
        before, residual, out = self.made[name]
        if f"{name}.exit_head.block" in self.made:
            return self.made[f"{name}.exit_head.block"][2][0]
        if exits.pre_exit:
            return before[0]
        has_mlp = exits.head_of(exits.index_of(layer_number)).mlp
        return (residual if has_mlp else out)[0]


@torch.no_grad()
def by_hand(
    cfg: RunConfig, probes: ExitProbes, tokens: Sequence[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int | None, Tensor]]:
    """(states, probe's outputs, log-probabilities), by exit layer; None: of the final head."""
    reference, ids = StatesReference(cfg), torch.tensor([list(tokens)])
    batch = ReferenceBatch(ids, ids, torch.ones_like(ids), torch.arange(len(tokens))[None])
    logits = dict(zip((*cfg.exits.exit_layer_nums, None), reference.logits(batch), strict=True))
    states = {layer: reference.states(layer) for layer in cfg.exits.exit_layer_nums}
    scores = {}
    for layer, network in probes.networks.items():
        x = states[layer].double()
        x = x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)
        fc1, bias, fc2, fc2_bias = (torch.tensor(one).double() for one in vars(network).values())
        scores[layer] = torch.sigmoid(torch.relu(x @ fc1.T + bias) @ fc2[0] + fc2_bias)
    return states, scores, {layer: one[0, :, :NUM_IDS].log_softmax(-1) for layer, one in logits.items()}


def check(cfg: RunConfig, probes: ExitProbes, llm: LLM, params: GenerationParams) -> list[int]:
    """All answers follow from the reference. Returns the layers that gave tokens."""
    given = []
    policy = params.exit_policy(cfg.exits)
    for output in llm.generate(PROMPTS, params):
        assert output.error is None
        ids, start = [*output.prompt_ids, *output.result.token_ids], len(output.prompt_ids) - 1
        _, scores, log_probs = by_hand(cfg, probes, ids[:-1])
        for row, token in enumerate(output.result.tokens, start=start):
            reached = [
                layer for layer, threshold in zip(policy.exit_layers, policy.thresholds, strict=True)
                if scores[layer][row] >= threshold
            ]  # fmt: skip
            head = reached[0] if reached else None
            assert (token.exit_layer, token.is_final) == (head or cfg.model.num_layers, head is None), (row, token)
            if params.sampling.is_greedy:
                assert token.token == log_probs[head][row].argmax()
            assert token.log_prob == pytest.approx(log_probs[head][row][token.token].item(), abs=1e-5)
            assert token.confidence == pytest.approx(log_probs[head][row].max().exp().item(), rel=1e-4)
            (reading,) = token.predictions  # no other head was evaluated
            if head is not None:
                assert (reading.exit_layer, reading.token) == (head, log_probs[head][row].argmax())
                assert reading.confidence == pytest.approx(scores[head][row].item(), abs=1e-5)
            given.append(head or cfg.model.num_layers)
    return given


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, RunConfig, ExitProbes]]:
    made = {}
    for name in ("tied", "mlp", "block", "pre_exit"):
        folder, cfg = tmp_path_factory.mktemp(name), decoding_config(**HEADS[name])
        made[name] = folder, cfg, save(folder, cfg)
    return made


@pytest.mark.parametrize(
    ("head", "layout"),
    [*((head, {}) for head in ("tied", "mlp", "block", "pre_exit")),
     ("mlp", {"tensor_parallel_size": 2}), ("block", {"pipeline_parallel_size": 2})],
    ids=["tied", "mlp", "block", "pre_exit", "mlp, tp 2", "block, pp 2"],
)  # fmt: skip
def test_tokens_and_exits_are_those_of_the_probes_by_hand(
    folders: dict[str, tuple[Path, RunConfig, ExitProbes]], head: str, layout: dict[str, int]
) -> None:
    folder, cfg, probes = folders[head]
    with LLM.load(str(folder), max_requests=3, **layout) as llm:
        assert llm.engine.description.has_probes
        given = [layer for params in PARAMS for layer in check(cfg, probes, llm, params)]
        assert 4 in given and len(set(given)) >= 3, "tokens come from exits and from the final head"
        # Observed, never taken: the answer is the full model's.
        full = replace(GREEDY, mode="full", exit_score=None)
        (observed,) = llm.generate(PROMPTS[0], replace(full, observe_exits=True, exit_score="probe"))
        (plain,) = llm.generate(PROMPTS[0], full)
        assert observed.result.token_ids == plain.result.token_ids
        ids = [*PROMPTS[0], *observed.result.token_ids]
        states, scores, log_probs = by_hand(cfg, probes, ids[:-1])
        for row, token in enumerate(observed.result.tokens, start=len(PROMPTS[0]) - 1):
            assert [one.exit_layer for one in token.predictions] == [1, 2, 3, None]
            for one in token.predictions[:-1]:
                assert one.token == log_probs[one.exit_layer][row].argmax()
                assert one.confidence == pytest.approx(scores[one.exit_layer][row].item(), abs=1e-5)
        # What probes are trained on.
        (scored,) = llm.score([ids], ScoreParams(states=True, score_from=4, score_last=False))
        *exits, final = scored.check().heads
        assert final.states is None and [one.exit_layer for one in exits] == [1, 2, 3]
        for one in exits:
            theirs = states[one.exit_layer][4:]
            assert one.states.shape == theirs.shape and np.abs(one.states - theirs.numpy()).max() < 1e-4
        # Requests with both scores in one batch.
        mixed = [EXITS, replace(EXITS, exit_score="head", exit_thresholds=(0.0113,))]
        together = llm.generate([PROMPTS[0]] * 2, mixed)
        alone = [llm.generate(PROMPTS[0], one)[0] for one in mixed]
        assert [one.result.token_ids for one in together] == [one.result.token_ids for one in alone]


def test_costs_of_probes_are_measured(folders: dict[str, tuple[Path, RunConfig, ExitProbes]]) -> None:
    costs = LLM.load(str(folders["tied"][0]), max_requests=1).engine.measure_costs()
    assert min(costs.probe_seconds) > 0


def test_costs_of_probes_where_the_first_exit_only_drafts(tmp_path: Path) -> None:
    cfg = decoding_config(exit_uses=("draft", "leave", "both"))
    probes = save(tmp_path, cfg)
    assert sorted(probes.networks) == [2, 3]
    llm = LLM.load(str(tmp_path), max_requests=1)
    drafts = GenerationParams(max_tokens=4, mode="self_speculative")
    assert llm.generate([1, 2], drafts)[0].error is None  # of adaptive length, so that costs are measured
    assert min(llm.engine.measure_costs().probe_seconds) > 0


def test_exits_that_only_draft_are_evaluated_without_a_probe(tmp_path: Path) -> None:
    cfg = decoding_config(exit_uses=("draft", "leave", "both"))
    probes, sequences = save(tmp_path, cfg), [list(range(9)), [7, 80, 3, 5]]
    checkpoint = InferenceCheckpoint(LoadConfig(path=str(tmp_path)))
    fingerprint = checkpoint.exit_fingerprint(build_tokenizer(TOKENIZER), "probe")
    certificate = Certificate(
        0.9, 0.05, "A-max", fingerprint, AnswerSettings(12), {2: 0.5}, refusal=None, p_value=0.01,
        calibration_risk=0.01, num_prompts={},
    )  # fmt: skip
    add_certificates(checkpoint.folder, [certificate])
    llm = LLM.load(str(tmp_path), max_requests=2)
    first, second, third, final = head_scores(llm, sequences, probes=probes)
    assert first.probe_scores is None and final.probe_scores is None
    for head in (second, third):
        for ids, scores in zip(sequences, head.probe_scores, strict=True):
            assert scores == pytest.approx(by_hand(cfg, probes, ids[:-1])[1][head.layer].numpy(), abs=1e-5)
    prompts = [EvalPrompt(tuple(ids), None, "text") for ids in sequences]
    used = evaluated_heads(llm, "model", prompts, seed=1, probes=probes)["used_heads"]
    assert [(one["level"], one["exit_score"]) for one in used] == [(0.9, "probe")]
    assert evaluated_heads(llm, "model", prompts, seed=1)["used_heads"] == []  # their output is not known


@pytest.fixture
def folder(folders: dict[str, tuple[Path, RunConfig, ExitProbes]], tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(folders["tied"][0], tmp_path / "model"))


def refusal(folder: Path, params: GenerationParams = EXITS) -> str:
    with pytest.raises(ValueError) as caught:
        LLM.load(str(folder), max_requests=1).generate([1, 2], params)
    return str(caught.value)


def test_probes_of_another_model_are_refused_and_the_model_is_not(folder: Path) -> None:
    about = iteration(folder) / "checksums.json"
    about.write_text(about.read_text() + "\n")
    words = refusal(folder)
    assert "exit_score 'probe' needs probes of this model's exits (of those in" in words
    assert "they were trained for another checkpoint, or for one that was written again)" in words
    assert "tools/evaluate.py probes trains them" in words
    llm = LLM.load(str(folder), max_requests=1)
    assert llm.generate([1, 2], replace(EXITS, exit_score=None, exit_thresholds=(0.5,)))[0].error is None
    assert not llm.engine.description.has_probes


def test_a_model_without_probes_and_a_file_that_is_damaged(folder: Path) -> None:
    (iteration(folder) / PROBES_FILE).write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"exit_probes.safetensors cannot be read.*train the probes again"):
        LLM.load(str(folder))
    (iteration(folder) / PROBES_FILE).unlink()
    assert "the checkpoint has none" in refusal(folder)
    observing = GenerationParams(observe_exits=True, exit_score="probe")
    assert "the checkpoint has none" in refusal(folder, observing)
    drafts = GenerationParams(max_tokens=2, mode="self_speculative", exit_score="probe")  # which compares nothing
    assert LLM.load(str(folder), max_requests=1).generate([1, 2], drafts)[0].error is None


def test_probes_of_other_exits(folder: Path, folders: dict[str, tuple[Path, RunConfig, ExitProbes]]) -> None:
    probes = folders["tied"][2]
    replace(probes, networks={layer: probes.networks[layer] for layer in (1, 2)}).save(iteration(folder))
    assert "they were trained for the exits 1 2; the model has 1 2 3" in refusal(folder)
    wide = replace(probes, networks={**probes.networks, 2: replace(probes.networks[2], fc2=np.zeros((1, 9)))})
    wide.save(iteration(folder))
    assert f"fc2 of exit 2 has the shape (1, 9), not (1, {WIDTH})" in refusal(folder)


def test_certificates_hold_for_the_score_that_they_were_made_with(
    folder: Path, folders: dict[str, tuple[Path, RunConfig, ExitProbes]]
) -> None:
    _, cfg, probes = folders["tied"]
    checkpoint = InferenceCheckpoint(LoadConfig(path=str(folder)))
    fingerprint = lambda score: checkpoint.exit_fingerprint(build_tokenizer(TOKENIZER), score)
    of_heads = Certificate(
        0.9, 0.05, "A-max", fingerprint("head"), AnswerSettings(12, ignore_eod=True), {1: 0.0}, refusal=None,
        p_value=0.01, calibration_risk=0.01, num_prompts={},
    )  # fmt: skip
    of_probes = replace(of_heads, fingerprint=fingerprint("probe"), thresholds={1: 0.6, 2: 0.55, 3: 0.5})
    assert (of_heads.score, of_probes.score) == ("head", "probe")
    assert of_probes.fingerprint.probes == probes.digest
    certain = GenerationParams(max_tokens=12, ignore_eod=True, mode="early_exit", exit_thresholds="certified:0.9")
    add_certificates(iteration(folder), [of_heads])
    llm = LLM.load(str(folder), max_requests=2)
    assert {token.exit_layer for token in llm.generate(PROMPTS[0], certain)[0].tokens} == {1}
    assert "has no certificate with exit_score 'probe' that holds" in refusal(
        folder, replace(certain, exit_score="probe")
    )
    add_certificates(iteration(folder), [of_probes])
    llm = LLM.load(str(folder), max_requests=2)
    (by_probe, by_head, numbers) = llm.generate(
        [PROMPTS[0]] * 3, [certain, replace(certain, exit_score="head"), EXITS]
    )  # the newest one, unless a score is asked for
    assert by_probe.result.token_ids == numbers.result.token_ids
    assert [token.exit_layer for token in by_probe.tokens] == [token.exit_layer for token in numbers.tokens]
    assert {token.exit_layer for token in by_head.tokens} == {1}
    save_probes(folder, cfg, seed=1)
    words = refusal(folder, replace(certain, exit_score="probe"))
    assert "is for other probes" in words
    assert {one.exit_layer for one in LLM.load(str(folder)).generate(PROMPTS[0], certain)[0].tokens} == {1}
