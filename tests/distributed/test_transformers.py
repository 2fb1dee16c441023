"""Greedy tokens and logits against `transformers`, over Llama-like models with random weights and odd sizes."""

from __future__ import annotations

import pytest
import torch

from megatron.early_exit.inference.params import GenerationParams
from tests.distributed.engines import run_all
from tests.distributed.workers import run_distributed

SIZES = {
    "vocab_size": 93, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 5,
    "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
PROMPTS = [[(7 * i + j * j) % 93 for j in range(1 + 3 * i % 50)] for i in range(20)]


def compare(kind: str, **changes: object) -> None:
    import transformers

    from megatron.early_exit.checkpoint.hugging_face import from_transformers
    from megatron.early_exit.checkpoint.parameters import check_parameters
    from megatron.early_exit.config.data import TokenizerConfig
    from megatron.early_exit.config.description import ModelDescription
    from megatron.early_exit.config.exits import ExitConfig
    from megatron.early_exit.inference.engine.engine import Engine
    from megatron.early_exit.inference.executor.local import LocalExecutor
    from megatron.early_exit.inference.worker.decoder import Decoder
    from megatron.early_exit.inference.worker.weight_reading import decoder_weights
    from megatron.early_exit.inference.worker.worker import Worker

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model, tensors = from_transformers(theirs, 96)
    description = ModelDescription(model, ExitConfig(), TokenizerConfig("NullTokenizer", vocab_size=92), "fp32")
    check_parameters(tensors, model, ExitConfig())
    decoder = Decoder(decoder_weights(tensors, description), num_slots=6, vocab_size=93)
    engine = Engine(LocalExecutor(Worker(decoder)), ExitConfig(), prefill_chunk=32)
    for prompt in PROMPTS:
        engine.add(prompt, GenerationParams(max_tokens=64, top_log_probs=93, echo=True))
    results = run_all(engine)
    for index, prompt in enumerate(PROMPTS):
        tokens = results[index].token_ids
        with torch.no_grad():
            generated = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :]
            logits = theirs(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        assert tokens == generated.tolist(), index
        for row, token in enumerate(results[index].tokens, start=len(prompt) - 1):
            ours = torch.zeros(93).scatter(0, *_columns(token.top_log_probs))
            assert torch.allclose(ours, logits[row], atol=1e-4)
        for row, token in enumerate(results[index].prompt[1:]):
            assert abs(token.log_prob - logits[row, token.token]) < 1e-4


def _columns(top_log_probs: tuple[tuple[int, float], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, values = zip(*top_log_probs, strict=True)
    return torch.tensor(ids), torch.tensor(values)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "hidden_size": 42, "num_attention_heads": 6,
                   "num_key_value_heads": 3}),
        ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 5, "rope_parameters":
                   {"rope_type": "default", "rope_theta": 500000.0}}),
        ("qwen2", {"tie_word_embeddings": True, "head_dim": 8}),
        ("qwen3", {"tie_word_embeddings": True, "head_dim": 10}),
    ],
    ids=str,
)  # fmt: skip
def test_tokens_and_log_probs_equal_those_of_transformers(kind: str, changes: dict) -> None:
    run_distributed(1, compare, kind=kind, **changes)
