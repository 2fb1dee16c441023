"""Beam search against all continuations there are, and against `transformers`."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron.early_exit.config.run import RunConfig
from megatron.early_exit.inference.engine.beam_search import Beam, beam_search
from megatron.early_exit.inference.params import GenerationParams
from tests.distributed.engines import make_engine, reference_over, run_all
from tests.distributed.parallel_model import layout
from tests.distributed.workers import run_distributed
from tests.reference_checkpoint import decoding_config

PROMPT = [3, 1, 4]
VOCABULARY = 5


def search(cfg: RunConfig, num_slots: int, **settings: object) -> list[Beam]:
    with layout(cfg):
        engine = make_engine(cfg, num_slots=num_slots, vocab_size=VOCABULARY, prefill_chunk=2)
        beams = beam_search(engine, PROMPT, **settings)
        # The engine is as before.
        engine.add(PROMPT, GenerationParams(max_tokens=3))
        assert len(run_all(engine)[0].tokens) == 3
        return beams


def all_continuations(cfg: RunConfig, length: int, stop: int | None, penalty: float) -> list[tuple[float, tuple]]:
    """(score, tokens) of everything that ends with `stop` or has `length` tokens, best first."""
    scored = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=length):
        if stop in tokens:
            tokens = tokens[: tokens.index(stop) + 1]
        if tokens not in scored:
            _, logits = reference_over(cfg, [*PROMPT, *tokens[:-1]])
            log_probs = logits[None][:, :VOCABULARY].log_softmax(-1)[len(PROMPT) - 1 :]
            log_prob = sum(log_probs[i, token].item() for i, token in enumerate(tokens))
            scored[tokens] = log_prob / len(tokens) ** penalty
    return sorted(((score, tokens) for tokens, score in scored.items()), reverse=True)


def compare_with_all(cfg: RunConfig, stop: int | None, penalty: float) -> None:
    beams = search(cfg, 125, beam_width=125, max_tokens=3, stop_token=stop, length_penalty=penalty, num_return=10)
    with layout(cfg):
        expected = all_continuations(cfg, 3, stop, penalty)
    assert [beam.tokens for beam in beams] == [tokens for _, tokens in expected[:10]]
    assert [beam.score for beam in beams] == pytest.approx([score for score, _ in expected[:10]], rel=1e-5)
    assert [beam.is_finished for beam in beams] == [beam.tokens[-1] == stop for beam in beams]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("stop", "penalty"), [(None, 1.0), (2, 1.0), (2, 0.0), (0, 3.0)])
def test_a_beam_as_wide_as_everything_finds_the_best(stop: int | None, penalty: float, world_size: int) -> None:
    cfg = decoding_config(tensor_model_parallel_size=world_size)
    run_distributed(world_size, compare_with_all, cfg=cfg, stop=stop, penalty=penalty)


def test_a_beam_of_one_is_greedy() -> None:
    cfg = decoding_config()
    (beam,) = run_distributed(1, search, cfg=cfg, num_slots=1, beam_width=1, max_tokens=12)[0]
    tokens = run_distributed(1, greedy, cfg=cfg)[0]
    assert list(beam.tokens) == tokens


def greedy(cfg: RunConfig) -> list[int]:
    with layout(cfg):
        engine = make_engine(cfg, vocab_size=VOCABULARY)
        engine.add(PROMPT, GenerationParams(max_tokens=12))
        return run_all(engine)[0].token_ids


def compare_with_transformers(beam_width: int) -> None:
    import transformers

    from megatron.early_exit.checkpoint.hugging_face import from_transformers
    from megatron.early_exit.config.data import TokenizerConfig
    from megatron.early_exit.config.description import ModelDescription
    from megatron.early_exit.config.exits import ExitConfig
    from megatron.early_exit.inference.engine.engine import Engine
    from megatron.early_exit.inference.executor.local import LocalExecutor
    from megatron.early_exit.inference.worker.decoder import Decoder
    from megatron.early_exit.inference.worker.weight_reading import decoder_weights
    from megatron.early_exit.inference.worker.worker import Worker
    from tests.distributed.test_transformers import SIZES

    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    model, tensors = from_transformers(theirs, 96)
    description = ModelDescription(model, ExitConfig(), TokenizerConfig("NullTokenizer", vocab_size=92), "fp32")
    decoder = Decoder(decoder_weights(tensors, description), num_slots=beam_width, vocab_size=93)
    engine = Engine(LocalExecutor(Worker(decoder)), ExitConfig())
    for prompt in ([1, 2, 3], [50], list(range(30))):
        (ours,) = beam_search(engine, prompt, beam_width=beam_width, max_tokens=20)
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, num_beams=beam_width, do_sample=False)
        assert list(ours.tokens) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("beam_width", [2, 5])
def test_beams_are_those_of_transformers(beam_width: int) -> None:
    run_distributed(1, compare_with_transformers, beam_width=beam_width)


def refusal(cfg: RunConfig, is_busy: bool = False, **settings: object) -> str:
    with layout(cfg):
        engine = make_engine(cfg, num_slots=3)
        if is_busy:
            engine.add(PROMPT, GenerationParams())
        with pytest.raises((ValueError, RuntimeError)) as caught:
            beam_search(engine, **{"prompt_ids": PROMPT, **settings})
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam_width": 4}, "beam_width is 4; the engine has slots for 1 to 3"),
        ({"beam_width": 0}, "beam_width is 0"),
        ({"beam_width": 2, "num_return": 3}, "num_return is 3"),
        ({"beam_width": 2, "max_tokens": 0}, "max_tokens is 0"),
        ({"beam_width": 2, "length_penalty": float("nan")}, "length_penalty is nan"),
        ({"beam_width": 2, "prompt_ids": []}, "the prompt is empty"),
        ({"beam_width": 2, "is_busy": True}, "wait until all requests have ended"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, message: str) -> None:
    assert message in run_distributed(1, refusal, cfg=decoding_config(), **settings)[0]
