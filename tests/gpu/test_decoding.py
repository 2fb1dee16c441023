"""Decoding on one GPU: the tokens of the CPU in fp32, and all modes in bf16."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]
PROMPTS = [[5, 17, 80, 3, 41], [9] * 20, [1]]


def answers(dtype: torch.dtype, modes: tuple[str, ...], use_graphs: bool = True) -> list[list[int]]:
    from megatron.early_exit.inference.engine.engine import Engine
    from megatron.early_exit.inference.params import GenerationParams
    from megatron.early_exit.inference.worker.decoder import Decoder
    from tests.configs import VOCAB_SIZE
    from tests.distributed.engines import check_invariants, decoding_config, reference_weights, run_all
    from tests.distributed.parallel_model import layout

    cfg = decoding_config(use_exit_norm=True)
    with layout(cfg):
        weights = reference_weights(cfg, dtype=dtype, device=torch.device("cuda"))
        assert weights.device.type == "cuda"
        decoder = Decoder(weights, num_slots=2, vocab_size=VOCAB_SIZE, use_graphs=use_graphs)
        engine = Engine(decoder, cfg.exits)
        for prompt in PROMPTS:
            for mode in modes:
                engine.add(prompt, GenerationParams(max_tokens=15, mode=mode, exit_thresholds=(1.0,)))
        results = run_all(engine)
        check_invariants(engine)
        assert not use_graphs or decoder._graphs.num_graphs > 2
        return [results[i].token_ids for i in sorted(results)]


def reference_tokens() -> list[list[int]]:
    from tests.distributed.engines import decoding_config, reference_over

    cfg, expected = decoding_config(use_exit_norm=True), []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(15):
            tokens.append(int(reference_over(cfg, tokens)[1][None][-1].argmax()))
        expected.append(tokens[len(prompt) :])
    return expected


@pytest.mark.parametrize("use_graphs", [False, True])
def test_all_modes_give_the_reference_s_tokens_in_fp32(use_graphs: bool) -> None:
    modes = ("full", "early_exit", "self_speculative")
    expected = [tokens for tokens in reference_tokens() for _ in modes]
    assert answers(torch.float32, modes, use_graphs) == expected


def test_bf16_runs() -> None:
    assert [len(tokens) for tokens in answers(torch.bfloat16, ("full", "self_speculative"))] == [15] * 6
